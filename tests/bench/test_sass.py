"""A thread is followed through machine code as a device would take it: branches, loops, trips, addresses, waits."""

from __future__ import annotations

import struct

import pytest
import sass
import warps

PARAMETERS = {"sm_90": 0x210, "sm_100": 0x380}


def function(*lines: str) -> sass.Function:
    """Instructions at addresses 0, 16, ...: "@P0 BRA 0x30"."""
    made = [sass.instruction(f"        /*{16 * at:04x}*/                   {line} ;") for at, line in enumerate(lines)]
    return sass.Function(tuple(one for one in made if one is not None), 32, 0, 0)


def follow(
    *lines: str,
    parameters: tuple[int, ...] = (),
    thread: int = 0,
    far: tuple[int, ...] = (0,),
    architecture: str = "sm_90",
) -> sass.Counts:
    words = struct.pack(f"<{len(parameters)}Q", *parameters)
    launched = sass.Launched(words, 64, (4, 1, 1), far)
    return sass.trace(function(*lines), architecture, launched, thread, (2, 0, 0))


def test_an_exit_is_taken_where_its_condition_holds() -> None:
    lines = (
        "S2R R0, SR_TID.X",
        "ISETP.GE.U32.AND P0, PT, R0, c[0x0][0x210], PT",
        "@P0 EXIT",
        "MUFU.RCP R1, R0",
        "EXIT",
    )
    assert [follow(*lines, parameters=(40,), thread=thread).issue for thread in (39, 40)] == [5, 3]
    assert follow(*lines, parameters=(40,)).mufu == 1


def test_a_loop_turns_as_often_as_its_parameters_say() -> None:
    counted = follow(
        "MOV R4, RZ", "LDG.E.128 R8, desc[UR4][R2.64]", "IADD3 R4, R4, 0x1, RZ", "ISETP.LT.AND P0, PT, R4, c[0x0][0x210], PT",
        "@P0 BRA 0x10", "EXIT", parameters=(7,),
    )  # fmt: skip
    assert (counted.issue, counted.lsu, warps.clocks_of([counted]).wavefronts) == (2 + 4 * 7, 7, 28)


@pytest.mark.parametrize(
    ("lines", "issue"),
    [
        # A slow path behind a call is stepped over, a loop that waits for others ends.
        (("LDG.E R0, desc[UR4][R2.64]", "FSETP.GEU.AND P0, PT, |R0|, 1, PT", "@P0 BRA 0x40", "CALL.REL 0x50", "EXIT", "EXIT"), 4),
        (("LDG.E R0, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R0, 0x4, PT", "@P0 BRA 0x0", "EXIT"), 4),
        # As one does whose end is called in front of the jump back.
        (("LDG.E R0, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R0, 0x4, PT", "@P0 CALL.REL 0x40", "BRA 0x0", "EXIT"), 4),
    ],
)  # fmt: skip
def test_branches_on_what_memory_holds(lines: tuple[str, ...], issue: int) -> None:
    assert follow(*lines).issue == issue


def test_bytes_waits_and_loads_in_flight_by_operand() -> None:
    x, table = (sass.operand_address(i) for i in range(2))
    counted = follow(
        "LDC.64 R2, c[0x0][0x210]", "LDC.64 R6, c[0x0][0x218]", "S2R R0, SR_TID.X", "IMAD.WIDE.U32 R2, R0, 0x10, R2",
        "LDG.E.128 R8, desc[UR4][R2.64]", "LDG.E.128 R12, desc[UR4][R2.64+0x400]", "FADD R8, R8, R12",
        "LDG.E R16, desc[UR4][R6.64]", "FMUL R8, R8, R16", "STG.E.128 desc[UR4][R2.64], R8", "EXIT",
        parameters=(x, table), thread=5,
    )  # fmt: skip
    assert (counted.loaded, counted.stored) == ({0: 32, 1: 4}, {0: 16})
    assert (counted.waits, counted.near_waits, counted.in_flight) == (1, 1, 32)


