"""Ops inside anybody's program: each op under each of torch's transformations works, or says in one sentence that it does not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import ltxkern
from ltxkern.verify.cases import CASES, F32, F64, MAIN, OpCase, Size, Tensors
from tests.ops.contract import compiled
from tests.serving import backends_of

Call = Callable[[Tensor], Any]
SIZE = Size(2, 3, 4)
VARIANTS = ("rows", "own", "raw_noise", "unmasked", "channels_last")
FUNCTIONAL = [case for case in CASES if not case.in_place and case.variant in ("", *VARIANTS)]
MERGE = next(case for case in MAIN if case.in_place)


def follow(case: OpCase, tensors: Tensors, name: str = "") -> tuple[Call, Tensor]:
    """The call as a function of one argument, the first unless it is named, and that argument."""
    name = name or next(iter(tensors))
    return lambda value: tuple(case.run({**tensors, name: value})), tensors[name]


def total(call: Call, value: Tensor) -> Tensor:
    """A number whose derivatives differ by result."""
    results = call(value)
    return sum((result.double().pow(power).sum() for power, result in enumerate(results, start=2)), torch.zeros(()))


def close(actual: object, expected: object, near: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=near, rtol=near)


def gradient(call: Call, value: Tensor) -> Tensor:
    leaf = value.detach().clone().requires_grad_()
    return torch.autograd.grad(total(call, leaf), leaf)[0]


def tangents(call: Call, value: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    """Forward derivative by two backward passes of the op itself."""
    made: tuple[Tensor, ...] = torch.autograd.functional.jvp(call, value, direction)[1]
    return made


def by_vmap(case: OpCase, tensors: Tensors) -> None:
    for name in (next(iter(tensors)), list(tensors)[-1]):
        call, value = follow(case, tensors, name)
        entries = [value, value.flip(0), value]
        wanted = [torch.stack(results) for results in zip(*map(call, entries), strict=True)]
        close(list(torch.func.vmap(call)(torch.stack(entries))), wanted)


def by_grad(case: OpCase, tensors: Tensors) -> None:
    call, value = follow(case, tensors)
    close(torch.func.grad(lambda one: total(call, one))(value), gradient(call, value))


def by_jvp(case: OpCase, tensors: Tensors) -> None:
    call, value = follow(case, tensors)
    direction = value.flip(0)
    close(torch.func.jvp(call, (value,), (direction,))[1], tangents(call, value, direction))


def by_dual_numbers(case: OpCase, tensors: Tensors) -> None:
    call, value = follow(case, tensors)
    with torch.no_grad(), forward_ad.dual_level():
        results = call(forward_ad.make_dual(value, value.flip(0)))
        got = [(result, forward_ad.unpack_dual(result).tangent) for result in results]
    # What does not depend on the argument has none.
    got = [torch.zeros_like(result) if tangent is None else tangent for result, tangent in got]
    close(got, list(tangents(call, value, value.flip(0))))


def by_double_backward(case: OpCase, tensors: Tensors) -> None:
    """The second gradient is that of the composition, also where one argument is made of another."""
    for name in (next(iter(tensors)), list(tensors)[-1]):
        if not tensors[name].is_floating_point():
            continue
        call, value = follow(case, tensors, name)
        leaf = (value / 2).requires_grad_()
        (first,) = torch.autograd.grad(total(call, leaf + leaf.detach()), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        wanted = torch.func.grad(lambda one, call=call: torch.func.grad(lambda x: total(call, x))(one).square().sum())
        close(second, wanted(value), near=1e-3)
        assert second.abs().max() > 0


def by_functionalize(case: OpCase, tensors: Tensors) -> None:
    call, value = follow(case, tensors)
    close(torch.func.functionalize(call)(value), call(value))


def by_make_fx(case: OpCase, tensors: Tensors) -> None:
    call, value = follow(case, tensors)
    traced = make_fx(call)(value)
    assert f"ltxkern.{case.op}" in traced.code
    close(tuple(traced(value.flip(0))), call(value.flip(0)))


def by_jit_trace(case: OpCase, tensors: Tensors) -> None:
    """With gradients wanted of the argument, too: the graph holds the op."""
    call, value = follow(case, tensors)
    leaf = value.clone().requires_grad_()
    if case.op in ("res2s_midpoint", "res2s_advance"):
        # The tracer's own limit, and its own words.
        with pytest.raises(RuntimeError, match="unsupported input list type"):
            torch.jit.trace(call, leaf, check_trace=False)
        return
    traced = torch.jit.trace(call, leaf, check_trace=False)
    assert f"ltxkern::{case.op}" in str(traced.graph)
    close(tuple(traced(value.flip(0))), call(value.flip(0)))


def by_export(case: OpCase, tensors: Tensors) -> None:
    call, value = follow(case, tensors)

    class Caller(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return call(x)

    exported = torch.export.export(Caller(), (value,))
    assert f"ltxkern.{case.op}" in str(exported.graph)
    close(tuple(exported.module()(value.flip(0))), call(value.flip(0)))


TRANSFORMS = [
    *(by_vmap, by_grad, by_jvp, by_dual_numbers, by_double_backward),
    *(by_functionalize, by_make_fx, by_jit_trace, by_export),
]


# Export sees no more of a variant than of the main case.
TABLE = [
    pytest.param(case, transform, id=f"{case}-{transform.__name__.removeprefix('by_')}")
    for case in FUNCTIONAL
    for transform in TRANSFORMS
    if transform is not by_export or not case.variant
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("case", "transform"), TABLE)
def test_functional_op(case: OpCase, transform: Callable[[OpCase, Tensors], None]) -> None:
    transform(case, case.tensors(F32, SIZE))


def test_gradients_of_a_list_with_an_absent_entry() -> None:
    """Of two modalities one has no mask: the other's mask and clean latents get theirs, as alone."""
    case = next(case for case in MAIN if case.op == "res2s_advance")
    tensors = case.tensors(F32, SIZE)
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    case.run(leaves)[0].square().sum().backward()
    both = {name: [value.clone().requires_grad_(), value.clone().requires_grad_()] for name, value in tensors.items()}
    both |= {name: [None, both[name][1]] for name in ("mask", "clean")}
    case.function(**both, **case.others)[1].square().sum().backward()
    for name, leaf in leaves.items():
        close(both[name][1].grad, leaf.grad)


