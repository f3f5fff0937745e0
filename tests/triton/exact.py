"""What the ops give in fp64, by the formulas of their own tests, and a call held to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltxkern import use_backend
from ltxkern.ops.qk_norm_rope import Arguments
from ltxkern.ops.rms_norm_modulate import taken
from ltxkern.verify.cases import OpCase
from tests.ops import test_combine_guidance as guidance
from tests.ops import test_gated_residual as gates
from tests.ops import test_group_norm_silu as group_norm
from tests.ops import test_merge_lora as merge
from tests.ops import test_normalize_noise as normalize_noise
from tests.ops import test_pixel_norm_silu as pixel_norm
from tests.ops import test_qk_norm_rope as rope
from tests.ops import test_res2s as res2s
from tests.ops import test_rms_norm_modulate as rms_norm
from tests.ops.contract import assert_as_close
from tests.serving import serving


def standardised(x: Tensor) -> Tensor:
    """In extended precision, since fp64 noise is held to fp64 arithmetic; twice, as the sampler's rule says, equals once."""
    exact = normalize_noise.long_channelwise(x.cpu().numpy().astype(np.longdouble))
    return torch.from_numpy(exact.astype(np.float64)).to(x.device)


def ready(noise: Tensor, stats: Tensor | None) -> Tensor:
    """The noise, by its statistics where it is raw."""
    if stats is None:
        return noise
    count, mean, squares = (column[:, None, None] for column in stats.unbind(1))
    return (noise - mean) / (squares / (count - 1)).sqrt()


def modulated(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    return rms_norm.norm(x, *taken(rows, scale, shift), weight=weight)


def rotated(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *, layout: str = "split", **tables: Any) -> Any:
    rest = {name: tables.get(name) for name in Arguments._fields[8:]}
    args = Arguments(q, k, q_weight, k_weight, tables["cos"], tables["sin"], 1e-6, layout, **rest)
    pairs = q.shape[-1] // (2 * args.head_count)
    return [
        rope.rotated(rope.normed(x, weight, args.eps), *own.by_token(args.head_count, pairs), layout)
        for x, weight, own in ((q, q_weight, args.q_tables), (k, k_weight, args.k_tables))
    ]


# By the op's arguments in fp64; where there is none, the composition itself is what a result is held to.
FORMULAS: dict[str, Callable[..., Any]] = {
    "group_norm_silu": lambda x, num_groups, weight=None, bias=None, residual=None, conv_bias=None: group_norm.exact(
        x, weight, bias, num_groups, residual, conv_bias
    ),
    "pixel_norm_silu": lambda x, weight=None: pixel_norm.composition(x, 1e-8, weight),
    "rms_norm_modulate": modulated,
    # The norm is of the rounded sum.
    "gated_residual_rms_norm_modulate": lambda x, y, gate, scale, shift, summed, weight=None, rows=None: (
        gates.residual(x, y, *taken(rows, gate)),
        modulated(summed, scale, shift, weight, rows),
    ),
    "gated_residual_rms_norm_modulate_twice": lambda x, y, gate, scale, shift, scale2, shift2, summed, **more: (
        gates.residual(x, y, *taken(more.get("rows"), gate)),
        *(
            modulated(summed, *each, more.get("weight"), more.get("rows"))
            for each in ((scale, shift), (scale2, shift2))
        ),
    ),
    "gated_residual": lambda x, y, gate, rows=None: gates.residual(x, y, *taken(rows, gate)),
    "head_gate": gates.gated,
    "qk_norm_rope": rotated,
    "normalize_noise": lambda noise: standardised(noise),
    "channelwise_normalize": standardised,
    "combine_guidance": lambda cond, uncond=None, perturbed=None, isolated=None, **scales: guidance.composition(
        cond, *(cond if branch is None else branch for branch in (uncond, perturbed, isolated)), **scales
    ),
    "res2s_sde_step": lambda sample, denoised, noise, sigma, sigma_next, noise_stats=None: res2s.sde(
        sample, denoised, sigma, sigma_next, ready(noise, noise_stats), 0.5
    ),
    "res2s_midpoint": lambda latent, x0, noise, step, mask=None, clean=None, noise_stats=None, **_: res2s.midpoint(
        latent, x0, ready(noise, noise_stats), step, mask, clean
    ),
    "res2s_advance": lambda anchor, x0, x0_mid, noise, step, mask=None, clean=None, noise_stats=None: res2s.advance(
        anchor, x0, x0_mid, ready(noise, noise_stats), step, mask, clean
    ),
    "merge_lora_": lambda weight, lora_a, lora_b, scale=1.0: merge.exact(
        weight,
        *([each] if isinstance(each, Tensor) else each for each in (lora_a, lora_b)),
        [scale] if isinstance(scale, float) else scale,
    ),
}


def exact_results(case: OpCase, tensors: Mapping[str, Tensor], found: list[Tensor]) -> list[Tensor]:
    """By the formula; what an op without one, and the norm of a rounded sum, refer to is what was found."""
    if case.op not in FORMULAS:
        return [value.double() for value in found]
    given = dict(tensors)
    if case.op.startswith("gated_residual_rms_norm_modulate"):
        given["summed"] = found[0]
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    results = FORMULAS[case.op](**wide, **case.others)
    return [results] if isinstance(results, Tensor) else list(results)


def hold(case: OpCase, tensors: Mapping[str, Tensor]) -> None:
    """Triton's error against fp64 is at most 1.5 times that of the torch composition, on RMS and on the maximum."""
    with use_backend("torch"):
        composed = case.run({name: value.clone() for name, value in tensors.items()})
    outputs = [torch.full_like(value, torch.nan) for value in composed if case.out]
    with serving("triton"):
        results = case.run({name: value.clone() for name, value in tensors.items()}, outputs)
    exact = exact_results(case, tensors, composed)
    own = exact_results(case, tensors, results) if case.op in FORMULAS else exact
    for result, by_torch, ours, theirs in zip(results, composed, own, exact, strict=True):
        # Where the composition happens to be exact, the resolution of the compute dtype is the measure.
        free = 2e-15 if result.dtype == torch.float64 else 6e-8
        assert_as_close(result, by_torch, ours, free=free, exact_of_composition=theirs)
