"""One thread of a GPU kernel followed through its machine code, on no GPU: what its warp issues, and what it waits for.

Integers, addresses and predicates are computed; what comes from global or shared memory is unknown, and so is all that follows from
it. A branch on something unknown is a slow path or a wait, and the way that avoids calls and ends loops is taken. So the counts are
those of the launch at hand: its trips, its dtypes, its absent operands.
"""

from __future__ import annotations

import functools
import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from operands import Decoded, Operand, Step, Value, parse
from semantics import LATENCIES, evaluate, unknown

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_GLOBAL = ("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "LDGSTS")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS")
_STORES = ("STG", "ST", "STS", "STSM", "RED")
_BY_PREDICATES = (*_STORES, "EXIT", "BRA", "ISETP", "FSETP", "DSETP", "PLOP3")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Of the constant bank: where the parameters, the block's threads and the grid's blocks stand.
_BANKS = {
    "sm_80": (0x160, 0x0, 0xC),
    "sm_90": (0x210, 0x0, 0xC),
    "sm_100": (0x380, 0x360, 0x370),
    "sm_120": (0x380, 0x360, 0x370),
}
LONGEST = 400_000
# Blocks of so many instructions a thread walk the whole tensor, and are alike.
LONG = 4000


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; the name split at its dots."""

    address: int
    guard: Operand | None
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def width(self) -> int:
        """Bytes of a memory access of one thread; of a matrix those of the row that a thread names."""
        if self.name in ("LDSM", "STSM"):
            return 16
        return next((_WIDTHS[part] for part in reversed(self.modifiers) if part in _WIDTHS), 4)

    @functools.cached_property
    def decoded(self) -> Decoded:
        """Its parts."""
        return Decoded(self.name, self.modifiers, self.operands)

    @functools.cached_property
    def unknown(self) -> Mapping[str, Value] | None:
        """What it writes, where nobody can know it."""
        return unknown(self.decoded)

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """Registers that it needs: of its operands all but a destination, and its guard."""
        name = self.name[1:] if self.name[0] == "U" else self.name
        stores = name in _STORES
        pairs = (
            name[0] == "D"
            or "F64" in self.modifiers[1:2]
            or (name != "SHF" and {"64", "S64", "U64"} & {*self.modifiers})
        )
        names: set[str] = set()
        for place, operand in enumerate(self.operands):
            count = 1
            if stores:
                count = max(1, self.width // 4)
            elif name.endswith("MMA") and name != "HFMA2":
                count = 2 if place == 2 else 4
            elif pairs or ("WIDE" in self.modifiers and place >= 3):
                count = 2
            if place or name in _BY_PREDICATES or operand.memory:
                names.update(operand.registers(1 if operand.kind == "P" else count))
        if self.guard is not None:
            names.update(self.guard.registers(1))
        return frozenset(names)


def tool(name: str) -> Path | None:
    """A program of the CUDA toolkit as Triton brings it, or None."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return path if path.is_file() else None


class Function(NamedTuple):
    """A kernel of a cubin; `shared` is static."""

    instructions: tuple[Instruction, ...]
    registers: int
    local: int
    shared: int


def instruction(line: str) -> Instruction | None:
    """One line as cuobjdump prints it; None for padding, and for what is no instruction."""
    match = _LINE.match(line)
    if match is None or match[3] == "NOP":
        return None
    name, *modifiers = match[3].split(".")
    operands = tuple(parse(part) for part in split_operands(match[4]))
    return Instruction(int(match[1], 16), parse(match[2]) if match[2] else None, name, tuple(modifiers), operands)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(cubin: bytes) -> dict[str, Function]:
    """Every kernel of a cubin by its mangled name."""
    program = tool("cuobjdump")
    assert program is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(program, "--dump-sass", file.name)
        usage = _output(program, "--dump-resource-usage", file.name)
    lines: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if "Function :" in line:
            lines[line.split(":", 1)[1].strip()] = current = []
        elif (one := instruction(line)) is not None:
            current.append(one)
    rows = {name: tuple(map(int, numbers)) for name, *numbers in _RESOURCES.findall(usage)}
    return {
        name: Function(tuple(body), rows[name][0], rows[name][1] + rows[name][3], rows[name][2])
        for name, body in lines.items()
    }


def split_operands(text: str) -> list[str]:
    """Operands of a line: what commas or, behind a return's register, a blank separate."""
    return [part for piece in text.split(",") for part in piece.strip().split(" ") if part]


