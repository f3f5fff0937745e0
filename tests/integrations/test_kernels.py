"""`kernel_mapping` in HF's `kernels` where it is installed, and in a stand-in that binds and refuses layers by its rules."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltxkern
import ltxkern.nn
from ltxkern.integrations import kernels as ours
from ltxkern.integrations.kernels import kernel_mapping
from tests.ops.contract import compiled

Decorator = Callable[[str], Callable[[type[nn.Module]], type[nn.Module]]]


class StandIn:
    """The part of `kernels` that a mapping meets: layers under names, a mapping for a time, forwards bound to the modules."""

    Mode = SimpleNamespace(INFERENCE="inference")

    def __init__(self) -> None:
        self.mapping: dict[str, dict[str, Any]] = {}

    def use_kernel_forward_from_hub(self, name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
        def named(kind: type[nn.Module]) -> type[nn.Module]:
            kind.kernel_layer_name = name  # type: ignore[attr-defined]
            return kind

        return named

    @contextmanager
    def use_kernel_mapping(self, mapping: dict[str, dict[str, Any]], *, inherit_mapping: bool = True) -> Iterator[None]:
        before, self.mapping = self.mapping, {**(self.mapping if inherit_mapping else {}), **mapping}
        yield
        self.mapping = before

    def kernelize(self, model: nn.Module, *, mode: Any, device: str) -> nn.Module:
        for module in model.modules():
            if hasattr(type(module), "kernel_layer_name"):
                repository = self.mapping.get(type(module).kernel_layer_name, {}).get(device)
                layer = type(module) if repository is None else self.loaded(repository, type(module))
                module.forward = MethodType(layer.forward, module)
        return model

    def loaded(self, repository: Any, kind: type[nn.Module]) -> type[nn.Module]:
        layer = {repository: repository.load()}[repository]
        assert layer.__init__ is nn.Module.__init__
        members = ({name for name, _ in inspect.getmembers(one)} for one in (layer, nn.Module))
        assert next(members) - next(members) <= {"can_torch_compile", "has_backward"}
        given, wanted = (inspect.signature(one.forward).parameters.values() for one in (layer, kind))
        assert [one.kind for one in given] == [one.kind for one in wanted]
        return layer


@pytest.fixture(params=["stand-in", "kernels"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return StandIn() if request.param == "stand-in" else pytest.importorskip("kernels", minversion="0.17")


def layers(named: Decorator) -> dict[str, type[nn.Module]]:
    """Layers that another stack declares: the two of transformers, and those that have the parameters of `ltxkern.nn`."""

    class RMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width)), 1e-6

        def forward(self, hidden_states: Tensor) -> Tensor:
            normed = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=self.variance_epsilon)
            return self.weight * normed.to(hidden_states.dtype)

    class RMSNormZeroCentered(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(width)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * (1.0 + self.weight.float())).type_as(x)

    class GroupNormSiLU(nn.GroupNorm):
        def __init__(self, width: int) -> None:
            super().__init__(2, width)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(super().forward(x))

    class PixelNormSiLU(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.eps, self.gamma = 1e-6, None

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps))

    class RMSNormModulate(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.eps, self.weight = 1e-6, None

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor, rows: Tensor | None = None) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift

    found = (RMSNorm, RMSNormZeroCentered, GroupNormSiLU, PixelNormSiLU, RMSNormModulate)
    return {kind.__name__: named(kind.__name__)(kind) for kind in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_run_on_ours_and_go_back(kernels: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result is further from fp64 than the layer's own, and the gradients are those of it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: kind(8) for name, kind in layers(kernels.use_kernel_forward_from_hub).items()})
    x, *modulation = torch.randn(2, 8, 3, 8), torch.randn(8), torch.randn(8)

    def run(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        model.to(dtype)
        found = {}
        for name, layer in model.items():
            given = [one.to(dtype) for one in (modulation if name == "RMSNormModulate" else [])]
            y = layer(leaf := x.to(dtype).detach().requires_grad_(), *given)
            assert y.dtype == dtype
            found[name] = y, *torch.autograd.grad(y.square().sum(), leaf)
        return found

    model.to(dtype)
    mode: Any = kernels.Mode.INFERENCE
    stock, exact = run(dtype), run(torch.float64)
    with kernels.use_kernel_mapping(kernel_mapping()):
        assert kernels.kernelize(model, mode=mode, device="cpu") is model
    served = count_calls(monkeypatch)
    fused = run(dtype)
    assert sorted(served) == ["group_norm_silu", "pixel_norm_silu", *["rms_norm_modulate"] * 3]
    for name, results in exact.items():
        for right, plain, one in zip(results, stock[name], fused[name], strict=True):
            least = 4 * torch.finfo(dtype).eps * right.abs().max()
            assert (one - right).abs().max() <= max((plain - right).abs().max(), least), name
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu")
    assert all(torch.equal(y, stock[name][0]) for name, (y, _) in run(dtype).items())


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that the layers call from now on."""
    served: list[str] = []

    def counted(op: str) -> Callable[..., Tensor]:
        call = getattr(ltxkern, op)
        return lambda *args, **options: served.append(op) or call(*args, **options)

    for home in (ours, ltxkern.nn):
        for op in {"rms_norm_modulate", "group_norm_silu", "pixel_norm_silu"} & vars(home).keys():
            monkeypatch.setattr(home, op, counted(op))
    return served


def test_queries_and_keys(kernels: Any) -> None:
    class QKNormRope(ltxkern.nn.QKNormRope):
        pass

    norms: Any = kernels.use_kernel_forward_from_hub("QKNormRope")(QKNormRope)(heads=2, head_dim=4)
    q, k = torch.randn(2, 1, 5, 8).unbind()
    tables = ltxkern.nn.RotaryTables(torch.randn(1, 2, 5, 2), torch.randn(1, 2, 5, 2))
    wanted = norms(q, k, tables)
    with kernels.use_kernel_mapping(kernel_mapping("QKNormRope")):
        kernels.kernelize(norms, mode=kernels.Mode.INFERENCE, device="cpu")
    torch.testing.assert_close(norms(q, k, tables), wanted)


def test_what_no_op_takes_and_what_traces() -> None:
    """Weights of another dtype go by the composition; a bound forward is one graph."""
    kernels = StandIn()
    norm = layers(kernels.use_kernel_forward_from_hub)["RMSNorm"](8)
    x = torch.randn(2, 3, 8)
    wanted = norm(x), norm(x.bfloat16())
    with kernels.use_kernel_mapping(kernel_mapping(["RMSNorm"], devices=["cpu"])):
        kernels.kernelize(norm, mode="inference", device="cpu")
    torch.testing.assert_close((norm(x), norm(x.bfloat16())), wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(norm)(x), wanted[0].detach())


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers must be .*RMSNorm.*, got 'LayerNorm'"):
        kernel_mapping(["LayerNorm"])
    mapping = kernel_mapping("RMSNorm", devices=["cuda"])
    assert str(mapping["RMSNorm"]["cuda"]) == "layer `RMSNorm` of ltxkern"
    assert mapping.keys() == {"RMSNorm"} == {one.layer_name for one in mapping["RMSNorm"].values()}
