"""combine_guidance: four branches, rescale, void scales, and the calls around it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from tests.ops.contract import SAMPLER, assert_as_close, assert_same, doubles, noise
from tests.serving import over_backends, serving

SHAPES = [(1, 6, 4), (2, 9, 8), (1, 127, 16), (13,), (3, 1, 7), (1, 2, 3, 4, 5)]
SCALES = {
    "off": {},
    "cfg": {"cfg_scale": 4.0},
    "below_one": {"cfg_scale": 0.0, "modality_scale": 0.5},
    "stg": {"stg_scale": 1.5},
    "hq_video": {"cfg_scale": 3.0, "modality_scale": 3.0, "rescale_scale": 0.45},
    "hq_audio": {"cfg_scale": 7.0, "modality_scale": 3.0, "rescale_scale": 1.0},
    "all": {"cfg_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "rescale_scale": 0.7},
    "rescale": {"rescale_scale": 0.7},
}


def branches(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    base = noise(*shape, dtype=torch.float64, seed=1)
    return [(base + 0.3 * noise(*shape, dtype=torch.float64, seed=2 + k)).to(dtype) for k in range(4)]


def composition(
    cond: Tensor,
    uncond: Tensor,
    perturbed: Tensor,
    isolated: Tensor,
    cfg_scale: float = 1.0,
    stg_scale: float = 0.0,
    modality_scale: float = 1.0,
    rescale_scale: float = 0.0,
) -> Tensor:
    dtype = cond.dtype
    wide = torch.promote_types(dtype, torch.float32)
    cond, uncond, perturbed, isolated = (branch.to(wide) for branch in (cond, uncond, perturbed, isolated))
    pred = cond + (cfg_scale - 1) * (cond - uncond) + stg_scale * (cond - perturbed)
    pred = pred + (modality_scale - 1) * (cond - isolated)
    if rescale_scale:
        pred = pred * (rescale_scale * cond.std() / pred.std() + (1 - rescale_scale))
    return pred.to(dtype)


@over_backends("combine_guidance")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_contract(backend: str, dtype: torch.dtype, shape: tuple[int, ...], scales: dict[str, float]) -> None:
    given = branches(*shape, dtype=dtype)
    with serving(backend):
        out = ltxkern.combine_guidance(*given, **scales)
    exact = composition(*doubles(given), **scales)
    assert_as_close(out, composition(*given, **scales), exact, wide=1e-13)


@over_backends("combine_guidance")
def test_void_branches_are_not_read(backend: str) -> None:
    cond, uncond, *_ = branches(1, 6, 4)
    bad = torch.full_like(cond, torch.nan)
    with serving(backend):
        out = ltxkern.combine_guidance(cond, uncond, bad, bad, cfg_scale=2.0)
        assert_same(out, ltxkern.combine_guidance(cond, uncond, cfg_scale=2.0))
        assert_same(ltxkern.combine_guidance(cond, bad, bad, bad), cond)
    assert bool(out.isfinite().all())


@over_backends("combine_guidance")
def test_no_guidance_returns_a_fresh_tensor(backend: str) -> None:
    cond = branches(1, 6, 4)[0]
    with serving(backend):
        out = ltxkern.combine_guidance(cond)
    assert out.data_ptr() != cond.data_ptr()


@over_backends("combine_guidance")
def test_rescale_one_gives_back_the_deviation_of_the_whole_batch(backend: str) -> None:
    given = branches(3, 11, 8)
    with serving(backend):
        out = ltxkern.combine_guidance(*given, cfg_scale=7.0, modality_scale=3.0, rescale_scale=1.0)
    assert float(out.std()) == pytest.approx(float(given[0].std()), rel=1e-5)
    assert float(out[0].std()) != pytest.approx(float(given[0][0].std()), rel=1e-3)


@over_backends("combine_guidance")
@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 1e3), (1e-24, 0.0), (1e-30, 1e-28), (1e-36, 0.0), (1e30, 0.0)], ids=str
)
def test_rescale_far_from_one(backend: str, scale: float, shift: float) -> None:
    """The squares of such deviations are none that fp32 has."""
    given = [branch * scale + shift for branch in branches(1, 61, 16)]
    with serving(backend):
        out = ltxkern.combine_guidance(*given, **SCALES["all"])
    assert_as_close(out, composition(*given, **SCALES["all"]), composition(*doubles(given), **SCALES["all"]))


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({"cfg_scale": 3.0}, "cfg_scale is 3.0, so uncond is needed: give it, or use cfg_scale=1"),
        ({"stg_scale": 1.0}, "stg_scale is 1.0, so perturbed is needed: give it, or use stg_scale=0"),
        ({"modality_scale": 2.0}, "modality_scale is 2.0, so isolated is needed: give it, or use modality_scale=1"),
    ],
)
def test_scales_that_do_not_fit(scales: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ltxkern.combine_guidance(noise(1, 3, 4), **scales)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"uncond": torch.zeros(1, 3, 5)}, ValueError, r"uncond must have shape \(1, 3, 4\), got \(1, 3, 5\)"),
        ({"perturbed": torch.zeros(1, 3, 4).half()}, TypeError, "perturbed must be torch.float32, got torch.float16"),
        ({"isolated": 3.0}, TypeError, "isolated must be a torch.Tensor, got float"),
        ({"out": torch.zeros(3, 4)}, ValueError, r"out must have shape \(1, 3, 4\), got \(3, 4\)"),
        ({"cfg_scale": "3"}, TypeError, "cfg_scale must be a number, got str"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ltxkern.combine_guidance(noise(1, 3, 4), **given)


@over_backends("combine_guidance")
def test_gradients(backend: str) -> None:
    given = [branch.double().requires_grad_() for branch in branches(1, 3, 4)]
    with serving(backend):
        assert torch.autograd.gradcheck(lambda *x: ltxkern.combine_guidance(*x, **SCALES["all"]), given)
