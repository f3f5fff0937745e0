"""What the CUDA kernels issue, hold and move stays within the committed budget, and the budget within the goals.

sm_90 is compiled every time, each kernel in the dtypes that its op runs in and followed through its shortest call. Of the other
architectures, and on the Triton tier, a part is that the sources pick: all come round as these change. `python bench/budget.py`
counts everything.
"""

from __future__ import annotations

import struct
from typing import Any

import budget
import pytest
import sass
from cards import CARDS
from command_line import suites

from ltxkern import sources
from ltxkern.compiled import nvrtc

# Another version of a compiler may take a few more.
SLACK = 1.03
COUNTS = ("issue", "mufu", "double", "lsu", "shared", "wavefronts", "waits", "through")
# Instructions for 16 bytes of bf16 on sm_90, at most: beyond it instructions bind before bytes do.
GOALS = {
    "ltxk::rms_norm_modulate_packs<ltxk::bf16, ltxk::bf16, false>": 95,
    "ltxk::rms_norm_modulate_packs<ltxk::bf16, ltxk::bf16, true>": 145,
    "ltxk::qk_norm_rope_packs<ltxk::bf16, float, 0>": 115,
    "ltxk::qk_norm_rope_packs<ltxk::bf16, float, 1>": 115,
    "ltxk::qk_norm_rope_packs<ltxk::bf16, float, 3>": 115,
    "ltxk::qk_norm_rope_packs<ltxk::bf16, ltxk::bf16, 0>": 115,
    "ltxk::gated_residual_packs<ltxk::bf16, ltxk::bf16>": 75,
    "ltxk::head_gate_packs<ltxk::bf16, ltxk::bf16>": 80,
    "ltxk::pixel_norm_rows<ltxk::bf16, 8>": 100,
}
# The same of GroupNorm's passes, where a thread has at least LONG packs and there is no residual. On chip one launch does both.
NORM_GOALS = {
    "stats<": 60,
    "apply<": 80,
    "stats_columns<": 60,
    "apply_columns<": 80,
    "resident<": 140,
    "pipeline<": 185,
}
LONG = 12
ROW_KERNELS = ("rms_norm_modulate_packs", "gated_residual_packs", "head_gate_packs", "qk_norm_rope_packs")
BASELINE = budget.read()
OTHERS = sorted(BASELINE.rows.keys() - {"sm_90"})


def worse(rows: list[budget.Row], known: list[budget.Row]) -> list[str]:
    """In words, what is worse than the baseline; a launch that is not in it too."""
    before: dict[tuple[str, str, str], list[budget.Row]] = {}
    for row in known:
        before.setdefault(row.key, []).append(row)
    found = []
    for row in rows:
        if not before.get(row.key):
            found.append(f"{row.key} is not in the budget: run python bench/budget.py")
            continue
        old = before[row.key].pop(0)
        found += [
            f"{row.key}: {name} {getattr(row, name)}, {getattr(old, name)} in the budget"
            for name in COUNTS
            if getattr(row, name) > SLACK * getattr(old, name) + 0.01
        ]
        if row.warps < old.warps or row.in_flight < old.in_flight or row.registers > old.registers + 8:
            found.append(
                f"{row.key}: {row.registers} registers, {row.warps} warps, {row.in_flight} loads; it was {old}"
            )
    return found


def compilers_missing(tier: str) -> str | None:
    if sass.tool("cuobjdump") is None:
        return "no cuobjdump; triton brings one"
    try:
        nvrtc._nvrtc().getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return None if tier == "triton" else str(error)
    return None


PICK = int(sources.digest(nvrtc.include_directory() / "ltxkern"), 16)
# Of an op's stem two that the sources pick; merge_lora takes seconds to compile, and tensor cores are not counted.
STEMS = [suite.op for suite in suites() if suite.op != "merge_lora"]
PICKED = tuple(STEMS[(PICK + shift) % len(STEMS)] for shift in (0, 4))