@dataclass
class Counts:
    """What one warp issues, and what one thread of it moves and waits for.

    Attributes:
        issue: all instructions.
        mufu: those of the unit for special functions and 64-bit conversions.
        double: those of the unit for 64-bit arithmetic.
        lsu: loads and stores of global memory.
        shared: accesses of shared memory and shuffles.
        shuffles: those among them.
        loaded: bytes of a thread by operand (None: at an address that memory gave).
        stored: the same of stores.
        waits: loads from memory that had to come before anything later could be asked for.
        near_waits: the same where all that it waited for lies in the second cache.
        in_flight: bytes of a thread asked for when it first waits, at most.
        cycles: of the thread alone, were memory at no distance.
        touched: of its accesses of global memory in order: the instruction's address, where it reads or writes, and bytes.
        shared_touched: the same of shared memory.
        copied: of what asynchronous copies write there.
    """

    issue: int = 0
    mufu: int = 0
    double: int = 0
    lsu: int = 0
    shared: int = 0
    shuffles: int = 0
    loaded: dict[int | None, int] = field(default_factory=dict)
    stored: dict[int | None, int] = field(default_factory=dict)
    waits: int = 0
    near_waits: int = 0
    in_flight: int = 0
    cycles: int = 0
    touched: list[tuple[int, int | None, int]] = field(default_factory=list)
    shared_touched: list[tuple[int, int | None, int]] = field(default_factory=list)
    copied: list[tuple[int, int | None, int]] = field(default_factory=list)


class Launched(NamedTuple):
    """What a thread sees of its launch.

    Attributes:
        far: the operands that come from memory, and from no cache.
        indices: the operands whose elements are indices.
    """

    parameters: bytes
    threads: int
    grid: tuple[int, int, int]
    far: Collection[int]
    indices: Collection[int] = ()


# Distinct, and far apart: the operand of an address is what lies above these bits.
OPERAND_SHIFT = 40


def operand_address(index: int) -> int:
    """Where the call's index-th tensor is taken to lie."""
    return (index + 1) << OPERAND_SHIFT


class Indices(dict[int, int]):
    """Indices by their address, so far apart in the order in which they are met: each at another address is another one."""

    def __init__(self, apart: int) -> None:
        super().__init__()
        self.apart = apart

    def __missing__(self, address: int) -> int:
        self[address] = self.apart * len(self)
        return self[address]


class _Thread:
    """The state of a thread on its way."""

    def __init__(self, architecture: str, launched: Launched, thread: int, block: tuple[int, ...]) -> None:
        at_parameters, at_threads, at_grid = _BANKS[architecture]
        self.bank: dict[int, int] = {}
        padded = launched.parameters + bytes(-len(launched.parameters) % 4)
        for i, (word,) in enumerate(struct.iter_unpack("<I", padded)):
            self.bank[at_parameters + 4 * i] = word
        for i, number in enumerate((launched.threads, 1, 1)):
            self.bank[at_threads + 4 * i] = number
        for i, number in enumerate(launched.grid):
            self.bank[at_grid + 4 * i] = number
        self.special = {"SR_TID.X": thread, "SR_LANEID": thread % 32}
        self.special |= {f"SR_CTAID.{axis}": number for axis, number in zip("XYZ", block, strict=True)}
        self.values: dict[str, Value] = {}
        self.ready: dict[str, int] = {}
        # By register: bytes on their way, and whether they come from memory.
        self.pending: dict[str, tuple[int, bool]] = {}


