"""Launch geometry of guidance: moments per chunk and their merging only where there is a rescale."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, program, workspace
from ltxkern.compiled.steps import Argument, Call, Launch
from ltxkern.compiled.tensors import PARAM_CODES, aligned16, param_code
from ltxkern.layout import ceil_div, contiguous, dense, hand_back

if TYPE_CHECKING:
    from ltxkern.ops.combine_guidance import Arguments

OUT, COND, UNCOND, PERTURBED, ISOLATED, WORKSPACE = (Argument(i) for i in range(6))
ARGUMENTS = 6
CHUNK = 4096
# Every block of the second launch merges all partials: larger tensors take longer chunks.
PARTIALS = 512
PARTIAL_BYTES = 32


class Case(NamedTuple):
    """Everything of a call that its launches depend on; `factors` multiply (cond - branch)."""

    type_code: int
    size: int
    aligned: bool
    factors: tuple[float, float, float]
    rescale: float

    @property
    def vector(self) -> int:
        """Elements of a thread's access."""
        return 4 if self.aligned and self.size % 4 == 0 else 1

    @property
    def chunk(self) -> int:
        """Elements of a chunk: of the size alone, so that results never vary."""
        return CHUNK * ceil_div(ceil_div(self.size, CHUNK), PARTIALS)

    @property
    def chunks(self) -> int:
        """Chunks of the tensor."""
        return ceil_div(self.size, self.chunk)

    @property
    def workspace_bytes(self) -> int:
        """The moments of each chunk."""
        return PARTIAL_BYTES * self.chunks if self.rescale != 0.0 else 0

    @property
    def double(self) -> bool:
        """Whether the arithmetic is fp64."""
        return self.type_code == PARAM_CODES[torch.float64]


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """Apply alone, or behind the moments where there is a rescale."""
    branches = (COND, UNCOND, PERTURBED, ISOLATED, case.type_code, case.size, *case.factors)
    name = f"<{'double' if case.double else 'float'}, {case.vector}>"
    rescaled = case.rescale != 0.0
    apply = (*branches, WORKSPACE if rescaled else None, OUT, case.chunk, case.chunks, case.rescale)
    steps = [Launch(f"ltxk::guidance_apply{name}", (case.chunks,), threads, apply)]
    if rescaled:
        measure = (*branches, WORKSPACE, case.chunk)
        steps.insert(0, Launch(f"ltxk::guidance_measure{name}", (case.chunks,), threads, measure))
    return steps


def cpu_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    parameters = (COND, UNCOND, PERTURBED, ISOLATED, OUT, case.type_code, case.size, *case.factors, case.rescale)
    return [Call(f"combine_guidance<{'f64' if case.double else 'f32'}>", parameters)]


def run(tier: str, out: Tensor, args: Arguments) -> None:
    """One call; tensors that are not contiguous pass through a copy."""
    cond = args.cond
    if cond.numel() == 0:
        return
    (target,) = dense([out])
    branches = [contiguous(branch) for branch in (cond, args.uncond, args.perturbed, args.isolated)]
    factors = (args.cfg_scale - 1.0, args.stg_scale, args.modality_scale - 1.0)
    case = Case(param_code(cond), cond.numel(), aligned16(target, *branches), factors, args.rescale_scale)
    steps = cpu_calls if tier == "cpu" else device_steps
    program(tier, steps, case, ARGUMENTS)(target, *branches, workspace(tier, case.workspace_bytes, cond))
    hand_back([out], [target])
