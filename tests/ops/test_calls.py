"""Calls around every op, over the table: outputs, layouts, nothing, equal bits on repeat, opcheck, tracing, gradients refused."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern import dispatch, schema
from ltxkern.compiled import programs
from ltxkern.verify.cases import BF16, CASES, F32, MAIN, OpCase, Size
from tests.ops.contract import assert_same, by_threads, compiled, strided, transposed
from tests.serving import backends_of, serving

# What opcheck and the tracer see of a variant that they do not see of the main case.
TRACED = [
    *MAIN,
    *(case for case in CASES if case.variant in ("channels_last", "rows", "three", "3_heads_interleaved", "unmasked")),
    *(case for case in CASES if case.variant in ("raw_noise", "reference") and case.op != "res2s_advance"),
]


def over(cases: Sequence[OpCase], *, once: bool = False) -> Callable[[Any], Any]:
    """Parametrises a test over cases and the backends that run here; `once`: the first of them, where all are called alike."""
    pairs = [(case, backend) for case in cases for backend in backends_of(case.op)[: 1 if once else None]]
    marked = pytest.mark.parametrize(("case", "backend"), pairs, ids=str)
    return lambda test: pytest.mark.usefixtures("backend_device")(marked(test))


@over(CASES)
def test_out(case: OpCase, backend: str) -> None:
    """Every element is written, with the bits of the call without `out`; other arguments stay as they were."""
    for dtype in case.dtypes:
        tensors = case.tensors(dtype)
        kept = {name: value.clone() for name, value in tensors.items()}
        with serving(backend):
            fresh = case.run(tensors)
            if case.in_place:
                first = next(iter(tensors))
                assert fresh[0] is tensors[first]
                assert not torch.equal(fresh[0].float(), kept.pop(first).float())
            else:
                outputs = [torch.full_like(value, torch.nan) for value in fresh]
                assert all(one is other for one, other in zip(case.run(tensors, outputs), outputs, strict=True))
                assert_same(outputs, fresh)
        # A clone of sines beside their cosines is dense.
        assert_same([tensors[name].contiguous() for name in kept], [value.contiguous() for value in kept.values()])


def part(x: Tensor) -> Tensor:
    """The same values, rows of a wider tensor from its third element on."""
    return torch.cat([x[..., :2], x], dim=-1)[..., 2:]


@over([case for case in CASES if not case.last and not case.in_place])
@pytest.mark.parametrize("view", [strided, transposed, part])
def test_layouts(case: OpCase, backend: str, view: Callable[[Tensor], Tensor]) -> None:
    """Tensors that do not lie densely: the values of dense ones, bit for bit where rows do not meet, laid out as torch would."""
    dtype = case.dtypes[-1]
    tensors = case.tensors(dtype, Size(2, 9, 6))
    moved = {name: view(value) if value.dim() > 1 and value.shape[-1] > 1 else value for name, value in tensors.items()}
    with serving("torch"):
        laid_out = case.run(moved)
    with serving(backend):
        expected, results = case.run(tensors), case.run(moved)
    # Torch's own sigmoid and mean round otherwise where elements lie apart.
    exact = case.by_row and (backend != "torch" or case.op not in ("head_gate", "qk_norm_rope"))
    near = 0.0 if exact else 16 * torch.finfo(dtype).eps
    for result, wanted, like in zip(results, expected, laid_out, strict=True):
        assert result.stride() == like.stride()
        torch.testing.assert_close(result, wanted, rtol=near, atol=near)


@over(MAIN, once=True)
def test_negative_views(case: OpCase, backend: str) -> None:
    """Their memory has the negative of their values: these count, and none is written."""
    written = next(iter(case.tensors())) if case.in_place else ""
    with serving(backend):
        for name in case.tensors():
            tensors, wanted = case.tensors(), case.run(case.tensors())
            tensors[name] = torch._neg_view(-tensors[name])
            if name == written:
                with pytest.raises(ValueError, match="cannot write into a negative view"):
                    case.run(tensors)
            else:
                assert_same(case.run(tensors), wanted)
        if outputs := case.outputs(case.tensors()):
            with pytest.raises(ValueError, match="cannot write into a negative view"):
                case.run(case.tensors(), [torch._neg_view(outputs[0]), *outputs[1:]])


@over(MAIN)
def test_whole_numbers_are_numbers(case: OpCase, backend: str) -> None:
    """The bits of the same value as a float."""
    floats = {
        "eps": 2.0,
        "scale": 2.0,
        "sigma": 1.0,
        "cfg_scale": 3.0,
        "stg_scale": 2.0,
        "rescale_scale": 1.0,
        "eta": 1.0,
    }
    taken = inspect.signature(case.function).parameters
    with serving(backend):
        for name, value in floats.items():
            if name not in taken or name in case.shapes():
                continue
            results = []
            for given in (int(value), value):
                programs.made_once.cache_clear()  # to which both are one
                results.append(case.run(case.tensors(), **{name: given}))
            assert_same(*results)


@over([*MAIN, *(case for case in CASES if case.variant == "rows")])
@pytest.mark.parametrize("size", [Size(0, 3, 4), Size(2, 0, 4), Size(2, 3, 0)], ids=str)
def test_empty(case: OpCase, backend: str, size: Size) -> None:
    with serving("torch"):
        wanted = case.run(case.tensors(F32, size))
    with serving(backend):
        for result, expected in zip(case.run(case.tensors(F32, size)), wanted, strict=True):
            torch.testing.assert_close(result, expected, atol=0, rtol=0, equal_nan=True)


@over([case for case in CASES if not case.in_place])
def test_equal_bits_on_repeat_for_any_threads(case: OpCase, backend: str) -> None:
    tensors = case.tensors(BF16, Size(2, 61, 300))
    with serving(backend):
        expected = case.run(tensors)
        for results in by_threads(lambda: case.run(tensors)):
            assert_same(results, expected)


class HandedOverError(Exception):
    """In the place of an op's call."""


