"""Launch geometry of noise standardisation and its statistics: chunks of a fixed length, two launches; one for short slices."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ltxkern.compiled.programs import THREADS, program, workspace
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter
from ltxkern.compiled.tensors import aligned16, param_code
from ltxkern.layout import ceil_div, dense, hand_back

if TYPE_CHECKING:
    from ltxkern.ops.normalize_noise import Arguments, NoiseArguments

OUT, X, WORKSPACE = (Argument(i) for i in range(3))
ARGUMENTS = 3
CHUNK = 4096
# Every block of the second launch merges all partials of its slice: longer slices take longer chunks.
PARTIALS = 256
# Blocks of the first launch where each block of the second reads one flag of every one of them.
FLAGS = 1024
PARTIAL_BYTES = 16
# Longest slice that one block keeps in registers at 16 values a thread; at 32, which take wide accesses, twice that.
SINGLE = 8192


class Case(NamedTuple):
    """Everything of a call that its launches depend on; `entry` is normalize, channelwise or statistics."""

    entry: str
    type_code: int
    slices: int
    length: int
    aligned: bool

    @property
    def vector(self) -> int:
        """Elements of a thread's access."""
        return 4 if self.aligned and self.length % 4 == 0 else 1

    @property
    def chunk(self) -> int:
        """Elements of a chunk: of the size alone, so that results never vary."""
        return CHUNK * ceil_div(ceil_div(self.length, CHUNK), PARTIALS)

    @property
    def chunks(self) -> int:
        """Chunks of a slice."""
        return ceil_div(self.length, self.chunk)

    @property
    def blocks(self) -> int:
        """Blocks of the first launch."""
        return min(self.slices * self.chunks, FLAGS) if self.flagged else self.slices * self.chunks

    @property
    def flagged(self) -> bool:
        """Whether a value that is not finite in one slice reaches the others."""
        return self.entry == "normalize" and self.slices > 1

    @property
    def single(self) -> bool:
        """Whether a block standardises a slice in one launch."""
        return (
            self.entry != "statistics" and not self.flagged and self.length <= SINGLE * (2 if self.vector == 4 else 1)
        )

    @property
    def workspace_bytes(self) -> int:
        """Partials, the origin of each slice, then flags."""
        if self.single:
            return 0
        return self.flags_at + (8 * self.blocks if self.flagged else 0)

    @property
    def origins_at(self) -> int:
        """Offset of the origins in the workspace."""
        return PARTIAL_BYTES * self.slices * self.chunks

    @property
    def flags_at(self) -> int:
        """Offset of the flags in the workspace."""
        return self.origins_at + 8 * self.slices


def _parameters(case: Case) -> dict[str, Parameter]:
    statistics = case.entry == "statistics"
    return {
        **{"x": X, "out": None if statistics else OUT, "stats": OUT if statistics else None, "type": case.type_code},
        **{"slices": case.slices, "length": case.length, "whole": int(case.entry == "normalize")},
    }


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """Measure, then apply or merge; or all at once."""
    parameters: dict[str, Parameter] = {
        **_parameters(case),
        **{"chunk": case.chunk, "chunks": case.chunks, "partials": WORKSPACE},
        "origins": Argument(WORKSPACE.index, case.origins_at),
        "flags": Argument(WORKSPACE.index, case.flags_at) if case.flagged else None,
        "flag_count": case.blocks if case.flagged else 0,
    }
    if case.single:
        vector = 2 if case.vector == 1 and case.aligned and case.length % 2 == 0 else case.vector
        held = 16 if case.length <= SINGLE else 32
        parameters |= {"partials": None, "origins": None}
        return [
            Launch(
                f"ltxk::noise_single<{vector}, {held}>",
                (case.slices,),
                32 * ceil_div(case.length, 32 * held),
                parameters,
            )
        ]
    steps = [Launch(f"ltxk::noise_measure<{case.vector}>", (case.blocks,), threads, parameters)]
    if case.entry == "statistics":
        return [*steps, Launch("ltxk::noise_statistics", (case.slices,), threads, parameters)]
    return [*steps, Launch(f"ltxk::noise_apply<{case.vector}>", (case.slices * case.chunks,), threads, parameters)]


def cpu_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    return [Call("normalize_noise", _parameters(case))]


def run(tier: str, entry: str, out: Tensor, args: Arguments | NoiseArguments) -> None:
    """One call: `out` is the standardised tensor, or the statistics."""
    (x,) = args
    if x.numel() == 0:
        if entry == "statistics":
            out.zero_()
        return
    (target,) = dense([out])
    source = x.contiguous()
    length = x.shape[-2] * x.shape[-1]
    case = Case(entry, param_code(x), x.numel() // length, length, aligned16(source, target))
    steps = cpu_calls if tier == "cpu" else device_steps
    program(tier, steps, case, ARGUMENTS)(target, source, workspace(tier, case, x))
    hand_back([out], [target])
