"""The model behind the predictions: a launch takes as long as what binds it, a call as long as its launches. No figure is measured.

The time of a launch is that of its limits taken together, (sum of t^8)^(1/8), for two that are as long do not overlap whole:

- bytes: what has to come from memory or go there, at the rate of a copy. What the launch before left in half of the second cache
  costs nothing, nor does what a launch reads again while it still lies there.
- issue: instructions of all warps at 4 a clock and multiprocessor, of which few warps fill a smaller part.
- MUFU, fp64, LSU or shared: the same of their units, of which 9 tenths are reached. An access of a warp takes what the addresses
  of its threads cost: in a clock the first cache looks up lines of four different sets, and what is found in them passes as one
  word of each of 32 banks; shared memory gives one word of each bank.
- L2: all bytes at the rate of the second cache, but for what blocks read again of operands that fill no more than half of the first
  cache, which is what they leave of shared memory. Of tables that an index looks up, the rows of one axis of three are read again.
- FLOP: matrix products, at the rate of a large one; of the older matrix instructions two thirds of that.
- latency: blocks one after the other on a multiprocessor, each as long as one thread alone needs: Little's law by another name.

Blocks that do not divide evenly among the multiprocessors lengthen issue and the units'. To this come the launch, the wait for the
first byte, where not all blocks fit at once half a block's life in which the last ones run out (waves), and where all blocks wait
for one another between two passes a load from memory and four from the second cache (barrier). What it takes to zero the few
counters that such blocks wait at is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from budget import Row
from cards import Card

POWER = 8
# Of the issue slots: 0.62 with 16 warps, 0.78 with 32 and 0.85 from 48 on, as an earlier review of these kernels took it.
MOST_ISSUED, SLOPE, HALF_WARPS = 0.85, 1.05, 11
UNITS_REACHED = 0.9
# Between two dependent launches of a stream.
LAUNCH_US = 1.5
# Bytes a clock and multiprocessor, of an H100's 5.5 TB/s; and at least this many times what a copy moves, all of which passes it.
L2_RATE, L2_OVER_COPY = 5.5e12 / (132 * 1.755e9), 1.3
L2_LATENCY_NS = 160
OLDER_MATRIX = 2 / 3
# Warp instructions a clock and multiprocessor.
ISSUED, SPECIAL, WAVEFRONTS = 4, 0.5, 1
# Launches all of whose blocks wait for one another, with nothing else to do.
WAITING = ("ltxk::group_norm_columns<",)
TARGETS = {"h200": 85, "h100": 90}


class Limit(NamedTuple):
    """One of the limits of a launch or call, in microseconds."""

    name: str
    time_us: float


class Launched(NamedTuple):
    """One launch: its limits, and its bytes from and to memory and the second cache."""

    limits: Sequence[Limit]
    memory: int
    through: int


class Counted(NamedTuple):
    """What the machine code of a call says of itself, as Prediction; None of all where nobody counted it."""

    instructions_per_16_bytes: float | None
    warps: int | None
    loads_in_flight: float | None


@dataclass(frozen=True)
class Prediction:
    """One call on one card.

    Args:
        percent_of_roof: the least time of its bytes (or FLOP) over the predicted one.
        best_percent: what one launch that nothing but its bytes limits would reach.
        limit: what takes longest.
        moved: bytes from and to memory.
        instructions_per_16_bytes, warps, loads_in_flight: None where the machine code is a library's.
        launches: of the call; `launched_percent` is what as many would reach that nothing but their bytes limits.
        products_us: of its FLOP at the rate of a large product, bytes_us of its bytes at that of a copy.
        through: bytes from and to the second cache.
        limits: microseconds of each limit by name, of all launches.
    """

    op: str
    case: str
    dtype: str
    tier: str
    card: str
    percent_of_roof: float
    best_percent: float
    launched_percent: float
    limit: str
    instructions_per_16_bytes: float | None
    time_us: float
    bytes: int
    moved: int
    roof: float
    warps: int | None
    loads_in_flight: float | None
    launches: int
    bytes_us: float
    products_us: float
    through: int
    limits: Mapping[str, float]

    @property
    def misses(self) -> bool:
        """Whether it is below the target of its card though a kernel could be above."""
        return self.percent_of_roof < min(TARGETS.get(self.card, 0), self.best_percent - 1)


def issue_efficiency(warps: int) -> float:
    """The part of the issue slots that so many resident warps fill."""
    return min(MOST_ISSUED, SLOPE * warps / (warps + HALF_WARPS))


def l2_rate(card: Card) -> float:
    """Bytes a second of the second cache."""
    return max(L2_RATE * card.multiprocessors * card.clock_ghz * 1e9, L2_OVER_COPY * card.roof)


def memory_bytes(row: Row, card: Card, left: Iterable[int]) -> int:
    """From and to memory; `left`: sizes of what the launch before read or wrote."""
    kept, held = card.l2_bytes // 2, list(left)
    reads = 0
    for size in row.reads.values():
        if size in held:
            held.remove(size)
            reads += max(0, size - kept)
        else:
            reads += size
    missed = row.again * max(0.0, 1 - kept / row.window) if row.window else 0.0
    return reads + int(missed) + row.writes


def limits_of(row: Row, card: Card, memory: int, flops: int = 0) -> list[Limit]:
    """The limits of one launch that moves so many bytes from and to memory."""
    clock, per_warp = card.clock_ghz * 1e3, row.packs / 32
    waves = row.blocks / (card.multiprocessors * max(1, row.warps * 32 // row.threads))
    share = row.blocks / card.multiprocessors
    uneven = math.ceil(share) / share

    def unit(counted: float, rate: float) -> float:
        return uneven * counted * per_warp / (card.multiprocessors * clock * rate)

    life = (row.waits * card.latency_ns + row.near_waits * L2_LATENCY_NS) / 1e3 + row.cycles / clock
    accesses = "shared" if row.wavefronts > 8 * row.lsu else "LSU"
    matrix = card.matrix_rate * (
        1 if row.tier == "triton" or card.architecture in ("sm_80", "sm_120") else OLDER_MATRIX
    )
    return [
        Limit("bytes", memory / card.roof * 1e6),
        Limit("issue", unit(row.issue, ISSUED * issue_efficiency(row.warps))),
        Limit("MUFU", unit(row.mufu, SPECIAL * UNITS_REACHED)),
        Limit("fp64", unit(row.double, card.double_lanes / 32 * UNITS_REACHED)),
        Limit(accesses, unit(row.wavefronts, WAVEFRONTS * UNITS_REACHED)),
        Limit("L2", row.through / l2_rate(card) * 1e6),
        Limit("FLOP", flops / matrix * 1e6),
        Limit("latency", max(1.0, waves) * life),
        Limit("launch", LAUNCH_US + card.latency_ns / 1e3),
        Limit("waves", life / 2 if waves > 1 else 0.0),
        Limit("barrier", (card.latency_ns + 4 * L2_LATENCY_NS) / 1e3 if row.kernel.startswith(WAITING) else 0.0),
    ]


ADDED = ("launch", "waves", "barrier")


def together(limits: Sequence[Limit]) -> float:
    """The time of a launch from its limits."""
    norm = sum(limit.time_us**POWER for limit in limits if limit.name not in ADDED) ** (1 / POWER)
    return float(norm + sum(limit.time_us for limit in limits if limit.name in ADDED))


def predict(rows: Sequence[Row], floor: tuple[int, int], card: Card) -> Prediction:
    """One call of all its launches."""
    left: list[int] = []
    memory: list[int] = []
    heavy = max(range(len(rows)), key=lambda i: rows[i].packs * rows[i].issue)
    for row in rows:
        memory.append(memory_bytes(row, card, left))
        # A launch that moves little pushes nothing out.
        if sum(row.reads.values()) + row.writes > card.l2_bytes // 8:
            left = []
        left += [*row.reads.values(), row.writes]
    # Every tensor passes once, those too whose addresses come from memory.
    memory[heavy] += max(0, floor[0] - sum(memory))
    launches = [
        Launched(limits_of(row, card, memory[i], floor[1] if i == heavy else 0), memory[i], row.through)
        for i, row in enumerate(rows)
    ]
    packs = max(row.packs for row in rows)
    issued = round(sum(row.issue * row.packs for row in rows) / packs, 1)
    op, case, dtype = rows[heavy].case.split(" ")
    counted = Counted(issued, rows[heavy].warps, rows[heavy].in_flight)
    return of_call((op, case, dtype, rows[heavy].tier), card, floor, launches, counted)


def of_call(
    named: tuple[str, str, str, str],
    card: Card,
    floor: tuple[int, int],
    launches: Sequence[Launched],
    counted: Counted,
) -> Prediction:
    """A call by op, case, dtype and tier, of the least bytes and FLOP of `floor`."""
    totals: dict[str, float] = {}
    for launch in launches:
        for limit in launch.limits:
            totals[limit.name] = totals.get(limit.name, 0.0) + limit.time_us
    time = sum(together(launch.limits) for launch in launches)
    bytes_us, products_us = floor[0] / card.roof * 1e6, floor[1] / card.matrix_rate * 1e6
    least = max(bytes_us, products_us)
    one_launch = LAUNCH_US + card.latency_ns / 1e3
    return Prediction(
        *(*named, card.name),
        percent_of_roof=round(100 * least / time, 1),
        best_percent=round(100 * least / (least + one_launch), 1),
        launched_percent=round(100 * least / (least + len(launches) * one_launch), 1),
        limit=max(totals, key=lambda name: totals[name]),
        instructions_per_16_bytes=counted.instructions_per_16_bytes,
        time_us=round(time, 2),
        bytes=floor[0],
        moved=sum(launch.memory for launch in launches),
        roof=card.roof,
        warps=counted.warps,
        loads_in_flight=counted.loads_in_flight,
        launches=len(launches),
        bytes_us=round(bytes_us, 2),
        products_us=round(products_us, 2),
        through=sum(launch.through for launch in launches),
        limits={name: round(taken, 2) for name, taken in totals.items()},
    )
