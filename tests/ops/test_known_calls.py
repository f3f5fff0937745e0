"""Calls that are served again by how their arguments lie: equal bits, and every question that a first call is asked."""

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ltxkern
from ltxkern import dispatch
from ltxkern.compiled import extension, programs, rows
from ltxkern.compiled.steps import Launch
from ltxkern.compiled.tensors import param_code
from ltxkern.layout import row_view
from ltxkern.verify.cases import BF16, CASES, F32, OpCase, Size, Tensors
from tests.csrc.shim_build import shim
from tests.ops.contract import assert_same, compiled, misaligned, noise, strided, transposed
from tests.serving import needs_cpu_kernels

pytestmark = needs_cpu_kernels

KEPT = [case for case in CASES if dispatch.registered()[case.op]._known.made_of is not None]
BY_NAME = {str(case): case for case in KEPT}
NORM = BY_NAME["rms_norm_modulate"]
LARGE = Size(2, 16, 64)


@pytest.fixture(autouse=True)
def unknown() -> Iterator[None]:
    """No call is known before a test, nor after it; proofs have been read, which are a reason to forget all."""
    for op in dispatch.registered().values():
        op.heed_proofs("cpu")
        op.forget()
    programs.made_once.cache_clear()
    yield
    for op in dispatch.registered().values():
        op.forget()


def others(case: OpCase, dtype: torch.dtype, size: Size = LARGE) -> Tensors:
    """Tensors that lie as the case's own, with other values; rows stay among those of the tables."""
    made = case.tensors(dtype, size)
    for name, value in made.items():
        made[name] = value.flip(-1).clone(memory_format=torch.preserve_format) if "rows" in name else value
        if "rows" not in name and not case.beside:
            made[name] = (value * 0.75 + 0.125).to(value.dtype)
    return made


def plainly(case: OpCase, tensors: Tensors, **changed: Any) -> list[Tensor]:
    """The results by way of every check."""
    with ltxkern.use_backend("cpu"):
        return case.run(tensors, **changed)