def test_a_copy_past_the_end_of_a_loop_reads_nothing() -> None:
    counted = follow(
        "LDC.64 R2, c[0x0][0x210]", "LDGSTS.E.BYPASS.128 [R12], desc[UR4][R2.64]",
        "LDGSTS.E.BYPASS.128 [R12+0x1000], desc[UR4][R2.64+0x40], !PT", "DEPBAR.LE SB0, 0x0", "EXIT",
        parameters=(sass.operand_address(0),),
    )  # fmt: skip
    assert (counted.loaded, counted.lsu, counted.in_flight, counted.waits) == ({0: 16}, 2, 16, 1)
    # Of the thread alone; where copies write, which nobody knows here, is not counted.
    assert (len(counted.copied), warps.clocks_of([counted]).wavefronts) == (2, 1)


@pytest.mark.parametrize(
    ("addresses", "size", "clocks"),
    [
        # Neighbours, from a line's start and from within, all one word, and 16 bytes each.
        ([4 * lane for lane in range(32)], 4, 1),
        ([64 + 4 * lane for lane in range(32)], 4, 1),
        ([400] * 32, 4, 1),
        ([16 * lane for lane in range(32)], 16, 4),
        # Every other word takes its banks twice; a line each, four at a time, in one bank.
        ([8 * lane for lane in range(32)], 4, 2),
        ([128 * lane for lane in range(32)], 4, 32),
        # A line each, in other banks: four at a time, or one by one in one set.
        ([132 * lane for lane in range(31)], 4, 8),
        ([516 * lane for lane in range(31)], 4, 31),
    ],
)
def test_clocks_of_the_first_cache(addresses: list[int], size: int, clocks: int) -> None:
    assert warps.pieces([(address, size) for address in addresses]) == clocks


@pytest.mark.parametrize(
    ("addresses", "size", "clocks"),
    [
        # Neighbours, all one word, every other word, and a row of 32 words each: all in one bank, unless rows are a word longer.
        ([4 * lane for lane in range(32)], 4, 1),
        ([400] * 32, 4, 1),
        ([8 * lane for lane in range(32)], 4, 2),
        ([128 * lane for lane in range(32)], 4, 32),
        ([132 * lane for lane in range(32)], 4, 1),
        # 8 bytes by halves, 16 by quarters of a warp: neighbours, and eight in a row of each thread with a place free or not.
        ([8 * lane for lane in range(32)], 8, 2),
        ([64 * lane for lane in range(32)], 8, 16),
        ([72 * lane for lane in range(32)], 8, 2),
        ([16 * lane for lane in range(32)], 16, 4),
        ([128 * lane for lane in range(32)], 16, 32),
        ([144 * lane for lane in range(32)], 16, 4),
        # Half a warp, and what only some of its threads ask for.
        ([16 * lane for lane in range(16)], 16, 2),
    ],
)
def test_clocks_of_shared_memory(addresses: list[int], size: int, clocks: int) -> None:
    assert warps.bank_clocks({lane: (address, size) for lane, address in enumerate(addresses)}) == clocks


@pytest.mark.parametrize(
    ("lines", "wavefronts", "conflicts"),
    [
        # Sixteen bytes of each thread side by side, then 128 bytes apart; a shuffle; a copy, which writes 32 words apart.
        (("IMAD.SHL.U32 R1, R0, 0x10, RZ", "LDS.128 R4, [R1]"), 4, 0),
        (("IMAD.SHL.U32 R1, R0, 0x80, RZ", "STS.128 [R1+0x40], R4"), 32, 28),
        (("SHFL.BFLY PT, R1, R2, 0x1, 0x1f",), 1, 0),
        (("IMAD.SHL.U32 R1, R0, 0x80, RZ", "LDC.64 R2, c[0x0][0x210]", "IMAD.WIDE.U32 R2, R0, 0x4, R2",
          "LDGSTS.E [R1], desc[UR4][R2.64]"), 1, 31),
        # A matrix of 8 rows for each quarter, 16 bytes a row; and an address that nobody knows.
        (("IMAD.SHL.U32 R1, R0, 0x10, RZ", "LDSM.16.M88.4 R4, [R1]"), 4, 0),
        (("IMAD.SHL.U32 R1, R0, 0x20, RZ", "STSM.16.M88.4 [R1], R4", "STSM.16.M88.4 [R1+0x400], R4"), 16, 8),
        (("LDG.E R1, desc[UR4][R2.64]", "LDS.64 R4, [R1]"), 1 + 2, 0),
    ],
)  # fmt: skip
def test_clocks_and_conflicts_of_a_warp(lines: tuple[str, ...], wavefronts: int, conflicts: int) -> None:
    program = function("S2R R0, SR_TID.X", *lines, "EXIT")
    launched = sass.Launched(struct.pack("<Q", sass.operand_address(0)), 64, (1, 1, 1), (0,))
    warp = [sass.trace(program, "sm_90", launched, thread, (0, 0, 0)) for thread in range(32, 64)]
    assert warps.clocks_of(warp) == (wavefronts, conflicts)
    assert warps.average(program, "sm_90", launched).each["conflicts"] == conflicts


