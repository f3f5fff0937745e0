"""Multi-branch guidance on x0 predictions: combination, standard deviations and rescale."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import combine_guidance as launch
from ltxkern.dispatch import Op
from ltxkern.layout import fresh, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import SAMPLER_DTYPES, check_finite_number, check_like, check_out, check_tensor


class Arguments(NamedTuple):
    """The branches of an evaluation, and a scale for each but the first."""

    cond: Tensor
    uncond: Tensor | None
    perturbed: Tensor | None
    isolated: Tensor | None
    cfg_scale: float
    stg_scale: float
    modality_scale: float
    rescale_scale: float


def reference(
    cond: Tensor,
    uncond: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    cfg_scale: float,
    stg_scale: float,
    modality_scale: float,
    rescale_scale: float,
) -> Tensor:
    """The torch composition that `combine_guidance` replaces, in fp32 (fp64 for fp64 predictions)."""
    dtype = torch.promote_types(cond.dtype, torch.float32)
    base = cond.to(dtype)
    pred = base
    if uncond is not None:
        pred = pred + (cfg_scale - 1) * (base - uncond.to(dtype))
    if perturbed is not None:
        pred = pred + stg_scale * (base - perturbed.to(dtype))
    if isolated is not None:
        pred = pred + (modality_scale - 1) * (base - isolated.to(dtype))
    if rescale_scale != 0 and pred.numel():
        pred = pred * (rescale_scale * (base.std() / pred.std()) + (1 - rescale_scale))
    return pred.to(cond.dtype).contiguous().clone() if pred is cond else pred.to(cond.dtype).contiguous()


OP = Op(
    "combine_guidance",
    Arguments,
    "Tensor",
    reference,
    lambda args: fresh(args.cond),
    backends=[*tiers.compiled(launch.run), tiers.triton("combine_guidance", tiers.not_contiguous)],
    may_be=[("cond", "uncond", "perturbed", "isolated")],
)


def combine_guidance(
    cond: Tensor,
    uncond: Tensor | None = None,
    perturbed: Tensor | None = None,
    isolated: Tensor | None = None,
    *,
    cfg_scale: float = 1.0,
    stg_scale: float = 0.0,
    modality_scale: float = 1.0,
    rescale_scale: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Guided prediction from the branches of one evaluation.

    `p = cond + (cfg - 1)(cond - uncond) + stg (cond - perturbed) + (mod - 1)(cond - isolated)`; where rescale r is not 0,
    `p *= r std(cond) / std(p) + (1 - r)`, std unbiased over the whole tensor, batch included.

    Args:
        cond: x0 prediction with the prompt, any shape, fp16 to fp64.
        uncond: with the negative prompt; needed where cfg_scale is not 1.
        perturbed: with self-attention skipped; needed where stg_scale is not 0.
        isolated: with cross-modal attention off; needed where modality_scale is not 1.
        cfg_scale, stg_scale, modality_scale, rescale_scale: guidance scales; 1, 0, 1 and 0 are void.
        out: written in place of a fresh tensor; may be one of the predictions.
    Returns:
        Shape and dtype of cond.
    Raises:
        ValueError: a scale that is not void without its branch; shapes, devices or numbers that do not fit.
        TypeError: not tensors, or of differing dtype.

    Contract: rounded; fp32 combination and statistics in fixed order (fp64 for fp64 input), one rounding.
    Bytes: each branch twice (the second time from cache) and one write.
    Source: multi-modal guidance of LTX-2; Lin et al. 2023 (rescale).
    """
    if check_tensor("cond", cond, dtypes=SAMPLER_DTYPES, arrays=True):
        return through_torch(combine_guidance, locals())
    scales = {"cfg_scale": (cfg_scale, 1), "stg_scale": (stg_scale, 0), "modality_scale": (modality_scale, 1)}
    branches = {"uncond": uncond, "perturbed": perturbed, "isolated": isolated}
    used: list[Any] = []
    for (scale_name, (scale, void)), (name, branch) in zip(scales.items(), branches.items(), strict=True):
        check_finite_number(scale_name, scale)
        if scale != void and branch is None:
            raise ValueError(f"{scale_name} is {scale}, so {name} is needed: give it, or use {scale_name}={void}")
        if branch is not None:
            check_like(name, branch, cond)
        used.append(branch if scale != void else None)
    check_finite_number("rescale_scale", rescale_scale)
    if out is not None:
        check_out(out, cond.shape, cond.dtype, cond.device)
    given = map(float, (cfg_scale, stg_scale, modality_scale, rescale_scale))
    return OP(Arguments(cond, *used, *given), out)
