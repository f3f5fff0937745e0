"""The numerical contract of the ops as assertions, and the calls every op must survive: opcheck, compile, poisoned outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ltxkern
from ltxkern.verify.cases import OpCase, Size
from ltxkern.verify.values import channels_last, misaligned, noise, poisoned, strided, transposed

__all__ = ["channels_last", "misaligned", "noise", "poisoned", "strided", "transposed"]

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
    exact_of_composition: Tensor | None = None,
) -> None:
    """error(op vs fp64) <= factor x error(torch composition vs fp64), RMS and max.

    Args:
        actual: the op's result.
        composition: the torch ops that it replaces, in the same dtype.
        exact: the same mathematics in fp64 on the same inputs.
        factor: of the composition's error.
        free: what is allowed beside it, as a part of the largest value: half an ulp of it.
        wide: the tolerance of results in fp64, where it is given: their composition is not what they are held to.
        exact_of_composition: where the composition went on from an intermediate result that it rounded otherwise.
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
    like = exact if exact_of_composition is None else exact_of_composition
    ours, theirs = (actual.double() - exact).abs(), (composition.double() - like).abs()
    rounding = float(exact.abs().max()) * (torch.finfo(actual.dtype).eps / 2 if free is None else free)
    for kind, measure in (("maximum", Tensor.max), ("RMS", lambda error: error.square().mean().sqrt())):
        got, limit = float(measure(ours)), factor * float(measure(theirs)) + rounding
        assert got <= limit, f"{kind} error against fp64 is {got:.3e}, allowed {limit:.3e}"


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


def doubles(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values in fp64."""
    return [None if value is None else value.double() for value in values]


def held_to_torch(case: OpCase, backend: str, dtype: torch.dtype, size: Size, shift: int = 0) -> list[Tensor]:
    """A call on a backend against the op's reference, tensors up to `shift` elements past an aligned address; the results."""
    given = {
        name: misaligned(value, min(place, shift)) if shift and not (case.last and value.dim() == 4) else value
        for place, (name, value) in enumerate(case.tensors(dtype, size).items())
    }
    kept = {name: value.clone() for name, value in given.items()}
    with ltxkern.use_backend("torch"):
        wanted = case.run({name: value.clone() for name, value in given.items()} if case.in_place else given)
    outputs = [poisoned(value) if case.last else misaligned(poisoned(value), shift) for value in wanted if case.out]
    with ltxkern.use_backend(backend):
        ours = case.run(given, outputs)
    for one, other in zip(ours, wanted, strict=True):
        # Roundings of the compute dtype, one of the result's, and one of each step of a composition in the given dtype.
        eps = max(torch.finfo(one.dtype).eps, torch.finfo(dtype).eps)
        near = {"rtol": 4 * eps, "atol": 8 * eps * max(1.0, float(other.float().abs().max()))}
        assert one.dtype == other.dtype
        torch.testing.assert_close(
            one.double(), other.double(), msg=lambda text: f"{case} {dtype} {size}: {text}", **near
        )
    written = list(given)[:1] if case.in_place else []
    assert all(torch.equal(value, kept[name]) for name, value in given.items() if name not in written)
    return ours
