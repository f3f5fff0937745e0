"""A warp of a GPU kernel: what its threads count together, and in how many pieces their accesses pass the first cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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


def _parts(accesses: Mapping[int, tuple[int, int]]) -> list[set[int]]:
    """Words of an access of shared memory that come together: a warp's, its halves' at 8 bytes a thread, its quarters' at 16."""
    found: dict[int, set[int]] = {}
    for lane, (address, size) in accesses.items():
        words = range(address // WORD, -(-(address + size) // WORD))
        found.setdefault(lane // (BANKS * WORD // max(WORD, size)), set()).update(words)
    return list(found.values())


def bank_clocks(accesses: Mapping[int, tuple[int, int]]) -> int:
    """Clocks that one access of a warp takes in shared memory, by address and bytes of each thread.

    A bank gives one word a clock, to all threads that ask for it. Source: CUDA C++ Programming Guide, "Shared Memory" of compute
    capability 5.x and later.
    """
    return sum(max(Counter(word % BANKS for word in words).values()) for words in _parts(accesses))


def _conflicts(accesses: Mapping[int, tuple[int, int]]) -> int:
    """Clocks of such an access beyond one for each part."""
    return bank_clocks(accesses) - len(_parts(accesses))


# Address and bytes of each thread of a warp, by instruction and how often it came before.
Accesses = dict[tuple[int, int], dict[int, tuple[int, int]]]


def _accesses(touched: Iterable[Sequence[tuple[int, int | None, int]]]) -> tuple[Accesses, int]:
    """Of a warp's threads; and 128-byte pieces of those that lie where nobody knows."""
    found: Accesses = {}
    unknown: dict[tuple[int, int], int] = {}
    for lane, of_thread in enumerate(touched):
        times: Counter[int] = Counter()
        for instruction, address, size in of_thread:
            key = instruction, times[instruction]
            if address is None:
                unknown[key] = max(1, size // WORD)
            else:
                found.setdefault(key, {})[lane] = address, size
            times[instruction] += 1
    return found, sum(pieces for key, pieces in unknown.items() if key not in found)


class Clocks(NamedTuple):
    """Of one warp, in the first cache and shared memory.

    Attributes:
        wavefronts: all of them, of an asynchronous copy those that it reads.
        conflicts: of shared memory, beyond the fewest that as many bytes of as many threads take; of a copy those that it writes.
    """

    wavefronts: float
    conflicts: float


def clocks_of(warp: Sequence[Counts]) -> Clocks:
    """Of a warp by what each of its threads touches."""
    of_global, unknown = _accesses([one.touched for one in warp])
    of_shared, hidden = _accesses([one.shared_touched for one in warp])
    copied, _ = _accesses([one.copied for one in warp])
    wavefronts = unknown + hidden + max(one.shuffles for one in warp)
    wavefronts += sum(pieces(each.values()) for each in of_global.values())
    wavefronts += sum(map(bank_clocks, of_shared.values()))
    return Clocks(wavefronts, sum(map(_conflicts, [*of_shared.values(), *copied.values()])))


class Average(NamedTuple):
    """Counts of a block's warps; of loads and stores those of neighbouring blocks, which may have different operands.

    Attributes:
        each: instructions of a warp by class, and its clocks.
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


CLASSES = ("issue", "mufu", "double", "lsu", "shared")


def _clocks(function: Function, architecture: str, launched: Launched, first: int, block: tuple[int, ...]) -> Clocks:
    """Of the warp of a thread, its first; where indices say which rows are read, the mean over rows at several distances."""
    lanes = range(first, min(first + 32, launched.threads))
    known = [Indices(apart) for apart in APART] if launched.indices else [None]
    each = [clocks_of([trace(function, architecture, launched, lane, block, one) for lane in lanes]) for one in known]
    return Clocks(*(sum(counted) / len(each) for counted in zip(*each, strict=True)))


def average(function: Function, architecture: str, launched: Launched) -> Average:
    """From the middle of the grid; the first warp of a block does what one thread does for all."""
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
    block = middle[typical], *rest
    first = trace(function, architecture, launched, 0, block)

    def mean(of_first: float, of_others: float) -> float:
        return (of_first + (count - 1) * of_others) / count

    each = {name: mean(getattr(first, name), getattr(traces[typical], name)) for name in CLASSES}
    one, others = (_clocks(function, architecture, launched, start, block) for start in (0, thread))
    each |= {name: mean(getattr(one, name), getattr(others, name)) for name in Clocks._fields}
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
