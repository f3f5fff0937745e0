"""Host-side coefficients of the res2s sampler: Python floats, worked out once per schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ltxkern.ops.checks import check_finite_number, check_flag

SUBSTEP_ETA = 0.5
REFINE_MAX_STEP = 0.5
REFINE_MIN_SIGMA = 0.03
SERIES_TERMS = 20


def phi(order: int, z: float) -> float:
    """`phi_j(z) = (e^z - sum_{k<j} z^k / k!) / z^j` as published: the formula, and its limit `1/j!` near zero."""
    if abs(z) < 1e-10:
        return 1.0 / math.factorial(order)
    remainder = sum(z**k / math.factorial(k) for k in range(order))
    return (math.exp(z) - remainder) / z**order


def _series(term: Callable[[int], float], z: float) -> float:
    """`sum_k term(k) z^k` for |z| <= 1, where the closed forms cancel."""
    return math.fsum(term(k) * z**k for k in range(SERIES_TERMS))


def _exact_coefficients(h: float, c2: float) -> tuple[float, float, float]:
    """The coefficients within a few units of the last place at any h."""
    z = -h
    phi_1 = math.expm1(z) / z if z else 1.0
    a21 = -math.expm1(z * c2) / h if h * c2 else c2
    if abs(z) > 1.0:
        return a21, (c2 - 1.0 - c2 * math.exp(z) + phi_1) / (h * c2), (phi_1 - 1.0) / z / c2
    b2 = _series(lambda k: 1.0 / math.factorial(k + 2), z) / c2
    # phi_1 and b2 cancel at c2 = 0.5: b1 has its own series, whose first term is (c2 - 1/2) / c2.
    return a21, _series(lambda k: (c2 * (k + 2) - 1.0) / (c2 * math.factorial(k + 2)), z), b2


def res2s_coefficients(h: float, c2: float = 0.5, *, exact: bool = False) -> tuple[float, float, float]:
    """Coefficients of the second-order exponential Runge-Kutta step.

    `a21 = c2 phi_1(-h c2)`, `b2 = phi_2(-h) / c2`, `b1 = phi_1(-h) - b2`; so `h a21 = 1 - e^(-h/2)` at c2 = 0.5.

    Args:
        h: step size in log-sigma, `-log(sigma_next / sigma)`.
        c2: position of the second stage, in (0, 1].
        exact: by expm1 and series, within 1e-12 of the value at any h; False is the published arithmetic, whose differences cancel
            in small steps (b1 at c2 = 0.5 has a relative error of 1e-9 at h = 0.01 and none of its digits below 1e-5).
            `res2s_steps`, and so the sampler, takes the exact ones.
    Returns:
        (a21, b1, b2).
    Raises:
        TypeError, ValueError: no finite numbers, or c2 outside (0, 1].

    Source: Hochbruck and Ostermann 2005; the res2s sampler of LTX-2.
    """
    check_finite_number("h", h)
    check_finite_number("c2", c2)
    if not 0.0 < c2 <= 1.0:
        raise ValueError(f"c2 must be in (0, 1], got {c2}")
    if exact:
        return _exact_coefficients(h, c2)
    b2 = phi(2, -h) / c2
    return c2 * phi(1, -h * c2), phi(1, -h) - b2, b2


def sde_coefficients(
    sigma_next: float, *, sigma_up: float | None = None, sigma_down: float | None = None
) -> tuple[float, float, float]:
    """Coefficients of the variance-preserving SDE step to `sigma_next`.

    Given sigma_up (capped at 0.9999 sigma_next): `resid = sqrt(max(sigma_next^2 - sigma_up^2, 0))`,
    `alpha_ratio = 1 - sigma_next + resid`, `sigma_down = resid / alpha_ratio`. Given sigma_down:
    `alpha_ratio = (1 - sigma_next) / (1 - sigma_down)`, `sigma_up = sqrt(max(sigma_next^2 - sigma_down^2 alpha_ratio^2, 0))`.
    Given neither: a deterministic step, (1, sigma_next, 0).

    Args:
        sigma_next: noise level after the step, in [0, 1].
        sigma_up: standard deviation of the added noise.
        sigma_down: noise level of the deterministic part.
    Returns:
        (alpha_ratio, sigma_down, sigma_up).
    Raises:
        TypeError, ValueError: no finite numbers, or both sigma_up and sigma_down given.

    Source: the ancestral step of LTX-2.
    """
    check_finite_number("sigma_next", sigma_next)
    for name, value in (("sigma_up", sigma_up), ("sigma_down", sigma_down)):
        if value is not None:
            check_finite_number(name, value)
    if sigma_up is not None and sigma_down is not None:
        raise ValueError(f"give sigma_up or sigma_down, not both, got {sigma_up} and {sigma_down}")
    if sigma_down is not None:
        alpha = _finite((1.0 - sigma_next) / (1.0 - sigma_down) if sigma_down != 1.0 else math.nan, 1.0)
        return alpha, sigma_down, math.sqrt(max(sigma_next**2 - sigma_down**2 * alpha**2, 0.0))
    if sigma_up is None:
        return 1.0, sigma_next, 0.0
    up = min(sigma_up, 0.9999 * sigma_next)
    residual = math.sqrt(max(sigma_next**2 - up**2, 0.0))
    alpha = 1.0 - sigma_next + residual
    down = _finite(residual / alpha if alpha != 0.0 else math.nan, sigma_next)
    return _finite(alpha, 1.0), down, _finite(up, 0.0)


def _finite(value: float, instead: float) -> float:
    # NaN differs from itself; math.isnan would break the graph of a compiled caller.
    return instead if value != value else value


def sde_linear_form(sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    """The SDE step as `x' = A x + B d + S n`: (A, B, S) from host floats.

    `A = alpha (sigma_down - sigma_next) / (sigma - sigma_next)`, `B = alpha (sigma - sigma_down) / (sigma - sigma_next)`,
    `S = sigma_up = eta sigma_next`; (0, 1, 0) where the step is terminal (eta 0 or sigma_next 0): the step then returns d.
    """
    if eta == 0.0 or sigma_next == 0.0:
        return 0.0, 1.0, 0.0
    alpha, down, up = sde_coefficients(sigma_next, sigma_up=eta * sigma_next)
    if up == 0.0:
        return 0.0, 1.0, 0.0
    span = sigma - sigma_next
    return alpha * (down - sigma_next) / span, alpha * (sigma - down) / span, up


@dataclass(frozen=True)
class Res2sStep:
    """Everything one res2s step needs, as host floats.

    Attributes:
        h: `-log(sigma_next / sigma)`.
        a21, b1, b2: Runge-Kutta coefficients; see `res2s_coefficients`.
        substep, advance: (A, B, S) of the SDE steps sigma -> sigma_sub and sigma -> sigma_next; see `sde_linear_form`.
        refine: whether the anchor is refined (h < 0.5 and sigma > 0.03, unless switched off).
        sigma, sigma_sub, sigma_next: noise levels; sigma_sub = sqrt(sigma sigma_next).
    """

    h: float
    a21: float
    b1: float
    b2: float
    substep: tuple[float, float, float]
    advance: tuple[float, float, float]
    refine: bool
    sigma: float = math.nan
    sigma_sub: float = math.nan
    sigma_next: float = math.nan

    @property
    def contraction(self) -> float:
        """`c = h a21 = 1 - e^(-h/2)`: factor of the midpoint and of the anchor recursion."""
        return self.h * self.a21


def _levels(sigmas: Any) -> list[float]:
    """The schedule as floats, from any sequence, array or tensor of one dim."""
    values = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"sigmas must be a sequence of numbers, got {type(sigmas).__name__}")
    levels = []
    for index, value in enumerate(values):
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"sigmas[{index}] must be a number, got {type(value).__name__}")
        levels.append(float(number))
    return levels


def _log_step(sigma: float, sigma_next: float) -> float:
    """`-log(sigma_next / sigma)`; between near levels the rounded quotient has lost what their difference still has."""
    if 2.0 * sigma_next > sigma:
        return -math.log1p((sigma_next - sigma) / sigma)
    return -math.log(sigma_next / sigma)


def res2s_steps(
    sigmas: Sequence[float], eta: float = 0.5, *, substep_eta: float = SUBSTEP_ETA, anchor_refinement: bool = True
) -> list[Res2sStep]:
    """One `Res2sStep` per interval of a schedule whose entries are all positive.

    Args:
        sigmas: decreasing positive noise levels (floats, or a 1-D tensor on the host); a trailing 0 has no log step: the sampler
            replaces it by 0.0011 and one clean evaluation.
        eta: share of sigma_next that each step adds as noise.
        substep_eta: share of sigma_sub that each substep adds; published is 0.5. With both 0 no noise enters.
        anchor_refinement: False leaves every anchor unrefined.
    Returns:
        len(sigmas) - 1 steps.
    Raises:
        TypeError, ValueError: no numbers, fewer than two sigmas, not strictly decreasing, not positive, or an eta negative.
    """
    levels = _levels(sigmas)
    check_finite_number("eta", eta, low=0.0)
    check_finite_number("substep_eta", substep_eta, low=0.0)
    check_flag("anchor_refinement", anchor_refinement)
    if len(levels) < 2:
        raise ValueError(f"sigmas must hold at least two noise levels, got {len(levels)}")
    steps = []
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if not (math.isfinite(sigma) and 0.0 < sigma_next < sigma):
            raise ValueError(
                f"sigmas must be positive and strictly decreasing, got {sigma} then {sigma_next} at index {index}; "
                "replace a trailing 0 by 0.0011"
            )
        h = _log_step(sigma, sigma_next)
        a21, b1, b2 = res2s_coefficients(h, exact=True)
        sigma_sub = math.sqrt(sigma * sigma_next)
        steps.append(
            Res2sStep(
                h=h,
                a21=a21,
                b1=b1,
                b2=b2,
                substep=sde_linear_form(sigma, sigma_sub, substep_eta),
                advance=sde_linear_form(sigma, sigma_next, eta),
                refine=anchor_refinement and h < REFINE_MAX_STEP and sigma > REFINE_MIN_SIGMA,
                sigma=sigma,
                sigma_sub=sigma_sub,
                sigma_next=sigma_next,
            )
        )
    return steps