def shortest(given: budget.Launches, known: list[budget.Row]) -> budget.Launches:
    """Of the launches of each kernel of an op in a dtype the one that takes the fewest cycles by the budget."""
    cycles: dict[tuple[str, str, str], int] = {}
    for row in known:
        cycles.setdefault(row.key, row.cycles)
    best: dict[tuple[str, str, str, str], tuple[str, str, Any]] = {}
    for tier, case, kernel in given.found:
        op, _, dtype = case.split(" ")
        key, length = (tier, op, dtype, kernel.name), cycles.get((tier, case, kernel.name), 0)
        if key not in best or length < cycles.get((tier, best[key][1], kernel.name), 0):
            best[key] = tier, case, kernel
    return given._replace(found=list(best.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "tier", "dtypes", "ops"),
    [
        ("sm_90", "cuda", (), tuple(STEMS)),
        (OTHERS[PICK % len(OTHERS)], "cuda", budget.DTYPES, PICKED),
        ("sm_90", "triton", (), PICKED),
    ],
    ids=["sm_90", "another", "triton"],
)
def test_nothing_is_worse_than_the_budget(
    architecture: str, tier: str, dtypes: tuple[str, ...], ops: tuple[str, ...]
) -> None:
    if reason := compilers_missing(tier):
        pytest.skip(f"INSTRUCTIONS NOT COUNTED: {reason}")
    given = budget.launches_of(architecture, (tier,), dtypes, ops)
    assert given.floors.items() <= BASELINE.floors.items()
    known = [row for row in BASELINE.rows[architecture] if row.tier == tier]
    rows = budget.rows_of(architecture, shortest(given, known))
    assert {row.case.split(" ")[0] for row in rows} == {*ops}
    assert worse(rows, known) == []


def test_the_budget_is_within_the_goals() -> None:
    # A row index costs a few more.
    rows = [row for row in BASELINE.rows["sm_90"] if row.kernel in GOALS and "two_rows" not in row.case]
    assert {row.kernel for row in rows} >= GOALS.keys()
    assert [row.key for row in rows if row.issue > GOALS[row.kernel]] == []


def test_group_norm_is_within_its_goals() -> None:
    found: dict[str, list[budget.Row]] = {}
    for row in BASELINE.rows["sm_90"]:
        name = row.kernel.removeprefix("ltxk::group_norm_").removesuffix("ltxk::bf16, 8>")
        if name in NORM_GOALS and "residual" not in row.case and row.packs >= LONG * row.blocks * row.threads:
            found.setdefault(name, []).append(row)
    assert found.keys() == NORM_GOALS.keys()
    assert [row.key for name, rows in found.items() for row in rows if row.issue > NORM_GOALS[name]] == []


@pytest.mark.parametrize("architecture", budget.MODELS)
def test_row_kernels_leave_room_for_32_warps(architecture: str) -> None:
    rows = [row for row in BASELINE.rows[architecture] if any(name in row.kernel for name in ROW_KERNELS)]
    assert {row.case.split(" ")[2] for row in rows} == {"bf16", "fp16", "fp32"}
    assert [row.key for row in rows if row.warps < 32] == []


def test_a_step_backwards_is_seen() -> None:
    rows = BASELINE.rows["sm_90"]
    assert worse(rows, rows) == []
    first = rows[0]
    for change in (
        {"issue": 1.1 * first.issue},
        {"waits": first.waits + 9},
        {"warps": 8},
        {"in_flight": 0},
        {"again": first.again + first.through // 10},
        {"reads": first.reads | {"0": first.through}},
        {"writes": first.writes + first.through // 10},
        {"kernel": "other"},
    ):
        assert len(worse([first._replace(**change)], rows)) == 1, change


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "card", "warps"),
    [(256, 64, 0, "h200", 32), (512, 64, 231 << 10, "h200", 16), (128, 32, 0, "h200", 64), (128, 32, 0, "rtx4090", 48),
     (256, 125, 1024, "h200", 16), (32, 16, 0, "h200", 32)],
)  # fmt: skip
def test_resident_warps(threads: int, registers: int, shared: int, card: str, warps: int) -> None:
    assert budget.resident_warps(threads, registers, shared, CARDS[card]) == warps


def test_tables_that_queries_and_keys_share_are_one_operand() -> None:
    found = budget.launches_of("sm_90", ("cuda",), (), ("qk_norm_rope",)).found
    place = {sass.operand_address(index): index for index in range(12)}
    tables = {
        case.split(" ")[1]: [place[word] for (word,) in struct.iter_unpack("<Q", kernel.parameters) if word in place]
        for _, case, kernel in found
    }
    assert tables["stage2_video"] == [0, 1, 5, 2, 3, 6, 7, 11, 2, 3]
    assert tables["stage2_video_to_audio"] == [0, 1, 5, 2, 3, 4, 6, 7, 11, 8, 9, 10]
