"""What the recipes of docs/stacks find: a model, a pipeline or a package of each stack, small or a stand-in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.docs.documents import ROOT

STACKS = ROOT / "docs" / "stacks"
Names = dict[str, Any]


@contextmanager
def _diffusers(folder: Path) -> Iterator[Names]:
    """A stock pipeline of tiny components that takes a prompt's embeddings from here."""
    from diffusers import AutoencoderKLLTX2Video, LTX2Pipeline

    from tests.integrations.test_diffusers import FRAMES, UNGUIDED, components, prompt

    class Pipe(LTX2Pipeline):
        def __call__(self, text: str) -> Any:
            settings = {**FRAMES, **UNGUIDED, **prompt(), "num_inference_steps": 2, "output_type": "latent"}
            return super().__call__(**settings)

    parts = components()
    pipe = Pipe(**{**parts, "vae": AutoencoderKLLTX2Video.from_config(parts["vae"].config)})
    pipe.set_progress_bar_config(disable=True)
    yield {"pipe": pipe}


@contextmanager
def _sglang(folder: Path) -> Iterator[Names]:
    from tests.integrations.test_sglang import package

    with package(folder):
        importlib.import_module("sglang.jit_kernel.diffusion.residual_gate_add")
        yield {}


@contextmanager
def _official(folder: Path) -> Iterator[Names]:
    from tests.integrations.test_official import Block

    yield {"model": Block()}


@contextmanager
def _kernels(folder: Path) -> Iterator[Names]:
    """The package itself where it is installed; the model's layers are named through it."""
    from tests.integrations.test_kernels import StandIn, layers

    with pytest.MonkeyPatch.context() as patch:
        kernels: Any = StandIn()
        if importlib.util.find_spec("kernels") is None:
            module: Any = ModuleType("kernels")
            for name in ("Mode", "kernelize", "use_kernel_mapping", "use_kernel_forward_from_hub"):
                setattr(module, name, getattr(kernels, name))
            patch.setitem(sys.modules, "kernels", module)
        kernels = importlib.import_module("kernels")
        yield {"model": layers(kernels.use_kernel_forward_from_hub)["RMSNorm"](8)}


@contextmanager
def _pytorch(folder: Path) -> Iterator[Names]:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1))

    def denoiser(x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        out: Tensor = model(x)
        return out.tanh()

    yield {
        "model": model,
        "denoiser": denoiser,
        "noise": torch.randn(1, 4, 8, 8),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
    }


# By the name of the page: what gives the names that its code may use, for a time, and a folder to write into.
SURROUNDINGS: dict[str, Callable[[Path], Any]] = {
    "diffusers": _diffusers,
    "sglang": _sglang,
    "official": _official,
    "kernels": _kernels,
    "pytorch": _pytorch,
}
