"""Small transformers with LoRAs for the tests of phases, and what a fresh merge makes of their weights."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ltxkern.pipeline.files.lora import LoRA, LoRAFactors, LoRAPhase, lora_phases
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.merge import merge_phase


class Blocks(nn.Module):
    """An outer Linear, `transformer_blocks` of two Linears and a buffer each, and an outer Linear with another shape."""

    def __init__(self, width: int, hidden: int, blocks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(blocks)
        )
        self.proj_out = nn.Linear(width, 3)
        self.register_buffer("table", torch.ones(width))
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x) * self.table
        for block in self.transformer_blocks:
            x = x + block(x)
        return self.proj_out(x)


def small_model(
    *, seed: int = 0, width: int = 48, hidden: int = 80, blocks: int = 3, dtype: torch.dtype = torch.bfloat16
) -> Blocks:
    """Random weights of std 0.02."""
    torch.manual_seed(seed)
    model = Blocks(width, hidden, blocks, dtype)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return model


def random_lora(name: str, model: nn.Module, *, seed: int, rank: int = 7, size: float = 0.2) -> LoRA:
    """Factors for every Linear; at strength 1 the product has `size` times the spread of the weights."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            b *= size * module.weight.float().std() / rank**0.5
            dtype = module.weight.dtype
            factors[module_name] = LoRAFactors(a.to(dtype), b.to(dtype))
    return LoRA(name, factors)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights of all Linears by module name."""
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def fresh_merges(
    pristine: Mapping[str, Tensor], phases: Sequence[LoRAPhase], rounding: str = "reference"
) -> dict[LoRAPhase, dict[str, Tensor]]:
    """Every phase merged into copies of the pristine weights."""
    merge = functools.partial(merge_phase, rounding=rounding)
    return {phase: {name: merge(w.clone(), name, phase) for name, w in pristine.items()} for phase in phases}


def assert_weights(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """The Linears hold exactly these bits."""
    for name, weight in expected.items():
        found = model.get_submodule(name).weight
        assert found.dtype == weight.dtype
        assert torch.equal(found.view(-1).view(torch.uint8), weight.view(-1).view(torch.uint8)), name


def prepared(
    model: nn.Module, phases: Sequence[LoRAPhase], mode: str | None = None, *, pristine: Any = None, **settings: Any
) -> TwoStageDeviceManager:
    """A manager, for a `with`, that has the model and has made these phases ready."""
    manager = TwoStageDeviceManager(mode, **settings)
    manager.attach(model, pristine=pristine)
    manager.prepare(*phases)
    return manager


def assert_switches(
    manager: TwoStageDeviceManager, model: nn.Module, expected: Mapping[LoRAPhase, Mapping[str, Tensor]], *to: LoRAPhase
) -> None:
    """A switch to each of the phases in turn gives exactly its weights."""
    for phase in to:
        manager.switch_lora_phase(phase)
        assert_weights(model, expected[phase])


class Fresh(NamedTuple):
    """A model, its pristine weights, phases of random LoRAs, and what fresh merges of these give."""

    model: Blocks
    pristine: dict[str, Tensor]
    phases: tuple[LoRAPhase, ...]
    expected: dict[LoRAPhase, dict[str, Tensor]]


def fresh(*more: LoRAPhase, user: bool = False, **size: int) -> Fresh:
    """Phases of both stages; with `user` a third of two LoRAs; what fresh merges of those and of `more` give."""
    model = small_model(**size)
    distilled = random_lora("distilled", model, seed=1)
    phases = tuple(lora_phases([], distilled))
    if user:
        phases += (LoRAPhase(((random_lora("user", model, seed=2), 0.4), (distilled, 0.25))),)
    pristine = linear_weights(model)
    return Fresh(model, pristine, phases, fresh_merges(pristine, [*phases, *more]))


class Shared(nn.Module):
    """Two parameters and a buffer in one storage, a tied weight, an empty parameter."""

    def __init__(self):
        super().__init__()
        base = torch.arange(12.0)
        self.first = nn.Parameter(base[:6].view(2, 3))
        self.second = nn.Parameter(base[4:8])
        self.register_buffer("third", base[8:])
        self.tied = self.first
        self.empty = nn.Parameter(torch.empty(0, 3))


def one_lora(name="a", *, rank=3, alpha=None, seed=0, size=(5, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, size[1], generator=generator).to(dtype)
    b = torch.randn(size[0], rank, generator=generator).to(dtype)
    return LoRA(name, {"m": LoRAFactors(a, b, alpha)})


class Touched(TorchDispatchMode):
    """Writes down every op, views left out, that is given a part of one storage."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._storage = tensor.untyped_storage().data_ptr()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if not func.is_view and any(value.untyped_storage().data_ptr() == self._storage for value in given):
            self.ops.append(func.name())
        return func(*args, **(kwargs or {}))

    def kernel_calls(self) -> int:
        """Calls of the one op, of ltxkern, that met the storage."""
        (kernel,) = set(self.ops) - {"aten::empty_like"}
        assert kernel.startswith("ltxkern::")
        return self.ops.count(kernel)
