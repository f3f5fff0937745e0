"""The static budget: what every launch of the production calls issues, moves and holds on each architecture, by its code.

`python bench/budget.py` writes results/counted/budget.json anew for all of them; `--architectures sm_90` replaces those rows
alone, `--changed` those of ops that have other sources than they had. No GPU, no nvcc: NVRTC and Triton's compiler make the code,
Triton's disassembler shows it. Look at the difference before committing it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cards import CARDS, Card
from cases import Case, Suite
from command_line import suites
from kernel_sources import digest, digests

BASELINE = Path(__file__).parent / "results" / "counted" / "budget.json"
TIERS = ("cuda", "triton")
DTYPES = ("bf16", "fp16", "fp32")
# The card whose launches stand for an architecture; H100 and H200 differ in nothing that launches depend on.
MODELS = {"sm_80": "rtx4090", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtx5090"}
# Operands below this size are read by all blocks, and come from the second cache.
SMALL = 1 << 20
# Of the first cache, what an operand may fill that a multiprocessor is to read from there again.
CACHED_SHARE = 1 / 2
# Of the tables of three axes, looked up by an index: that of the innermost axis, whose rows change from one position to the next.
CHANGING_ROWS = 1 / 3
# Bytes of an operand from which the budget names it.
COUNTED = 64 << 10
REGISTERS = 65536
PACK = 16


class Row(NamedTuple):
    """One launch. Counts are those of a thread for 16 bytes of its result; a launch without one, for 16 bytes that it reads.

    Attributes:
        tier: "cuda" or "triton".
        case: op, case and dtype with blanks between.
        kernel: its name.
        blocks: of the grid.
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block.
        warps: resident ones of a multiprocessor.
        packs: of 16 bytes, of the whole launch, that the counts are for.
        issue: all instructions.
        mufu: of the unit for special functions and 64-bit conversions.
        double: of the unit for fp64.
        lsu: loads and stores of global memory.
        shared: accesses of shared memory, and shuffles.
        wavefronts: clocks that both take in the first cache and in shared memory, by the addresses of a warp's threads.
        conflicts: those of shared memory that another order of what lies there would not take.
        in_flight: 16-byte loads of a thread under way when it first waits.
        waits: times that a thread waits for memory.
        near_waits: times that it waits for the second cache.
        cycles: of a thread without these.
        reads: bytes by operand that the launch asks for, cut at the operand's size.
        again: bytes that it asks for once more, of operands from SMALL on.
        near_again: the same of smaller ones that no first cache holds: they lie in the second.
        window: bytes asked for between the first and the second time.
        writes: bytes.
    """

    tier: str
    case: str
    kernel: str
    blocks: int
    threads: int
    registers: int
    shared_bytes: int
    warps: int
    packs: int
    issue: float
    mufu: float
    double: float
    lsu: float
    shared: float
    wavefronts: float
    conflicts: float
    in_flight: float
    waits: int
    near_waits: int
    cycles: int
    reads: dict[str, int]
    again: int
    near_again: int
    window: int
    writes: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What the row is of."""
        return self.tier, self.case, self.kernel

    @property
    def through(self) -> int:
        """Bytes that the launch reads, reads again and writes."""
        return sum(self.reads.values()) + self.again + self.near_again + self.writes


class Baseline(NamedTuple):
    """All rows by architecture, what they were counted from, and by case the least bytes that a call must move and its FLOP.

    `sources` has by architecture, tier and stem the digest of then, "cuda combine_guidance".
    """

    floors: dict[str, tuple[int, int]]
    rows: dict[str, list[Row]]
    sources: dict[str, dict[str, str]]


def changed(baseline: Baseline, architecture: str, tier: str) -> tuple[str, ...]:
    """The stems whose code is not what the rows were counted from."""
    counted = baseline.sources.get(architecture, {})
    stems = [suite.op for suite in suites()]
    return tuple(stem for stem in stems if counted.get(f"{tier} {stem}") != digest(tier, stem))


