"""Launch geometry of guidance: moments per chunk and their merging only where there is a rescale."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, program, workspace
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, float_bits
from ltxkern.compiled.tensors import CODED, CUDA_NAMES, PARAM_CODES, aligned16, param_code
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
    def kernels(self) -> tuple[str, str]:
        """Ending and template arguments of their names: kernels of one dtype where packs of 16 bytes fill the tensor."""
        dtype = CODED[self.type_code]
        packs, rest = divmod(self.size * dtype.itemsize, 16)
        if self.double:
            return "", f"<double, {4 if self.aligned and self.size % 4 == 0 else 1}>"
        if self.aligned and rest == 0 and packs < 1 << 31:
            return "_packs", f"<{CUDA_NAMES[dtype]}>"
        return "", "<float, 1>"

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


def _parameters(case: Case) -> dict[str, Parameter]:
    cfg, stg, modality = case.factors
    return {
        **{"cond": COND, "uncond": UNCOND, "perturbed": PERTURBED, "isolated": ISOLATED, "out": OUT},
        **{"type": case.type_code, "size": case.size, "cfg": cfg, "stg": stg, "modality": modality},
        "rescale": case.rescale,
    }


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """Apply alone, or behind the moments where there is a rescale."""
    kind, arguments = case.kernels
    rescaled = case.rescale != 0.0
    partials = WORKSPACE if rescaled else None
    factors = zip(("cfg_bits", "stg_bits", "modality_bits"), map(float_bits, case.factors), strict=True)
    parameters = {
        **_parameters(case),
        "partials": partials,
        "chunk": case.chunk,
        "chunks": case.chunks,
        **dict(factors),
    }
    kernels = ("guidance_measure", "guidance_apply") if rescaled else ("guidance_apply",)
    return [Launch(f"ltxk::{kernel}{kind}{arguments}", (case.chunks,), threads, parameters) for kernel in kernels]


def cpu_calls(case: Case) -> list[Call]:
    """The CPU kernel's call."""
    return [Call(f"combine_guidance<{'f64' if case.double else 'f32'}>", _parameters(case))]


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
    program(tier, steps, case, ARGUMENTS)(target, *branches, workspace(tier, case, cond))
    hand_back([out], [target])