def arguments_of(case: OpCase, tensors: dict[str, Tensor]) -> list[Any]:
    """What the public function hands to the op."""
    handed: list[Any] = []

    def take(op: dispatch.Op, args: Any, out: Any = None) -> None:
        handed.extend(args)
        raise HandedOverError

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(HandedOverError):
        patch.setattr(dispatch.Op, "__call__", take)
        case.run(tensors)
    return handed


@over(TRACED, once=True)
def test_opcheck(case: OpCase, backend: str) -> None:
    op = dispatch._registry[case.op]
    plain = case.tensors(F32, Size(2, 5, 4))
    first = next(iter(plain))
    views = [plain] if case.last else [plain, {**plain, first: transposed(plain[first])}]
    with serving(backend):
        for tensors in views:
            args = arguments_of(case, tensors)
            # The schema test of torch cannot hold a list of dtypes; test_out stands in for it.
            dtypes = any(isinstance(value, list) and isinstance(value[0], torch.dtype) for value in args)
            tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            check = {"test_utils": tests} if dtypes else {}
            torch.library.opcheck(op._torch_op.call, tuple(args), **check)
            if op.allocate is not None:
                made = op.allocate(op.arguments(*args))
                outputs = [made] if isinstance(made, Tensor) else list(made)
                torch.library.opcheck(
                    op._torch_op.into, (*args, *(outputs if op._torch_op.outputs else [outputs])), **check
                )
        if op.allocate is not None:
            wanted = {**plain, first: plain[first].clone().requires_grad_()}
            torch.library.opcheck(op._torch_op.call, tuple(arguments_of(case, wanted)), **check)


@over(TRACED, once=True)
def test_compile(case: OpCase, backend: str) -> None:
    """Traced whole, behind and before other ops, for any number of tokens."""

    def call(**tensors: Tensor) -> list[Tensor]:
        return [value + 1 for value in case.run({name: value + 0 for name, value in tensors.items()})]

    with serving(backend):
        function = compiled(call)
        for tokens in (5, 8):
            tensors = case.tensors(F32, Size(2, tokens, 4))
            assert_same(function(**tensors), call(**tensors))


@over([case for case in TRACED if dispatch._registry[case.op].allocate is not None])
def test_jit_trace(case: OpCase, backend: str) -> None:
    """The traced graph holds the op: replayed on other values it gives what the op gives for them."""
    plain = case.tensors(F32, Size(2, 5, 4))
    first = next(iter(plain))
    other = plain[first].flip(-1).contiguous() if not case.last else plain[first].flip(-1)

    def call(value: Tensor) -> list[Tensor]:
        return case.run({**plain, first: value + 0})

    with torch.no_grad(), serving(backend):
        if "Tensor?[]" in schema.kinds(dispatch._registry[case.op].arguments).values():
            # The tracer's own limit, and its own words.
            with pytest.raises(RuntimeError, match="unsupported input list type"):
                torch.jit.trace(call, plain[first], check_trace=False)
            return
        traced = torch.jit.trace(call, plain[first], check_trace=False)
        assert f"ltxkern::{case.op}" in str(traced.graph)
        assert_same(list(traced(other)), call(other))


@pytest.mark.parametrize("case", [case for case in MAIN if case.in_place], ids=str)
def test_a_wanted_gradient_is_an_error(case: OpCase) -> None:
    tensors = case.tensors()
    for name, value in tensors.items():
        if value.is_floating_point():
            with pytest.raises(RuntimeError, match=f"ltxkern.{case.op} .*has no backward"):
                case.run({**tensors, name: value.clone().requires_grad_()})
