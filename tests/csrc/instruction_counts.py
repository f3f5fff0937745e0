"""Instructions that a CUDA kernel issues for 16 bytes of its result, counted in what NVRTC makes; no GPU, no nvcc.

The hot path is the way from a kernel's entry to an EXIT that makes the most 16-byte accesses to global memory, and of these the one
of fewest instructions. So it takes no early exit, no branch for operands that are absent or of a dtype read in smaller pieces, and
no slow path of a division. A loop without jumps out of its middle counts once, as its hottest way round. What the path has is
divided by the packs of the result that a thread makes; what a row costs once is in it.

`python -m tests.csrc.instruction_counts` writes the baseline that test_instruction_counts.py holds the kernels of PACKS to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ltxkern.compiled import nvrtc
from tests.csrc import registered
from tests.csrc.kernel_resources import told

BASELINE = Path(__file__).with_name("instruction_counts.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# Packs of 16 bytes of activations for which a thread of these kernels makes results.
PACKS = dict.fromkeys(("rms_norm_modulate_packs", "gated_residual_packs", "head_gate_packs", "qk_norm_rope_packs"), 4)

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"0x[0-9a-f]+")
_SHARED = ("LDS", "STS", "LDSM", "ATOMS")
_MEMORY = ("LD", "LDG", "ST", "STG", "LDL", "STL", "ATOM", "ATOMG", "RED", "LDGSTS", *_SHARED, "SHFL")


class Counts(NamedTuple):
    """Instructions by the unit that binds: issue is all of them, lsu those of any memory, shared memory and shuffles among them."""

    wide: int
    issue: int
    mufu: int
    lsu: int
    shared: int

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def hotter(self, other: Counts | None) -> bool:
        """Whether a path with these is the one to count."""
        return other is None or (self.wide, -self.issue) > (other.wide, -other.issue)


NOTHING = Counts(0, 0, 0, 0, 0)


class Instruction(NamedTuple):
    """One line of a disassembly."""

    address: int
    predicate: str | None
    name: str
    operands: str

    @property
    def counts(self) -> Counts:
        """What it adds to a path."""
        name = self.name.split(".")[0]
        wide = name in ("LDG", "STG", "LDGSTS") and "128" in self.name
        return Counts(int(wide), 1, int(name == "MUFU"), int(name in _MEMORY), int(name in (*_SHARED, "SHFL")))


class Block(NamedTuple):
    """A basic block: its instructions, and the blocks that may follow, by index; None ends the thread."""

    instructions: tuple[Instruction, ...]
    follows: tuple[int | None, ...]


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """Instructions of every function by its mangled name, without the padding behind it."""
    functions: dict[str, list[Instruction]] = {}
    for line in told(cubin, "--dump-sass").splitlines():
        if "Function :" in line:
            functions[line.split(":", 1)[1].strip()] = current = []
        elif (match := _LINE.match(line)) and match[3] != "NOP":
            current.append(Instruction(int(match[1], 16), match[2], match[3], match[4]))
    return functions


def _goes_to(instruction: Instruction) -> int | None:
    """Where a branch goes to; a call comes back and is none."""
    found = _TARGET.findall(instruction.operands)
    return int(found[-1], 16) if instruction.name.startswith("BRA") and found else None


def blocks(instructions: Sequence[Instruction]) -> list[Block]:
    """The control flow of a function."""
    ends = ("BRA", "EXIT", "RET")
    starts = {instructions[0].address}
    for instruction, after in zip(instructions, [*instructions[1:], None], strict=True):
        if instruction.name.startswith(ends):
            starts |= {target for target in (_goes_to(instruction), after and after.address) if target is not None}
    cut = [i for i, instruction in enumerate(instructions) if instruction.address in starts]
    pieces = [tuple(instructions[i:j]) for i, j in zip(cut, [*cut[1:], len(instructions)], strict=True)]
    number = {piece[0].address: i for i, piece in enumerate(pieces)}
    result = []
    for i, piece in enumerate(pieces):
        last = piece[-1]
        # BRA takes its condition as a guard or as a first operand.
        conditional = last.predicate is not None or (last.name.startswith("BRA") and "," in last.operands)
        follows: list[int | None] = []
        if last.name.startswith("BRA"):
            follows.append(number[_goes_to(last) or 0])
        elif last.name.startswith(("EXIT", "RET")):
            follows.append(None)
        if (conditional or not last.name.startswith(ends)) and i + 1 < len(pieces):
            follows.append(i + 1)
        result.append(Block(piece, tuple(follows)))
    return result


def _hottest(flow: Sequence[Block]) -> Counts | None:
    """What the hot path from the first block to the end of the thread adds up to."""
    loops = {
        target: i for i, block in enumerate(flow) for target in block.follows if target is not None and target <= i
    }
    known: dict[tuple[int, int | None], Counts | None] = {}

    def walk(i: int, stop: int | None, inside: int | None) -> Counts | None:
        if (i, stop) in known:
            return known[i, stop]
        block, best, own = flow[i], None, NOTHING
        for instruction in block.instructions:
            own = own + instruction.counts
        if i == stop:
            return own
        if i in loops and i != inside and (last := loops[i]) != stop:
            round_trip = walk(i, last, i) if last != i else own
            after = [target for target in flow[last].follows if target is None or target > last]
            for target in after:
                rest = NOTHING if target is None else walk(target, stop, inside)
                if round_trip is not None and rest is not None and (round_trip + rest).hotter(best):
                    best = round_trip + rest
        for target in block.follows:
            if target is not None and target <= i:
                continue
            if target is None and stop is not None:
                continue
            rest = NOTHING if target is None else walk(target, stop, inside)
            if rest is not None and (own + rest).hotter(best):
                best = own + rest
        if i != inside:
            known[i, stop] = best
        return best

    return walk(0, None, None)


def hot_path(instructions: Sequence[Instruction]) -> Counts:
    """What the hot path of a kernel adds up to.

    Raises:
        ValueError: there is none.
    """
    counts = _hottest(blocks(instructions))
    if counts is None:
        raise ValueError("no path leads from the entry to an EXIT")
    return counts


def counted_kernels() -> dict[str, list[str]]:
    """The kernels of PACKS by header."""
    found: dict[str, list[str]] = {}
    for kernel in sorted(registered.cuda_kernels()):
        if kernel.split("<")[0].removeprefix("ltxk::") in PACKS:
            found.setdefault(nvrtc.header_of(kernel), []).append(kernel)
    return found


def count(kernels: Sequence[str], architecture: str) -> dict[str, dict[str, float]]:
    """By kernel of one header: instructions for 16 bytes, by class."""
    cubin, mangled = nvrtc.compile_cubin(kernels, architecture)
    functions, rows = disassemble(cubin), {}
    for kernel, name in zip(kernels, mangled, strict=True):
        packs = PACKS[kernel.split("<")[0].removeprefix("ltxk::")]
        rows[kernel] = {field: value / packs for field, value in hot_path(functions[name])._asdict().items()}
    return rows


if __name__ == "__main__":
    counted = {
        architecture: {
            k: row for kernels in counted_kernels().values() for k, row in count(kernels, architecture).items()
        }
        for architecture in ARCHITECTURES
    }
    BASELINE.write_text(json.dumps(counted, indent=1) + "\n")
