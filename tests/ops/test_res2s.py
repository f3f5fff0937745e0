"""res2s_midpoint and res2s_advance: both half-steps against fp64, masks, raw noise, lists, calls around them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern import Res2sStep, res2s_steps
from tests.ops.contract import SAMPLER, assert_as_close, assert_same, noise, poisoned, transposed
from tests.ops.test_res2s_sde_step import SHAPES, sde
from tests.serving import needs_cpu_kernels, over_backends, serving

REFINED, LARGE = res2s_steps([0.9, 0.7, 0.1])
STEPS = pytest.mark.parametrize("step", [REFINED, LARGE], ids=["refined", "large"])
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def post(x: Tensor, mask: Tensor | None, clean: Tensor | None) -> Tensor:
    return x if mask is None or clean is None else (x * mask + clean.float() * (1 - mask)).to(x.dtype)


def midpoint(
    x: Tensor, d: Tensor, n: Tensor, step: Res2sStep, mask: Tensor | None, clean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Half-step 1 written out, with 100 refinement iterations."""
    d, start = post(d, mask, clean).double(), x.double()
    moved = start + step.h * step.a21 * (d - start)
    moved = post(sde(start, moved, step.sigma, step.sigma_sub, n.double(), 0.5), mask, clean)
    anchor = start
    for _ in range(100 if step.refine else 0):
        anchor = moved - step.h * step.a21 * (d - anchor)
    return moved, anchor


def advance(
    a: Tensor, d: Tensor, e: Tensor, n: Tensor, step: Res2sStep, mask: Tensor | None, clean: Tensor | None
) -> Tensor:
    """Half-step 2 written out."""
    d, e = post(d, mask, clean).to(a.dtype), post(e, mask, clean).to(a.dtype)
    moved = a + step.h * (step.b1 * (d - a) + step.b2 * (e - a))
    return post(sde(a, moved, step.sigma, step.sigma_next, n.to(a.dtype), 0.5), mask, clean)


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    given = {
        name: noise(*shape, dtype=dtype, seed=seed + k) for k, name in enumerate(("latent", "x0", "x0_mid", "clean"))
    }
    given["noise"] = noise(*shape, dtype=torch.float64, seed=seed + 5)
    given["anchor"] = noise(*shape, dtype=torch.float64, seed=seed + 6)
    mask = torch.linspace(0, 1, math.prod(shape[:-1])).reshape(*shape[:-1], 1)
    given["mask"] = torch.where(mask > 0.7, 1.0, mask)
    return given


def masks_of(given: dict[str, Tensor], masked: bool) -> dict[str, Tensor]:
    return {"mask": given["mask"], "clean": given["clean"]} if masked else {}


@over_backends("res2s_midpoint")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@STEPS
@MASKED
def test_midpoint(backend: str, dtype: torch.dtype, shape: tuple[int, ...], step: Res2sStep, masked: bool) -> None:
    given = inputs(*shape, dtype=dtype)
    masks = masks_of(given, masked)
    with serving(backend):
        middle, anchor = ltxkern.res2s_midpoint(given["latent"], given["x0"], given["noise"], step, **masks)
    exact, refined = midpoint(given["latent"], given["x0"], given["noise"], step, masks.get("mask"), masks.get("clean"))
    assert (middle.dtype, anchor.dtype) == (dtype, torch.float64)
    torch.testing.assert_close(anchor, refined, atol=1e-12, rtol=1e-12)
    assert_as_close(middle, exact.to(dtype), exact, wide=1e-13)


@over_backends("res2s_advance")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@STEPS
@MASKED
def test_advance(backend: str, dtype: torch.dtype, shape: tuple[int, ...], step: Res2sStep, masked: bool) -> None:
    given = inputs(*shape, dtype=dtype)
    masks = masks_of(given, masked)
    call = (given["anchor"], given["x0"], given["x0_mid"], given["noise"], step)
    with serving(backend):
        out = ltxkern.res2s_advance(*call, **masks)
    exact = advance(*call, masks.get("mask"), masks.get("clean"))
    assert out.dtype == dtype
    assert_as_close(out, exact.to(dtype), exact, wide=1e-13)