@pytest.mark.parametrize(("indices", "wavefronts"), [((), 2), ((1,), 1 + 16)], ids=["no_index", "by_index"])
def test_a_warp_that_an_index_sends_to_many_rows(indices: tuple[int, ...], wavefronts: float) -> None:
    """Thread i reads word i of a row of 128 bytes, the i-th: 8 clocks, or 16 and 32 where rows lie in two sets or in one."""
    table, index = (sass.operand_address(i) for i in range(2))
    lines = (
        "S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "LDC.64 R4, c[0x0][0x218]", "IMAD.WIDE.U32 R4, R0, 0x4, R4",
        "LDG.E R6, desc[UR4][R4.64]", "IMAD.WIDE.U32 R2, R6, 0x80, R2", "IMAD.WIDE.U32 R2, R0, 0x4, R2",
        "LDG.E R7, desc[UR4][R2.64]", "EXIT",
    )  # fmt: skip
    launched = sass.Launched(struct.pack("<2Q", table, index), 32, (1, 1, 1), (), indices)
    assert warps.average(function(*lines), "sm_90", launched).each["wavefronts"] == wavefronts


@pytest.mark.parametrize(
    ("line", "given", "expected"),
    [
        ("IMAD.HI.U32 R0, R5, 0x80000001, R4", {4: 0, 5: 100}, 150),
        ("IADD3 R0, -R4, R5, RZ", {4: 3, 5: 1}, 0xFFFFFFFE),
        ("LEA.HI R0, R4, R5, RZ, 0x4", {4: 0xF0000000, 5: 1}, 0x10),
        ("SHF.R.S32.HI R0, RZ, 0x1f, R4", {4: 0x80000000}, 0xFFFFFFFF),
        ("SHF.L.U64.HI R0, R4, 0x3, R5", {4: 0xE0000000, 5: 1}, 15),
        ("LOP3.LUT R0, R4, 0xff, R5, 0xe2, !PT", {4: 0x12, 5: 0xFFFFFF80}, 0xFFFFFF12),
        ("PRMT R0, R4, 0x5410, R5", {4: 0xAAAA1111, 5: 0xBBBB2222}, 0x22221111),
        ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", {}, 1),
        ("VIMNMX.U32 R0, R4, R5, PT", {4: 9, 5: 0xFFFFFFFF}, 9),
        ("VIMNMX.U32 R0, PT, PT, R4, 0x1, !PT", {4: 16}, 16),
        ("IMNMX.S64 PT, PT, R0, R4, R6, PT, !PT", {4: 16, 5: 0, 6: 99, 7: 0}, 16),
        ("SGXT R0, R4, 0x5", {4: 0x1F}, 0xFFFFFFFF),
    ],
)
def test_integers(line: str, given: dict[int, int], expected: int) -> None:
    setting = [f"MOV R{register}, {value:#x}" for register, value in given.items()]
    test = (f"ISETP.NE.U32.AND P0, PT, R0, {expected:#x}, PT", "@P0 EXIT", "MUFU.RCP R9, R9", "EXIT")
    assert follow(*setting, line, *test).mufu == 1


def test_a_carry_reaches_the_upper_half() -> None:
    address = (sass.operand_address(1) - 1) & 0xFFFFFFFF, (sass.operand_address(1) - 1) >> 32
    counted = follow(
        f"MOV R4, {address[0]:#x}", f"MOV R5, {address[1]:#x}", "IADD3 R2, P0, PT, R4, 0x1, RZ",
        "IADD3.X R3, PT, PT, R5, RZ, RZ, P0, !PT", "STG.E.64 desc[UR4][R2.64], R8", "EXIT", architecture="sm_100",
    )  # fmt: skip
    assert counted.stored == {1: 8}


def test_no_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "LONGEST", 100)
    with pytest.raises(ValueError, match="still on its way"):
        follow("BRA 0x0", "EXIT")
