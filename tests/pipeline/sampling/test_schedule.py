"""The LTX-2 schedule and its coefficients: shape of the curve, both precisions, and what is refused."""

import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ltxkern.pipeline.sampling import schedule
from ltxkern.pipeline.sampling.schedule import (
    DISTILLED_SIGMAS,
    FP32_MAX_TOKENS,
    STAGE_2_SIGMAS,
    TILED_STAGE_2_SIGMAS,
    ltx2_sigmas,
    res2s_coefficients,
    res2s_steps,
    sde_coefficients,
)


def exact_sigmas(steps: int, tokens: int, terminal: float | None = 0.1) -> list[float]:
    """The formula by its odds in Python floats, independent of the order of operations of either path."""
    slope = 1.1 / 3072
    e = math.exp(min(tokens * slope + 0.95 - slope * 1024, 700.0))
    complement = [(i / (steps - i)) / (e + i / (steps - i)) for i in range(steps)]
    scale = 1.0 if terminal is None else (1 - terminal) / complement[-1]
    return [*(1 - z * scale for z in complement), 0.0]


@pytest.mark.parametrize("steps", [2, 3, 15, 31])
@pytest.mark.parametrize("tokens", [1, 96, 1024, 4096, 8160])
def test_follows_the_formula(steps: int, tokens: int) -> None:
    expected = torch.tensor(exact_sigmas(steps, tokens))
    torch.testing.assert_close(ltx2_sigmas(steps, tokens), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", [2, 15, 50, 200])
@pytest.mark.parametrize("tokens", [FP32_MAX_TOKENS + 1, 60_000, 200_000, 1_900_000])
def test_long_videos_are_computed_in_fp64(steps: int, tokens: int) -> None:
    sigmas = ltx2_sigmas(steps, tokens)
    assert bool((sigmas.diff() < 0).all())
    if tokens <= 60_000:
        torch.testing.assert_close(sigmas, torch.tensor(exact_sigmas(steps, tokens)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [28_000, 34_000, 37_000, 39_999, FP32_MAX_TOKENS])
@pytest.mark.parametrize("steps", [8, 15, 50, 200])
def test_no_two_sigmas_coincide_where_fp32_cannot_tell_them_apart(steps: int, tokens: int) -> None:
    sigmas = ltx2_sigmas(steps, tokens)
    assert bool((sigmas.diff() < 0).all())
    res2s_steps([*sigmas[:-1].tolist(), 0.0011])


def test_ends_and_dtype() -> None:
    sigmas = ltx2_sigmas(15, 8160)
    assert sigmas.dtype == torch.float32
    assert sigmas.device.type == "cpu"
    assert sigmas.shape == (16,)
    assert (float(sigmas[0]), float(sigmas[-1])) == (1.0, 0.0)
    assert float(sigmas[-2]) == pytest.approx(0.1, abs=1e-7)


def test_one_step_has_nothing_to_stretch() -> None:
    assert ltx2_sigmas(1).tolist() == [1.0, 0.0]


def test_defaults_are_4096_tokens() -> None:
    assert torch.equal(ltx2_sigmas(9), ltx2_sigmas(9, 4096))


def test_options() -> None:
    plain = ltx2_sigmas(7, 2000, stretch=False)
    torch.testing.assert_close(plain, torch.tensor(exact_sigmas(7, 2000, None)), atol=6e-7, rtol=0)
    assert float(ltx2_sigmas(7, 2000, terminal=0.25)[-2]) == pytest.approx(0.25, abs=1e-6)
    assert float(ltx2_sigmas(7, 2000, max_shift=3.0)[1]) > float(ltx2_sigmas(7, 2000)[1])
    assert float(ltx2_sigmas(7, 1024, base_shift=1.5)[1]) > float(ltx2_sigmas(7, 1024)[1])


def test_more_tokens_mean_more_steps_at_high_noise() -> None:
    middles = [float(ltx2_sigmas(15, tokens)[8]) for tokens in (96, 1024, 4096, 8160, 100_000)]
    assert middles == sorted(middles)


@pytest.mark.parametrize("fixed", [STAGE_2_SIGMAS, DISTILLED_SIGMAS, TILED_STAGE_2_SIGMAS])
def test_fixed_lists_can_be_sampled(fixed: tuple[float, ...]) -> None:
    assert fixed[-1] == 0.0
    assert len(res2s_steps([*fixed[:-1], 0.0011])) == len(fixed) - 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0,), ValueError, "steps must be at least 1, got 0: use 1"),
        ((15, 0), ValueError, "tokens must be at least 1, got 0"),
        ((15.0,), TypeError, "steps must be an int, got float"),
        ((True,), TypeError, "steps must be an int, got bool"),
    ],
)
def test_counts_that_are_none(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ltx2_sigmas(*arguments)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"terminal": 0.0}, "terminal must be between 0 and 1, got 0.0: use 0.1"),
        ({"terminal": 1.0}, "terminal must be between 0 and 1, got 1.0"),
        ({"terminal": math.nan}, "terminal must be between 0 and 1, got nan"),
        ({"base_shift": math.inf}, "base_shift must be finite, got inf"),
        ({"max_shift": math.nan}, "max_shift must be finite, got nan"),
        ({"max_shift": 1e6}, "use 0.95 and 2.05"),
        ({"tokens": 10**7}, "at 10000000 tokens: use at most 1953280 tokens"),
    ],
)
def test_options_that_are_none(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ltx2_sigmas(15, **{"tokens": 8160, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("h", [1e-12, 1e-6, 0.03, 0.5, 1.6, 5.9])
def test_runge_kutta_identities(h: float) -> None:
    a21, b1, b2 = res2s_coefficients(h)
    assert h * a21 == pytest.approx(-math.expm1(-h / 2), rel=1e-9, abs=1e-16)
    assert h * (b1 + b2) == pytest.approx(-math.expm1(-h), rel=1e-9, abs=1e-16)


@given(exponent=st.floats(-18, 4), c2=st.one_of(st.just(0.5), st.floats(0.01, 1.0)))
@example(exponent=0.0, c2=0.5)  # where series and closed form meet
@example(exponent=-1.5, c2=0.5)
@example(exponent=-300.0, c2=0.5)
def test_exact_coefficients_at_any_step_size(exponent: float, c2: float) -> None:
    h = 10.0**exponent
    actual = res2s_coefficients(h, c2, exact=True)
    with mpmath.workdps(120 if exponent > -18 else 1000):
        z, c = -mpmath.mpf(h), mpmath.mpf(c2)
        phi_1, phi_2 = mpmath.expm1(z) / z, (mpmath.exp(z) - 1 - z) / z**2
        expected = (mpmath.expm1(z * c) / z, phi_1 - phi_2 / c, phi_2 / c)
        # Beside c2 = 0.5, b1 has a root: there its terms are the measure.
        scales = (expected[0], expected[1] if c2 == 0.5 else phi_1, expected[2])
        worst = [abs((a - e) / s) for a, e, s in zip(actual, expected, scales, strict=True)]
    assert max(worst) < 1e-12


def test_a_step_of_no_size_has_its_limit() -> None:
    assert res2s_coefficients(0.0, exact=True) == (0.5, 0.0, 1.0)


def test_steps_take_the_exact_coefficients() -> None:
    """Neighbouring fp32 levels: the published arithmetic has no digit of b1 left, and h itself comes from the difference."""
    far, near = (float(value) for value in (torch.tensor(0.7), torch.nextafter(torch.tensor(0.7), torch.tensor(0.0))))
    (step,) = res2s_steps([far, near])
    assert (step.a21, step.b1, step.b2) == res2s_coefficients(step.h, exact=True)
    with mpmath.workdps(60):
        h = -mpmath.log(mpmath.mpf(near) / mpmath.mpf(far))
        assert abs(step.h / h - 1) < 1e-14
    assert step.b1 == pytest.approx(-step.h / 6, rel=1e-6)
    assert abs(res2s_coefficients(step.h)[1] / step.b1 - 1) > 1


def test_published_arithmetic_differs_by_rounding_in_published_steps() -> None:
    """What the golden runs step over: the exact coefficients are as near as rounding of the latents' own fp64 sums."""
    for step in res2s_steps([*ltx2_sigmas(15, 8160)[:-1].tolist(), 0.0011]):
        for exact, published in zip((step.a21, step.b1, step.b2), res2s_coefficients(step.h), strict=True):
            assert abs(exact - published) < 5e-12


def test_sde_keeps_the_variance() -> None:
    """alpha sigma_down and sigma_up make up sigma_next: the noise level after the step is what was asked for."""
    for sigma_next in (0.0011, 0.3, 0.99):
        for eta in (0.0, 0.5, 1.0):
            alpha, down, up = sde_coefficients(sigma_next, sigma_up=eta * sigma_next)
            assert math.hypot(alpha * down, up) == pytest.approx(sigma_next, rel=1e-12)
            assert alpha * (1 - down) == pytest.approx(1 - sigma_next, rel=1e-9, abs=1e-12)


def test_sde_modes() -> None:
    assert sde_coefficients(0.4) == (1.0, 0.4, 0.0)
    alpha, down, up = sde_coefficients(0.4, sigma_down=0.2)
    assert (alpha, down) == (0.6 / 0.8, 0.2)
    assert up == pytest.approx(math.sqrt(0.16 - (0.2 * 0.75) ** 2))
    with pytest.raises(ValueError, match="sigma_up or sigma_down, not both"):
        sde_coefficients(0.4, sigma_up=0.1, sigma_down=0.1)


def test_steps_of_a_schedule() -> None:
    steps = res2s_steps([1.0, 0.9, 0.4, 0.02, 0.015])
    assert [step.refine for step in steps] == [True, False, False, False]
    assert [step.sigma for step in steps] == [1.0, 0.9, 0.4, 0.02]
    assert steps[0].contraction == pytest.approx(1 - math.exp(-steps[0].h / 2))
    assert not any(step.refine for step in res2s_steps([1.0, 0.9, 0.8], anchor_refinement=False))
    for step in steps:
        a, b, s = step.substep
        assert a + b == pytest.approx(sde_coefficients(step.sigma_sub, sigma_up=0.5 * step.sigma_sub)[0])
        assert s == 0.5 * step.sigma_sub


def test_eta_moves_the_step_and_not_the_substep() -> None:
    quiet, loud = res2s_steps([1.0, 0.5], 0.0)[0], res2s_steps([1.0, 0.5], 0.9)[0]
    assert quiet.substep == loud.substep
    assert quiet.advance == (0.0, 1.0, 0.0)
    assert loud.advance[2] == pytest.approx(0.45)


def test_substep_eta_moves_the_substep_and_not_the_step() -> None:
    default, still = res2s_steps([1.0, 0.5])[0], res2s_steps([1.0, 0.5], substep_eta=0.0)[0]
    assert default == res2s_steps([1.0, 0.5], substep_eta=0.5)[0]
    assert still.advance == default.advance
    assert still.substep == (0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="substep_eta must be at least 0"):
        res2s_steps([1.0, 0.5], substep_eta=-0.5)


@pytest.mark.parametrize(
    ("sigmas", "eta", "words"),
    [
        ([1.0], 0.5, "at least two noise levels, got 1"),
        ([1.0, 1.0], 0.5, "strictly decreasing, got 1.0 then 1.0 at index 0"),
        ([0.5, 0.6], 0.5, "strictly decreasing"),
        ([1.0, 0.5, 0.0], 0.5, "replace a trailing 0 by 0.0011"),
        ([math.nan, 0.5], 0.5, "strictly decreasing"),
        ([1.0, 0.5], -0.1, "eta must be at least 0.0, got -0.1: use 0.0"),
        ([1.0, 0.5], math.nan, "eta must be finite"),
    ],
)
def test_schedules_that_are_none(sigmas: list[float], eta: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        res2s_steps(sigmas, eta)


def test_reexports_are_the_ops_own() -> None:
    import ltxkern

    for name in ("res2s_coefficients", "res2s_steps", "sde_coefficients", "Res2sStep"):
        assert getattr(schedule, name) is getattr(ltxkern, name)
