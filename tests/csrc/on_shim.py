"""The CPU shim as one more tier: public ops on CPU tensors take their CUDA launches, and the kernels run on fibers."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern import compiled, dispatch, ops
from ltxkern.compiled import combine_guidance, extension, group_norm_silu, merge_lora, normalize_noise
from ltxkern.compiled.steps import Launch, Step
from ltxkern.compiled.tensors import DeviceLimits
from tests.csrc.shim_build import shim

H200 = DeviceLimits(132, 232448)
# Few blocks, with no room to keep anything.
FEW_PROCESSORS = DeviceLimits(4, 4 << 10)
# Holds no blocks that wait for one another: two passes.
HOLDS_NONE = DeviceLimits(4, 232448, held=lambda launch: 0)
# So that small tensors have several chunks, and more of them than one block merges.
SMALL_CHUNKS = {
    normalize_noise: {"CHUNK": 256, "PARTIALS": 8, "FLAGS": 3, "SINGLE": 320},
    combine_guidance: {"CHUNK": 128, "PARTIALS": 8},
}
Run = Callable[[Sequence[Step], Sequence[Tensor | None]], None]


def modules() -> list[ModuleType]:
    """The modules of all ops and of their launches."""
    return [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for package in (ops, compiled)
        for found in pkgutil.iter_modules(package.__path__)
    ]


def run_step(step: Step, tensors: Sequence[Tensor | None], first: int = 0, count: int = 0) -> None:
    """One step on the shim: `count` blocks from `first` on, or all."""
    shim().only_blocks(first, count)
    try:
        extension.device_program(shim(), [step], len(tensors))(*tensors)
    finally:
        shim().only_blocks(0, 0)


def noting(kernels: list[str]) -> Run:
    """What runs a call and writes its kernels down."""

    def run(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> None:
        for step in steps:
            kernels.extend([step.kernel] if isinstance(step, Launch) else [])
            run_step(step, tensors)

    return run


def last_blocks(count: int) -> Run:
    """What runs the last blocks of each launch alone."""

    def run(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> None:
        for step in steps:
            assert isinstance(step, Launch)
            assert step.grid[0] < 1 << 31
            run_step(step, tensors, max(0, step.grid[0] - count), count)

    return run


@contextmanager
def on_shim(
    threads: int | None = None,
    limits: DeviceLimits = H200,
    *,
    seed: int = 1,
    shuffle: bool = True,
    run: Run | None = None,
    small_rank: int | None = None,
    small_chunks: bool = True,
) -> Iterator[None]:
    """The backend "cpu" is the shim; fresh memory is NaN.

    Args:
        threads: of a block, where the launches leave a choice.
        limits: of the device that group_norm_silu chooses its kernel for; other launches are an H200's.
        seed: of the order of fibers; without `shuffle` they run in thread order.
        run: what runs the steps of a call in place of the whole of them.
        small_rank: the largest rank of merge_lora's kernel on plain cores, where it is not the library's own.
        small_chunks: reductions have those of SMALL_CHUNKS.
    """

    def launches(steps: Sequence[Step], arguments: int) -> Callable[..., None]:
        if run is None:
            made: Callable[..., None] = extension.device_program(shim(), steps, arguments)
            return made
        return lambda *tensors: run(steps, tensors)

    def program(tier: str, steps: Callable[..., Sequence[Step]], case: Any, arguments: int) -> Callable[..., None]:
        # The merge kernels' tiles need their 256 threads.
        sized = {} if threads is None or isinstance(case, merge_lora.Case) else {"threads": threads}
        return launches(steps(case, **sized), arguments)

    def unavailable(backend: str) -> str | None:
        return None if backend == "cpu" else reason_of(backend)

    reason_of = dispatch.unavailable
    changes = {"program": program, "device_limits": lambda index: H200, "refuse_device": lambda *_: None}
    before = torch.are_deterministic_algorithms_enabled()
    shim().schedule(seed, shuffle=shuffle)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules():
            for name in changes.keys() & vars(module).keys():
                patch.setattr(module, name, changes[name])
        # With or without a built extension.
        patch.setattr(dispatch, "unavailable", unavailable)
        patch.setattr(group_norm_silu, "limits_of", lambda tier, x: limits)
        patch.setattr(merge_lora, "limits_of", lambda tier, x: H200)
        for module, constants in SMALL_CHUNKS.items() if small_chunks else ():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        if small_rank is not None:
            patch.setattr(merge_lora, "SMALL_RANK", small_rank)
        # Never by torch's own product.
        patch.setattr(merge_lora, "one_product", lambda *_: False)
        for op in dispatch._registry.values():
            if cuda := op._backends.get("cuda"):
                patch.setattr(op, "_present", {})
                patch.setitem(op._kernels, "cpu", cuda.load())
                patch.setitem(op._backends, "cpu", dispatch.Backend("cpu", cuda.refuse, cuda.load))
        # Fresh tensors are then filled with NaN.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