@over_backends("res2s_midpoint")
@STEPS
@MASKED
def test_fp32_arithmetic(backend: str, step: Res2sStep, masked: bool) -> None:
    """compute_dtype=float32 stays close to fp64 and hands an fp32 anchor on."""
    given = inputs(2, 9, 8, dtype=torch.float32)
    masks = masks_of(given, masked)
    ready = given["noise"].float()
    with serving(backend):
        middle, anchor = ltxkern.res2s_midpoint(
            given["latent"], given["x0"], ready, step, **masks, compute_dtype=torch.float32
        )
        out = ltxkern.res2s_advance(anchor, given["x0"], given["x0_mid"], ready, step, **masks)
    exact, refined = midpoint(given["latent"], given["x0"], ready, step, masks.get("mask"), masks.get("clean"))
    assert (anchor.dtype, out.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(middle.double(), exact, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(anchor.double(), refined, atol=1e-5, rtol=1e-5)
    after = advance(anchor, given["x0"], given["x0_mid"], ready, step, masks.get("mask"), masks.get("clean"))
    torch.testing.assert_close(out, after, atol=1e-5, rtol=1e-5)


@over_backends("res2s_midpoint")
@MASKED
def test_raw_noise_with_statistics_is_ready_noise(backend: str, masked: bool) -> None:
    given = inputs(2, 31, 4, dtype=torch.float32)
    masks = masks_of(given, masked)
    raw = 3 * given["noise"] + 1
    with serving(backend):
        ready, stats = ltxkern.normalize_noise(raw), ltxkern.noise_statistics(raw)
        first = ltxkern.res2s_midpoint(given["latent"], given["x0"], ready, REFINED, **masks)
        second = ltxkern.res2s_midpoint(given["latent"], given["x0"], raw, REFINED, **masks, noise_stats=stats)
        call = (first[1], given["x0"], given["x0_mid"])
        third = ltxkern.res2s_advance(*call, ready, REFINED, **masks)
        fourth = ltxkern.res2s_advance(*call, raw, REFINED, **masks, noise_stats=stats)
        fifth = ltxkern.res2s_sde_step(raw, given["anchor"], 0.9, 0.7, ready)
        sixth = ltxkern.res2s_sde_step(raw, given["anchor"], 0.9, 0.7, raw, noise_stats=stats)
    torch.testing.assert_close(second[1], first[1], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(second[0], first[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fourth, third, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sixth, fifth, atol=1e-13, rtol=1e-13)


@over_backends("res2s_midpoint")
def test_x0_is_masked_in_its_own_dtype(backend: str) -> None:
    """The official order: the masked prediction is rounded to bf16 before it enters the fp64 arithmetic."""
    given = inputs(1, 40, 8)
    masks = masks_of(given, True)
    with serving(backend):
        anchor = ltxkern.res2s_midpoint(given["latent"], given["x0"], given["noise"], REFINED, **masks)[1]
    rounded = post(given["x0"], given["mask"], given["clean"])
    unrounded = post(given["x0"].double(), given["mask"], given["clean"])
    assert not torch.equal(rounded.double(), unrounded)
    _, expected = midpoint(given["latent"], given["x0"], given["noise"], REFINED, given["mask"], given["clean"])
    torch.testing.assert_close(anchor, expected, atol=1e-12, rtol=1e-12)


@over_backends("res2s_midpoint")
@MASKED
def test_a_list_is_each_of_its_modalities(backend: str, masked: bool) -> None:
    pair = [inputs(1, 6, 4), inputs(1, 3, 16, seed=20)]
    columns = {name: [given[name] for given in pair] for name in pair[0]}
    masks = {"mask": [pair[0]["mask"], None], "clean": [pair[0]["clean"], None]} if masked else {}
    with serving(backend):
        middles, anchors = ltxkern.res2s_midpoint(columns["latent"], columns["x0"], columns["noise"], REFINED, **masks)
        call = (anchors, columns["x0"], columns["x0_mid"], columns["noise"], REFINED)
        latents = ltxkern.res2s_advance(*call, **masks)
        for index, given in enumerate(pair):
            own = masks_of(given, masked and index == 0)
            middle, anchor = ltxkern.res2s_midpoint(given["latent"], given["x0"], given["noise"], REFINED, **own)
            latent = ltxkern.res2s_advance(anchor, given["x0"], given["x0_mid"], given["noise"], REFINED, **own)
            assert_same((middles[index], anchors[index], latents[index]), (middle, anchor, latent))


@over_backends("res2s_midpoint")
def test_outputs_in_lists(backend: str) -> None:
    given = inputs(1, 9, 6)
    call = [[given[name]] for name in ("latent", "x0", "noise")]
    lists = ([poisoned(given["latent"])], [poisoned(given["anchor"])])
    with serving(backend):
        expected = ltxkern.res2s_midpoint(*call, REFINED)
        ltxkern.res2s_midpoint(*call, REFINED, out=lists)
    assert_same(lists, expected)


@needs_cpu_kernels
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_stores_past_the_caches_change_no_bit(offset: int) -> None:
    """The CPU kernel writes large fp64 results past the caches: bit-equal to the same tokens in two small calls."""
    tokens, half = 8000, 4000
    latent, x0, second, draw = (noise(1, tokens, 127 + offset, dtype=torch.float64, seed=seed) for seed in range(4))
    memory = torch.full((3, latent.numel() + 1), torch.nan, dtype=torch.float64)
    middle, anchor, result = (row[offset : offset + latent.numel()].view_as(latent) for row in memory)
    with ltxkern.use_backend("cpu"):
        ltxkern.res2s_midpoint(latent, x0, draw, REFINED, out=(middle, anchor))
        ltxkern.res2s_advance(anchor, x0, second, draw, REFINED, out=result)
        for part in (slice(0, half), slice(half, tokens)):
            small, start = ltxkern.res2s_midpoint(latent[:, part], x0[:, part], draw[:, part], REFINED)
            ended = ltxkern.res2s_advance(start, x0[:, part], second[:, part], draw[:, part], REFINED)
            assert torch.equal(middle[:, part], small)
            assert torch.equal(anchor[:, part], start)
            assert torch.equal(result[:, part], ended)


@over_backends("res2s_advance")
def test_model_dtype(backend: str) -> None:
    given = inputs(1, 9, 6, dtype=torch.float32)
    call = (given["anchor"], given["x0"], given["x0_mid"], given["noise"], LARGE)
    with serving(backend):
        out = ltxkern.res2s_advance(*call, model_dtype=torch.bfloat16)
        wide = ltxkern.res2s_advance(*call, model_dtype=torch.float64)
    assert_same(out, wide.to(torch.bfloat16))


def wrong_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    x, mask = torch.zeros(1, 6, 4), torch.ones(1, 6, 1)
    return [
        ({"x0": x[:, 1:]}, ValueError, r"x0 must have shape \(1, 6, 4\), got \(1, 5, 4\)"),
        ({"noise": x.long()}, TypeError, "noise must be one of"),
        ({"mask": mask}, ValueError, "mask and clean go together, got mask alone: give both or neither"),
        ({"mask": mask.bool(), "clean": x}, TypeError, "mask must be torch.float32, got torch.bool: use mask.to"),
        ({"mask": mask[..., 0], "clean": x}, ValueError, r"mask must have shape \(1, 6, 1\), got \(1, 6\)"),
        ({"mask": mask, "clean": x[..., :2]}, ValueError, r"clean must have shape \(1, 6, 4\)"),
        ({"noise_stats": torch.zeros(1, 3)}, TypeError, "noise_stats must be torch.float64"),
        (
            {"noise_stats": torch.zeros(2, 3).double()},
            ValueError,
            r"noise_stats must have shape \(1, 3\), got \(2, 3\)",
        ),
        ({"x0": [x, x]}, ValueError, "x0 must have 1 entries, one per modality, got 2"),
    ]


@pytest.mark.parametrize(("given", "error", "words"), wrong_calls())
def test_errors(given: dict[str, Any], error: type[Exception], words: str) -> None:
    x = torch.zeros(1, 6, 4)
    arguments = {"x0": x, "noise": x, **given}
    with pytest.raises(error, match=words):
        ltxkern.res2s_midpoint(x, step=REFINED, **arguments)
    with pytest.raises(error, match=words):
        ltxkern.res2s_advance(x.double(), x0_mid=x, step=REFINED, **arguments)


def test_other_errors() -> None:
    x = torch.zeros(1, 6, 4)
    with pytest.raises(TypeError, match=r"compute_dtype must be torch.float64 or torch.float32, got torch.float16"):
        ltxkern.res2s_midpoint(x, x, x, REFINED, compute_dtype=torch.float16)
    with pytest.raises(TypeError, match=r"anchor must be torch.float64 or torch.float32, got torch.bfloat16"):
        ltxkern.res2s_advance(x.bfloat16(), x, x, x, REFINED)
    with pytest.raises(ValueError, match=r"out\[0\] must have shape"):
        ltxkern.res2s_midpoint(x, x, x, REFINED, out=(x[:, 1:], x.double()))
    with pytest.raises(TypeError, match=r"out\[1\] must be torch.float64, got torch.float32"):
        ltxkern.res2s_midpoint(x, x, x, REFINED, out=(x, x))


@over_backends("res2s_midpoint")
@MASKED
def test_opcheck(backend: str, masked: bool) -> None:
    pair = [inputs(1, 6, 4), inputs(1, 3, 5, seed=20)]
    columns = {name: [transposed(given[name]) for given in pair] for name in pair[0]}
    nothing = [None, None]
    masks = ([pair[0]["mask"], None], [pair[0]["clean"], None]) if masked else (nothing, nothing)
    first = (columns["latent"], columns["x0"], columns["noise"], *masks, nothing)
    second = (columns["anchor"], columns["x0"], columns["x0_mid"], columns["noise"], *masks, nothing)
    ops = torch.ops.ltxkern
    coefficients = [REFINED.contraction, *REFINED.substep]
    # The schema test of torch cannot hold a list of dtypes; test_inputs_stay_as_they_were stands in for it.
    without_schema = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with serving(backend):
        torch.library.opcheck(ops.res2s_midpoint.default, (*first, coefficients, True, torch.float64))
        torch.library.opcheck(
            ops.res2s_advance.default,
            (*second, [0.1, 0.2, *REFINED.advance], [torch.bfloat16, torch.float32]),
            test_utils=without_schema,
        )