def served_again(op: str, call: Callable[[], Any]) -> Any:
    """What a call gives, and that no kernel was chosen for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.registered()[op], "select", None)
        return call()


@pytest.mark.parametrize("case", KEPT, ids=str)
@torch.no_grad()
def test_the_next_call_takes_the_program_of_the_first(case: OpCase) -> None:
    for dtype in case.dtypes:
        first, second = case.tensors(dtype, LARGE), others(case, dtype)
        wanted = plainly(case, second)
        case.run(first)
        results = served_again(case.op, lambda second=second: case.run(second))  # type: ignore[misc]
        assert_same(results, wanted)
        assert not any(result is value for result in results for value in second.values())
        # Gradients that nobody wants are no reason.
        with torch.enable_grad():
            assert_same(served_again(case.op, lambda second=second: case.run(second)), wanted)  # type: ignore[misc]
        # Not those of the first call, nor of each other.
        assert len({result.data_ptr() for result in [*results, *case.run(second)]}) == 2 * len(results)


def shifted(value: Tensor) -> Tensor:
    """An element behind an address of 16 bytes."""
    return misaligned(value, 1)


def widened(value: Tensor) -> Tensor:
    """In the dtype of modulations that are wider than x, indices in the other one."""
    return value.to({torch.int32: torch.int64, torch.int64: torch.int32}.get(value.dtype, F32))


@pytest.mark.parametrize("change", [strided, transposed, shifted, widened])
@pytest.mark.parametrize("case", [case for case in KEPT if not case.beside], ids=str)
@torch.no_grad()
def test_what_lies_otherwise_is_another_call(case: OpCase, change: Callable[[Tensor], Tensor]) -> None:
    """Each tensor alone; what the op refuses for it, it refuses after a call that it served."""
    case.run(case.tensors(BF16, LARGE))
    for size in (LARGE, Size(1, 12, 64)):
        tensors = case.tensors(BF16, size)
        for name, value in tensors.items():
            if value.dim() < 2 and change in (strided, transposed):
                continue
            changed = {**tensors, name: change(value)}
            try:
                wanted = plainly(case, changed)
            except (TypeError, ValueError) as error:
                with pytest.raises(type(error), match=re.escape(str(error))):
                    case.run(changed)
                continue
            for _ in range(2):
                assert_same(case.run(changed), wanted)


@torch.no_grad()
def test_addresses_that_no_vector_access_takes_are_another_call() -> None:
    """A GPU would fail there, where a CPU does not care."""
    op = dispatch.registered()[NORM.op]
    tensors = NORM.tensors(F32, LARGE)
    NORM.run(tensors)
    for count, (name, value) in enumerate(tensors.items(), start=2):
        NORM.run({**tensors, name: shifted(value)})
        assert len(op._known) == count


@torch.no_grad()
def test_sines_behind_their_cosines_are_another_call() -> None:
    apart, beside = BY_NAME["qk_norm_rope-rows"], BY_NAME["qk_norm_rope-rows_side_by_side"]
    tensors = beside.tensors(F32, LARGE)
    # Of the same strides, and not beside each other.
    far = dict(tensors, sin=torch.stack([tensors["sin"], tensors["sin"]], dim=-1)[..., 1])
    assert far["sin"].stride() == tensors["sin"].stride() == far["cos"].stride()
    op = dispatch.registered()[apart.op]
    apart.run(tensors)
    known = len(op._known)
    assert_same(apart.run(far), plainly(apart, far))
    assert len(op._known) == known + 1
    # And two that are one tensor.
    same = dict(tensors, sin=tensors["cos"])
    for _ in range(2):
        assert_same(apart.run(same), plainly(apart, same))
    x, y = noise(2, 3, 8).unbind()
    for given in ((x, x, y), (x, y, x), (y, x, x), (x, x, x), (x, y, y)):
        assert_same([ltxkern.gated_residual(*given)], [ltxkern.reference.gated_residual(*given)])


@torch.no_grad()
def test_numbers_are_part_of_a_call() -> None:
    tensors = NORM.tensors(F32, LARGE)
    NORM.run(tensors)
    for eps in (1e-6, 1e-2, 1, 0.5, 1.0):
        for _ in range(2):
            assert_same(NORM.run(tensors, eps=eps), plainly(NORM, tensors, eps=eps))
    for wrong in (True, torch.ones(()), "1", "\ud800"):
        with pytest.raises(TypeError, match="eps must be"):
            NORM.run(tensors, eps=wrong)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must be"):
            NORM.run(tensors, eps=wrong)
    layout = BY_NAME["qk_norm_rope"]
    layout.run(layout.tensors(F32, LARGE))
    given = layout.tensors(F32, LARGE)
    assert_same(layout.run(given, layout="interleaved"), plainly(layout, given, layout="interleaved"))


@pytest.mark.parametrize("case", [case for case in KEPT if "rows" in str(case)], ids=str)
@torch.no_grad()
def test_an_index_outside_its_table_is_an_error_at_every_call(case: OpCase) -> None:
    tensors = case.tensors(F32, LARGE)
    case.run(tensors)
    for name in (name for name in tensors if name.endswith("rows")):
        for wrong in (-1, 3):
            for place in (0, -1):
                bad = tensors[name].clone()
                bad.view(-1)[place] = wrong
                with pytest.raises(ValueError, match=rf"{name} must be at least 0 and below 3"):
                    case.run({**tensors, name: bad})
        # Expanded, and in every second place.
        spread = tensors[name][..., :1].expand(tensors[name].shape)
        for lying in (spread, strided(tensors[name])):
            for _ in range(2):
                assert_same(case.run({**tensors, name: lying}), plainly(case, {**tensors, name: lying}))
    assert_same(case.run(tensors), plainly(case, tensors))


class Watching(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """Notes what torch is asked for."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "ltxkern" in str(func):
            cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_sees_calls_that_it_has_to_see() -> None:
    """Gradients, dual numbers, transforms, modes, tracers, tensors of a subclass, compilers."""
    tensors = NORM.tensors(F32, LARGE)
    with torch.no_grad():
        (wanted,) = NORM.run(tensors)
        NORM.run(tensors)
    x = tensors["x"].clone().requires_grad_()
    (result,) = NORM.run({**tensors, "x": x})
    result.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    (alone,) = NORM.run(tensors)
    assert_same([alone], [wanted])

    def of(x: Tensor) -> Tensor:
        return NORM.run({**tensors, "x": x})[0]

    with torch.no_grad():
        with Watching() as mode:
            of(tensors["x"])
        assert "rms_norm_modulate" in mode.seen
        value, tangent = torch.func.jvp(of, (tensors["x"],), (torch.ones_like(tensors["x"]),))
        torch.testing.assert_close(value, wanted)
        assert bool(tangent.any())
        torch.testing.assert_close(torch.func.vmap(of)(torch.stack([tensors["x"]] * 2))[1], wanted)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensors["x"], torch.ones_like(tensors["x"]))
            assert torch.autograd.forward_ad.unpack_dual(of(dual)).tangent is not None
        torch.testing.assert_close(
            torch.jit.trace(of, (tensors["x"],), check_trace=False)(tensors["x"] * 2), of(tensors["x"] * 2)
        )
        torch.testing.assert_close(compiled(of)(tensors["x"]), wanted)

        assert type(of(tensors["x"].as_subclass(Named))) is Named
        assert Named.seen == ["ltxkern.rms_norm_modulate.default"]
        endless: list[Any] = []
        endless.append(endless)
        for listed in ([1.0], endless):
            with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
                of(listed)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert_same([of(tensors["x"])], [wanted])
    assert not of(tensors["x"]).is_inference()


def test_a_traced_call_is_one_node() -> None:
    x = noise(2, 8)
    with torch.no_grad():
        ltxkern.gated_residual(x, x, x)
        traced = torch.jit.trace(lambda x: ltxkern.gated_residual(x, x, x), (x,), check_trace=False)
    assert [node.kind() for node in traced.graph.nodes()] == ["prim::Constant", "ltxkern::gated_residual"]