def test_transforms_of_transforms() -> None:
    """Hessian, gradients per sample, a compiled vmap and a compiled gradient: against the composition."""
    x, weight = torch.randn(3, 4, 2), torch.rand(4)
    # Under vmap an entry is (4, 2): its channels are the second dim.
    weights = {2: weight[:2], 3: weight}

    def op(one: Tensor) -> Tensor:
        return ltxkern.pixel_norm_silu(one, 0.1, weight=weights[one.dim()]).square().sum()

    def composition(one: Tensor) -> Tensor:
        return ltxkern.reference.pixel_norm_silu(one, 0.1, weights[one.dim()]).square().sum()

    for transform in (torch.func.hessian, torch.func.jacfwd, torch.func.grad):
        close(torch.func.vmap(transform(op))(x), torch.func.vmap(transform(composition))(x))
        close(transform(op)(x), transform(composition)(x))
    close(compiled(torch.func.vmap(op))(x), torch.func.vmap(composition)(x))
    close(compiled(torch.func.grad(op))(x), torch.func.grad(composition)(x))


def under(transform: str, call: Call) -> None:
    """Run a call under a transform."""
    value = torch.ones(2)
    if transform == "duals":
        with forward_ad.dual_level():
            call(value)
    elif transform == "jvp":
        torch.func.jvp(call, (value,), (value,))
    else:
        getattr(torch.func, transform)(call)(value)


@pytest.mark.parametrize("case", [*(case for case in MAIN if case.out), MERGE], ids=str)
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize", "duals"])
def test_writing_into_a_given_tensor_is_refused(case: OpCase, transform: str) -> None:
    tensors = case.tensors(F32, SIZE)
    outputs = [] if case.in_place else case.outputs(tensors)
    kept = copy.deepcopy([*tensors.values()])

    def call(*_: Tensor) -> Any:
        return case.run(tensors, outputs)[0].sum()

    with pytest.raises(RuntimeError, match=rf"ltxkern\.{case.op} writes into a given tensor, which torch.func and"):
        under(transform, call)
    assert all(map(torch.equal, tensors.values(), kept))
    assert all(output.isnan().all() for output in outputs)


