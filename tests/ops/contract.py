"""The numerical contract of the ops as assertions, and the calls every op must survive: opcheck, compile, poisoned outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = [torch.float16, torch.bfloat16, torch.float32]
SAMPLER = [*ACTIVATIONS, torch.float64]


def assert_as_close(
    actual: Tensor,
    composition: Tensor,
    exact: Tensor,
    *,
    factor: float = 1.5,
    free: float | None = None,
    wide: float = 0.0,
) -> None:
    """error(op vs fp64) <= factor x error(torch composition vs fp64), RMS and max.

    Args:
        actual: the op's result.
        composition: the torch ops that it replaces, in the same dtype.
        exact: the same mathematics in fp64 on the same inputs.
        factor: of the composition's error.
        free: what is allowed beside it, as a part of the largest value: half an ulp of it.
        wide: the tolerance of results in fp64, where it is given: their composition is not what they are held to.
    """
    if wide and actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, atol=wide, rtol=wide)
        return
    assert actual.dtype == composition.dtype
    assert actual.shape == composition.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    assert bool(actual.isfinite().all()), "the op leaves non-finite values"
    ours, theirs = (actual.double() - exact).abs(), (composition.double() - exact).abs()
    rounding = float(exact.abs().max()) * (torch.finfo(actual.dtype).eps / 2 if free is None else free)
    for kind, measure in (("maximum", Tensor.max), ("RMS", lambda error: error.square().mean().sqrt())):
        got, limit = float(measure(ours)), factor * float(measure(theirs)) + rounding
        assert got <= limit, f"{kind} error against fp64 is {got:.3e}, allowed {limit:.3e}"


def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output full of NaN, so that an element never written is seen."""
    return torch.full(like.shape, torch.nan, dtype=dtype or like.dtype, device=like.device)


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor."""
    view = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert x.shape[-1] < 2 or not view.is_contiguous()
    return view


def transposed(x: Tensor) -> Tensor:
    """The same values with the last two dims swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(x: Tensor) -> Tensor:
    """The same values of (N, C, *), channels innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def misaligned(x: Tensor, by: int = 1) -> Tensor:
    """The same values, contiguous, `by` elements past an aligned address."""
    return x.new_empty(x.numel() + by)[by:].view(x.shape).copy_(x)


def by_threads(call: Callable[[], Any]) -> list[Any]:
    """What a call gives on one, two and three threads of torch."""
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def assert_gradients(
    op: Callable[..., Any], composition: Callable[..., Any], *given: Tensor, near: float = 1e-5
) -> None:
    """The gradients of an op are those of the torch composition, through another power of each result."""
    sides = []
    for function in (op, composition):
        leaves = [value.detach().clone().requires_grad_() for value in given]
        results = function(*leaves)
        parts = [results] if isinstance(results, Tensor) else results
        sum(part.pow(power).sum() for power, part in enumerate(parts, start=2)).backward()
        sides.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, atol=near, rtol=near)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function traced whole, with dynamic shapes: a graph break is an error, and the op must be opaque with a right fake."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def assert_same(actual: Any, expected: Any) -> None:
    """Bit-equal tensors, or sequences of them, with equal dtypes and strides."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, atol=0, rtol=0, equal_nan=True)
        return
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal numbers of a fixed seed, drawn in fp64 so that every dtype holds the same ones rounded."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
    return (scale * drawn).to(dtype).to(torch.get_default_device())


def doubles(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values in fp64."""
    return [None if value is None else value.double() for value in values]