@torch.no_grad()
def test_a_negative_view_is_another_call() -> None:
    """Its memory has the negative of its values, and lies as that of any other tensor."""
    tensors = NORM.tensors(F32, LARGE)
    for name, value in tensors.items():
        wanted = NORM.run(tensors)
        assert_same(NORM.run({**tensors, name: torch._neg_view(-value)}), wanted)


@torch.no_grad()
def test_only_a_call_that_passed_the_checks_is_known() -> None:
    """None of the raw op, of a named backend, of what only a capture trusts, and of what is forgotten meanwhile."""
    op, tensors = dispatch.registered()[NORM.op], NORM.tensors(F32, LARGE)
    torch.ops.ltxkern.rms_norm_modulate(tensors["x"], tensors["scale"], tensors["shift"], -1.0, None, None)
    plainly(NORM, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "receipts", set())
        patch.setattr(op, "_first_use", lambda backend, args: backend)
        NORM.run(tensors)
    assert len(op._known) == 0
    with pytest.raises(ValueError, match="eps must be"):
        NORM.run({**tensors, "weight": None}, eps=-1.0)

    kernel = op.kernel

    def forgetful(backend: str) -> Callable[..., None]:
        def run(out: Any, args: Any) -> None:
            kernel(backend)(out, args)
            op.forget()  # as another thread might, meanwhile

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "kernel", forgetful)
        NORM.run(tensors)
    assert len(op._known) == 0
    NORM.run(tensors)
    assert len(op._known) == 1


@torch.no_grad()
def test_memory_that_was_freed_is_an_error() -> None:
    x = noise(4, 16)
    ltxkern.gated_residual(x, x, x)
    freed = noise(4, 16)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="elements and no memory"):
        ltxkern.gated_residual(x, freed, x)


@torch.no_grad()
def test_a_named_backend_serves_known_calls_too() -> None:
    op, tensors = dispatch.registered()[NORM.op], NORM.tensors(BF16, LARGE)
    NORM.run(tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_known", SimpleNamespace(again=None))
        with ltxkern.use_backend("torch"):
            assert_same(NORM.run(tensors), [ltxkern.reference.rms_norm_modulate(**tensors, eps=1e-6)])
        with pytest.raises(TypeError, match="not callable"):  # without a named one it is asked
            NORM.run(tensors)


@torch.no_grad()
def test_calls_keep_no_tensor_and_are_forgotten_when_they_are_many() -> None:
    op = dispatch.registered()["gated_residual"]

    def call(count: int) -> Tensor:
        x = noise(2, count)
        return ltxkern.gated_residual(x, x, x)

    x = noise(3, 5)
    watched = [weakref.ref(x), *(weakref.ref(ltxkern.gated_residual(x, x, x)) for _ in range(2))]
    del x
    gc.collect()
    assert [one() for one in watched] == [None] * 3
    most = 0
    for count in range(1, 4200):
        call(count)
        most = max(most, len(op._known))
    assert most == 4096
    assert len(op._known) < 200
    assert_same([call(7)], [noise(2, 7) + noise(2, 7) * noise(2, 7)])


@torch.no_grad()
def test_threads_share_known_calls() -> None:
    case = BY_NAME["gated_residual_rms_norm_modulate"]
    given = [case.tensors(F32, Size(2, 16 + count, 64)) for count in range(4)]
    wanted = [plainly(case, tensors) for tensors in given]

    @torch.no_grad()
    def work(turns: range) -> None:
        for turn in turns:
            assert_same(case.run(given[turn % 4]), wanted[turn % 4])
            if turn % 50 == 0:
                dispatch.registered()[case.op].forget()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [range(200)] * 4))


def test_launches_of_a_device_are_served_again() -> None:
    """The same memory on the shim, whose device has the CPU's tensors."""
    module, op = shim(), dispatch.registered()["gated_residual"]
    module.use_torch(*extension.given_to_modules())
    known = module.KnownCalls(*op._known.made_of)

    def program(x: Tensor) -> Any:
        view = row_view(x, x, x)
        assert view is not None
        operand = rows.Operand(param_code(x), *view.strides[0])
        case = rows.Case((operand,) * 3, view.outer * view.inner, view.inner, x.shape[-1], 4, column=1)
        steps = rows.gate_steps(case)
        assert all(isinstance(step, Launch) for step in steps)
        return extension.device_program(module, steps, rows.GATE_ARGUMENTS)

    with torch.no_grad():
        x, y, gate = noise(3, 2, 512).unbind()
        out = torch.full_like(x, torch.nan)
        made, args = program(x), op.arguments(x, y, gate, None)
        assert known.again(args) is None
        assert known.note(args, made, (x, y, gate, out, None), out)
        fresh = known.again(op.arguments(y, gate, x, None))
        assert_same([fresh], [ltxkern.reference.gated_residual(y, gate, x)])
        assert known.again(op.arguments(y, gate, x[..., :256], None)) is None
        # A tensor that is neither an argument nor an output, and outputs that lie otherwise.
        assert not known.note(args, made, (x, y, gate.clone(), out, None), out)
        turned = out.t().contiguous().t()
        assert not known.note(args, made, (x, y, gate, turned, None), turned)
        assert not known.note(args, None, (x, y, gate, out, None), out)