def trace(
    function: Function,
    architecture: str,
    launched: Launched,
    thread: int,
    block: tuple[int, ...],
    known: Indices | None = None,
) -> Counts:
    """Follow one thread from the entry to its end; without `known` all indices are zero.

    Raises:
        ValueError: it does not come to an end.
    """
    addresses = [one.address for one in function.instructions]
    state, counts = _Thread(architecture, launched, thread, block), Counts()
    found = Indices(0) if known is None else known
    at, clock = 0, 0
    for _ in range(LONGEST):
        if at >= len(function.instructions):
            return counts
        one = function.instructions[at]
        counts.issue += 1
        guard: Value = True if one.guard is None else one.guard.truth(state.values)
        if one.name == "DEPBAR" or (state.pending and not one.reads.isdisjoint(state.pending)):
            if any(is_far for _, is_far in state.pending.values()):
                counts.waits += 1
            elif state.pending:
                counts.near_waits += 1
            counts.in_flight = max(counts.in_flight, sum(size for size, _ in state.pending.values()))
            state.pending.clear()
        clock += 1
        for register in one.reads:
            if (ready := state.ready.get(register, 0)) > clock:
                clock = ready
        counts.cycles = clock
        where = _count(one, counts, state, guard)
        follow = _flow(one, guard, state, function.instructions, at)
        if follow == END:
            return counts
        if follow is not None:
            # A target may be padding.
            at = bisect_left(addresses, follow)
            continue
        at += 1
        if one.name in FLOW or guard is False or not one.operands:
            continue
        if one.unknown is None:
            results: Mapping[str, Value] = evaluate(Step(one.decoded, state.values, state.bank, state.special))
        else:
            results = one.unknown
        if one.name in ("LDG", "LD"):
            results = dict(results)
            first, count = one.operands[0], max(1, one.width // 4)
            for i, register in enumerate(first.registers(count)):
                state.pending[register] = one.width // count, where in launched.far
                results[register] = None
                if where in launched.indices:
                    results[register] = found[counts.touched[-1][1] or 0] if i == 0 else 0
        state.values.update(results if guard is True else dict.fromkeys(results))
        state.ready.update(dict.fromkeys(results, clock + LATENCIES.get(one.name, 5)))
    raise ValueError(f"still on its way after {LONGEST} instructions")


def _count(one: Instruction, counts: Counts, state: _Thread, guard: Value) -> int | None:
    """Add an instruction; the operand that it reads or writes in global memory, where that is known."""
    name = one.name
    if name == "MUFU" or (name in ("F2F", "I2F", "F2I") and any("64" in part for part in one.modifiers)):
        counts.mufu += 1
    elif name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
        counts.double += 1
    if guard is False:
        return None
    if name == "SHFL" or name in _SHARED:
        counts.shared += 1
        counts.shuffles += name == "SHFL"
    if name in _SHARED or name == "LDGSTS":
        place = next(operand for operand in one.operands if operand.memory)
        touched = counts.copied if name == "LDGSTS" else counts.shared_touched
        touched.append((one.address, place.offset(state.values), one.width))
    if name not in _GLOBAL:
        return None
    counts.lsu += 1
    if name == "LDGSTS" and one.operands[-1].truth(state.values) is False:
        # It writes zeros and reads nothing: a loop asks ahead, past its end.
        return None
    address = next((operand for operand in reversed(one.operands) if operand.memory), None)
    known = None if address is None else address.address(state.values)
    counts.touched.append((one.address, known, one.width))
    moved = counts.stored if name in ("STG", "ST", "RED", "ATOM", "ATOMG") else counts.loaded
    where = None if known is None else (known >> OPERAND_SHIFT) - 1
    moved[where] = moved.get(where, 0) + one.width
    if name == "LDGSTS":
        state.pending[f"copy {len(state.pending)}"] = one.width, True
    return where


END = -1
FLOW = (
    "BRA",
    "CALL",
    "RET",
    "EXIT",
    "BSSY",
    "BSYNC",
    "BREAK",
    "WARPSYNC",
    "BAR",
    "DEPBAR",
    "LDGDEPBAR",
    "MEMBAR",
    "ERRBAR",
)


def _flow(one: Instruction, guard: Value, state: _Thread, instructions: Sequence[Instruction], at: int) -> int | None:
    """The address that follows, END, or None for the next instruction."""
    if one.name == "EXIT":
        return END if guard is True else None
    if one.name == "RET":
        back = one.operands[0].number(state.values, state.bank)
        return back if guard is not False and isinstance(back, int) else END
    if one.name not in ("BRA", "CALL") or guard is False or "DIV" in one.modifiers:
        return None
    condition: Value = guard
    for operand in one.operands[:-1]:
        truth = operand.truth(state.values)
        condition = None if None in (condition, truth) else condition and truth
    target = one.operands[-1].immediate
    assert target is not None
    if condition is None:
        if one.name == "CALL" or target <= one.address:
            # What is called in front of a jump back is the end of a loop.
            after = instructions[at + 1]
            back = after.operands[-1].immediate if after.name == "BRA" and after.guard is None else None
            return target if one.name == "CALL" and back is not None and back <= one.address < target else None
        between = [other for other in instructions[at + 1 :] if other.address < target]
        condition = any(other.name in ("CALL", "NANOSLEEP") for other in between)
    return target if condition else None