def test_a_forced_backend_and_a_transform() -> None:
    with (
        ltxkern.use_backend("triton", "cpu"),
        pytest.raises(ltxkern.BackendError, match=r"ltxkern\.head_gate: torch\.func .* permit torch, too"),
    ):
        torch.func.vmap(ltxkern.head_gate)(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4))


@pytest.mark.parametrize("case", [*(case for case in MAIN if case.out), MERGE], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_what_is_written_is_known_to_autograd(case: OpCase, backend: str) -> None:
    """A tensor that a backward needs raises once it is overwritten, in eager calls and through torch.ops alike."""
    if backend not in backends_of(case.op):
        pytest.skip(f"no backend {backend} here")
    tensors = case.tensors(F32, SIZE)
    with ltxkern.use_backend(backend):
        for compiled_call in {False, backend == "cpu"}:
            written = [next(iter(tensors.values()))] if case.in_place else case.outputs(tensors)
            scale = torch.ones((), requires_grad=True)
            products = [scale * one for one in written]
            versions = [one._version for one in written]
            run = torch.compile(case.run, backend="aot_eager") if compiled_call else case.run
            run(tensors, [] if case.in_place else written)
            assert all(one._version > version for one, version in zip(written, versions, strict=True))
            for product in products:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    product.sum().backward()


def test_tensors_of_inference_mode() -> None:
    """Nothing is changed before the refusal; within inference mode they are written as others are."""
    with torch.inference_mode():
        weight, out = torch.randn(4, 6), torch.zeros(4, 6)
    a, b, plain = torch.randn(2, 6), torch.randn(4, 2), torch.randn(4, 6)
    kept, kept_plain = weight.clone(), plain.clone()
    words = r"ltxkern\.{} writes into a tensor of shape \(4, 6\) made in inference mode"
    for call, name in (
        (lambda: ltxkern.merge_lora_(weight, a, b), "merge_lora_"),
        (lambda: ltxkern.merge_lora_many_([plain, weight], [a, a], [b, b]), "merge_lora_"),
        (lambda: ltxkern.channelwise_normalize(plain, out=out), "channelwise_normalize"),
    ):
        with pytest.raises(RuntimeError, match=words.format(name)):
            call()
    assert torch.equal(weight, kept)
    assert torch.equal(plain, kept_plain)
    assert not out.any()
    with torch.inference_mode():
        ltxkern.merge_lora_(weight, a, b)
        ltxkern.channelwise_normalize(plain, out=out)
    close(weight, kept + b @ a)
    close(out, ltxkern.channelwise_normalize(plain))


CHECKED = [(case, dtype) for case in FUNCTIONAL for dtype in case.dtypes]


@pytest.mark.parametrize(("case", "dtype"), CHECKED, ids=str)
def test_gradcheck(case: OpCase, dtype: torch.dtype) -> None:
    """Gradients of all arguments: by differences where the dtype resolves them, else those of fp32 at the same values."""
    tensors = case.tensors(dtype, Size(1, 3, 2))
    names = [name for name, value in tensors.items() if value.is_floating_point()]

    def call(*doubles: Tensor) -> tuple[Tensor, ...]:
        given = {name: double.to(tensors[name].dtype) for name, double in zip(names, doubles, strict=True)}
        return tuple(result.double() for result in case.run({**tensors, **given}))

    leaves = [tensors[name].double().requires_grad_() for name in names]
    if dtype in (F32, F64):
        assert torch.autograd.gradcheck(call, leaves, eps=2e-3, atol=2e-3, rtol=2e-3)
        return
    got = torch.autograd.grad(sum(result.sin().sum() for result in call(*leaves)), leaves)
    tensors = {name: value.float() if value.dtype == dtype else value for name, value in tensors.items()}
    wanted = torch.autograd.grad(sum(result.sin().sum() for result in call(*leaves)), leaves)
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs, near=16 * torch.finfo(dtype).eps * max(1.0, float(theirs.abs().max())))