def resident_warps(threads: int, registers: int, shared_bytes: int, card: Card) -> int:
    """Warps of a kernel that a multiprocessor of the card holds; shared memory as cubins say it, 1 KiB of the system's included."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    blocks = min(by_registers, card.warps // warps, card.warps // 2)
    if shared_bytes:
        blocks = min(blocks, card.shared_bytes // shared_bytes)
    return max(1, blocks) * warps


def first_cache(shared_bytes: int, blocks: int, card: Card) -> int:
    """Bytes of an operand that a multiprocessor reads again from its first cache: what its blocks leave of shared memory."""
    return int(max(0, card.shared_bytes - blocks * shared_bytes) * CACHED_SHARE)


def row_of(tier: str, case: str, kernel: Any, function: Any, card: Card) -> Row:
    """The row of one launch."""
    import sass
    import warps as of_warp

    far = [index for index, size in enumerate(kernel.operands) if size >= SMALL]
    blocks, warps = math.prod(kernel.grid), -(-kernel.threads // 32)
    launched = sass.Launched(kernel.parameters, kernel.threads, kernel.grid, far, kernel.indices)
    counted, total = of_warp.average(function, card.architecture, launched), blocks * kernel.threads
    # An address that is no operand's is one of another block's shared memory.
    operands = range(len(kernel.operands))
    asked = {index: int(moved * total) for index, moved in counted.loaded.items() if index in operands}
    reads = {index: min(moved, kernel.operands[index]) for index, moved in asked.items()}
    stored = {
        index: min(int(moved * total), kernel.operands[index])
        for index, moved in counted.stored.items()
        if index in operands
    }
    # A thread's own share of its result; where that is next to nothing, of what it reads.
    widest, read = counted.widest
    packs = max(1, (widest * total if 8 * widest >= read else max([PACK, *reads.values()])) // PACK)
    shared = function.shared + kernel.shared_bytes + (1024 if card.architecture == "sm_80" else 0)
    resident = resident_warps(kernel.threads, function.registers, shared, card)
    cached = first_cache(shared, resident // warps, card)
    more = {index: asked[index] - reads[index] for index in asked if kernel.operands[index] > cached}
    again = sum(size for index, size in more.items() if index in far)
    # The index itself is one for all threads of a block.
    near_again = sum(size for index, size in more.items() if index not in far and index not in kernel.indices)
    if kernel.indices:
        near_again = int(near_again * CHANGING_ROWS)
    window = again if "kept_rows" in kernel.numbers else 0
    typical = counted.typical
    return Row(
        *(tier, case, kernel.name, blocks, kernel.threads, function.registers, shared),
        resident,
        packs,
        *(
            float(f"{32 * counted.each[name] * warps * blocks / packs:.4g}")
            for name in (*of_warp.CLASSES, *of_warp.Clocks._fields)
        ),
        typical.in_flight / PACK,
        *(typical.waits, typical.near_waits, typical.cycles),
        {str(index): moved for index, moved in sorted(reads.items()) if moved > COUNTED},
        again,
        near_again,
        window,
        sum(stored.values()),
    )


def production(dtypes: Sequence[str], ops: Sequence[str] = ()) -> Iterator[tuple[Suite, Case, str, Sequence[str]]]:
    """Every production case in its op's own dtype on all tiers, and in the other dtypes the last one of each kind on "cuda"."""
    for suite in (suite for suite in suites() if not ops or suite.op in ops):
        named = [case for case in suite.cases if case.size != "small"]
        kinds = {tuple(sorted(case.options.items(), key=str)): case for case in named}
        for case in named:
            yield from ((suite, case, dtype, TIERS) for dtype in suite.dtypes)
        others = [dtype for dtype in dtypes if dtype in suite.allowed_dtypes and dtype not in suite.dtypes]
        yield from ((suite, case, dtype, TIERS[:1]) for case in kinds.values() for dtype in others)


class Launches(NamedTuple):
    """All launches of an architecture's production calls: tier, case and kernel; and by case the least bytes and the FLOP."""

    found: list[tuple[str, str, Any]]
    floors: dict[str, tuple[int, int]]


def launches_of(architecture: str, tiers: Sequence[str], dtypes: Sequence[str], ops: Sequence[str] = ()) -> Launches:
    """Cases that a tier refuses, or hands to torch, have no launches there."""
    import launches
    from ltxkern.dispatch import BackendError

    card, result = CARDS[MODELS[architecture]], Launches([], {})
    for suite, case, dtype, served in production(dtypes, ops):
        prepared, name = launches.prepare(suite, case, dtype), f"{suite.op} {case.name} {dtype}"
        result.floors[name] = prepared.floor, prepared.call.flops
        for tier in (tier for tier in served if tier in tiers):
            make = launches.of_cuda if tier == "cuda" else launches.of_triton
            try:
                result.found.extend((tier, name, kernel) for kernel in make(prepared.call, card))
            except BackendError:
                continue
        choice = suite.op == "group_norm_silu" and case.options.get("channels_last")
        if choice and "cuda" in tiers and dtype in suite.dtypes:
            # What the choice between the kernels passed over.
            forced = f"{suite.op} {case.name}_two_pass {dtype}"
            result.floors[forced] = result.floors[name]
            result.found.extend(("cuda", forced, kernel) for kernel in launches.of_two_passes(prepared.call, card))
    return result


