"""Launch geometry of two sums that share an operand: one pack a thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, program
from ltxkern.compiled.steps import Argument, Call, Launch
from ltxkern.compiled.tensors import CPU_NAMES, CUDA_NAMES, aligned16
from ltxkern.layout import ceil_div, dense, hand_back

if TYPE_CHECKING:
    from ltxkern.ops.dual_add import Arguments

TENSORS = {name: Argument(i) for i, name in enumerate(("x", "first", "second", "out_first", "out_second"))}


class Case(NamedTuple):
    """Everything of a call that its launch depends on."""

    dtype: torch.dtype
    size: int
    aligned: bool

    @property
    def vector(self) -> int:
        """Elements of a thread's access: 16 bytes where addresses and size allow it, else one."""
        vector = 16 // self.dtype.itemsize
        return vector if self.aligned and self.size % vector == 0 else 1


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """One launch."""
    blocks = ceil_div(case.size, threads * case.vector)
    name = f"ltxk::dual_add<{CUDA_NAMES[case.dtype]}, {case.vector}>"
    return [Launch(name, (blocks,), threads, {**TENSORS, "size": case.size})]


def cpu_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    return [Call(f"dual_add<{CPU_NAMES[case.dtype]}>", {**TENSORS, "size": case.size})]


def run(tier: str, out: Sequence[Tensor], args: Arguments) -> None:
    """One call; tensors that are not contiguous pass through a copy."""
    x = args.x
    if x.numel() == 0:
        return
    targets = dense(out)
    given = [*(tensor.contiguous() for tensor in args), *targets]
    case = Case(x.dtype, x.numel(), aligned16(*given))
    program(tier, cpu_calls if tier == "cpu" else device_steps, case, len(TENSORS))(*given)
    hand_back(out, targets)
