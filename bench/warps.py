"""A warp of a GPU kernel: what its threads count together, and in how many pieces their accesses pass the first cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sass import LONG, Counts, Function, Indices, Launched, trace

LINE, WORD, BANKS = 128, 4, 32
# Lines that the first cache looks up in a clock, each of another set, and so many of its sectors.
SETS = 4
# How far apart indices may be: their rows then begin in every bank that rows of an odd number of words can begin in.
APART = range(1, 9)


def pieces(accesses: Iterable[tuple[int, int]]) -> int:
    """Clocks that one access of a warp takes in the first cache, by address and bytes of each thread.

    In a clock it looks up lines of four different sets, in the order of the threads; what is found in these passes as one word of
    each of 32 banks in a clock. Source: NVIDIA's engineers on the tag stage and the data stage of L1TEX, from Volta on
    (forums.developer.nvidia.com, topics 49571, 242776 and 312884).
    """
    lines: dict[int, set[int]] = {}
    for address, size in accesses:
        for word in range(address // WORD, -(-(address + size) // WORD)):
            lines.setdefault(word * WORD // LINE, set()).add(word % BANKS)
    clocks = 0
    while lines:
        together: dict[int, int] = {}
        for line in lines:
            together.setdefault(line % SETS, line)
        banks = Counter(bank for line in together.values() for bank in lines.pop(line))
        clocks += max(banks.values())
    return clocks


Accesses = dict[tuple[int, int], list[tuple[int, int]]]


def _accesses(warp: Sequence[Counts]) -> Accesses:
    """Address and bytes of each thread, by instruction and how often it came before."""
    found: Accesses = {}
    for thread in warp:
        times: Counter[int] = Counter()
        for instruction, address, size in thread.touched:
            if address is not None:
                found.setdefault((instruction, times[instruction]), []).append((address, size))
            times[instruction] += 1
    return found


def scattered(warps: Sequence[Sequence[Counts]]) -> float:
    """What `pieces` of a warp's accesses are more than one thread tells, who takes them to be of neighbours.

    Of those whose addresses are others when rows lie at other distances; `warps`: the same warp at each of these.
    """
    each = [_accesses(warp) for warp in warps]
    by_index = [key for key in each[0] if any(one.get(key) != each[0][key] for one in each)]
    pairs = ((one[key], one[key][0][1]) for one in each for key in by_index if key in one)
    return sum(max(0, pieces(access) - max(1, size // WORD)) for access, size in pairs) / len(each)


class Average(NamedTuple):
    """Counts of a block's warps; of loads and stores those of neighbouring blocks, which may have different operands.

    Attributes:
        each: instructions of a warp by class.
        loaded: bytes of a thread by operand.
        stored: the same of stores.
        widest: the most bytes that a thread stores to, and loads from, one operand.
        typical: of a warp that is not the block's first.
    """

    each: dict[str, float]
    loaded: dict[int, float]
    stored: dict[int, float]
    widest: tuple[int, int]
    typical: Counts


CLASSES = ("issue", "mufu", "double", "lsu", "shared", "wavefronts")


def average(function: Function, architecture: str, launched: Launched) -> Average:
    """From the middle of the grid; the first warp of a block does what one thread does for all.

    Where indices say which rows are read, all threads of a warp are followed, for rows at several distances.
    """
    count = -(-launched.threads // 32)
    thread = min(launched.threads - 1, launched.threads // 2 // 32 * 32)
    middle = [min(launched.grid[0] // 2 + i, launched.grid[0] - 1) for i in range(3)]
    rest = tuple(size // 2 for size in launched.grid[1:])
    traces = [trace(function, architecture, launched, thread, (middle[0], *rest))]
    if traces[0].issue < LONG:
        traces += [trace(function, architecture, launched, thread, (block, *rest)) for block in middle[1:]]
    # Not the block at the end of a row, which has less to do.
    usual = Counter(one.issue for one in traces).most_common(1)[0][0]
    typical = next(i for i, one in enumerate(traces) if one.issue == usual)
    first = trace(function, architecture, launched, 0, (middle[typical], *rest))
    each = {name: (getattr(first, name) + (count - 1) * getattr(traces[typical], name)) / count for name in CLASSES}
    if launched.indices:
        block, warp = (middle[typical], *rest), range(thread, min(thread + 32, launched.threads))
        by_distance = []
        for apart in APART:
            known = Indices(apart)
            by_distance.append([trace(function, architecture, launched, lane, block, known) for lane in warp])
        each["wavefronts"] += scattered(by_distance)
    pair = [one for one in traces if one.issue == usual][:2]

    def moved(name: str) -> dict[int, float]:
        total: dict[int, float] = {}
        for one in pair:
            for operand, size in getattr(one, name).items():
                if operand is not None:
                    total[operand] = total.get(operand, 0.0) + size / len(pair)
        return total

    widest = max([0, *pair[0].stored.values()]), max([0, *pair[0].loaded.values()])
    return Average(each, moved("loaded"), moved("stored"), widest, traces[typical])