def rows_of(architecture: str, given: Launches) -> list[Row]:
    """Compiles the CUDA kernels of the launches, and counts."""
    import sass
    from ltxkern.compiled import nvrtc

    kernels: dict[str, list[str]] = {}
    for name in sorted({kernel.name for tier, _, kernel in given.found if tier == "cuda"}):
        kernels.setdefault(nvrtc.header_of(name), []).append(name)
    functions: dict[str, sass.Function] = {}
    for names in kernels.values():
        cubin, mangled = nvrtc.compile_cubin(names, architecture)
        inside = sass.functions(cubin)
        functions |= {name: inside[one] for name, one in zip(names, mangled, strict=True)}
    of_cubin = functools.cache(lambda cubin: next(iter(sass.functions(cubin).values())))
    return [
        row_of(
            tier,
            name,
            kernel,
            of_cubin(kernel.cubin) if kernel.cubin else functions[kernel.name],
            CARDS[MODELS[architecture]],
        )
        for tier, name, kernel in given.found
    ]


def read(path: Path = BASELINE) -> Baseline:
    """The committed budget."""
    data = json.loads(path.read_text())
    names, rows = data["columns"], data["rows"]
    assert tuple(names) == Row._fields
    floors = {case: (moved, flops) for case, (moved, flops) in data["floors"].items()}
    return Baseline(
        floors, {architecture: [Row(*row) for row in rows[architecture]] for architecture in rows}, data["sources"]
    )


def write(baseline: Baseline, path: Path = BASELINE) -> None:
    """One line a launch, so that a difference shows the launches that changed."""
    parts = []
    for architecture, rows in sorted(baseline.rows.items()):
        lines = ",\n".join(f"   {json.dumps(list(row))}" for row in rows)
        parts.append(f'  "{architecture}": [\n{lines}\n  ]')
    floors = ",\n".join(f"  {json.dumps(case)}: {json.dumps(both)}" for case, both in sorted(baseline.floors.items()))
    sources = json.dumps(baseline.sources, indent=1, sort_keys=True).replace("\n", "\n ")
    head = f'"columns": {json.dumps(Row._fields)},\n "sources": {sources},\n "floors": {{\n{floors}\n }}'
    path.write_text("{\n " + head + ',\n "rows": {\n' + ",\n".join(parts) + "\n }\n}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python bench/budget.py`."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--architectures", default=",".join(MODELS), help=f"of {', '.join(MODELS)} (default: all)")
    options.add_argument(
        "--ops", help="replace the rows of these alone (default: all); with --changed of those among them"
    )
    options.add_argument(
        "--changed", action="store_true", help="replace the rows of what has other sources than they had"
    )
    options.add_argument("--output", type=Path, default=BASELINE)
    parsed = options.parse_args(arguments)
    known = read() if BASELINE.exists() else Baseline({}, {}, {})
    named = parsed.ops.split(",") if parsed.ops else ()
    if unknown := [op for op in named if op not in {suite.op for suite in suites()}]:
        options.error(f"--ops: no {', '.join(unknown)}; there are {', '.join(suite.op for suite in suites())}")
    for architecture in parsed.architectures.split(","):
        if architecture not in MODELS:
            options.error(f"--architectures: {architecture!r} is none of {', '.join(MODELS)}")
        ops = named
        if parsed.changed:
            other = {op for tier in TIERS for op in changed(known, architecture, tier)}
            ops = sorted(other.intersection(named) if named else other)
            if not ops:
                continue
        given = launches_of(architecture, TIERS, DTYPES, ops)
        counted = rows_of(architecture, given)
        kept = [row for row in known.rows.get(architecture, ()) if ops and row.case.split(" ")[0] not in ops]
        floors = {case: floor for case, floor in known.floors.items() if ops and case.split(" ")[0] not in ops}
        rows = sorted([*kept, *counted], key=lambda row: (row.case, row.tier))
        sources = known.sources.get(architecture, {}) | digests(ops or [suite.op for suite in suites()])
        known = Baseline(
            floors | given.floors, {**known.rows, architecture: rows}, {**known.sources, architecture: sources}
        )
        write(known, parsed.output)
        print(f"{architecture}: {len(counted)} launches", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
