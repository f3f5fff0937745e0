"""Tensors of more than 2^31 elements over memory that is reserved but never touched, and launches of a few blocks on them."""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.compiled import extension
from ltxkern.compiled.steps import Launch, Step
from tests.csrc.shim_build import shim


def reserved(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of zeros over untouched pages: no memory is used until an element is written."""
    size = dtype.itemsize * torch.Size(shape).numel()
    try:
        pages = mmap.mmap(
            -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        )
    except OSError as error:
        pytest.skip(f"LARGE OFFSETS NOT TESTED: cannot reserve {size >> 30} GiB of address space: {error}")
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@contextmanager
def only_blocks(first: int, count: int = 1) -> Iterator[None]:
    """Launches on the shim run these blocks of their grid alone."""
    shim().only_blocks(first, count)
    try:
        yield
    finally:
        shim().only_blocks(0, 0)


def run(step: Step, *tensors: Tensor | None) -> None:
    """One step on the shim."""
    extension.device_program(shim(), [step], len(tensors))(*tensors)


def planner(threads: int, blocks: int | None = None) -> Callable[..., Callable[..., None]]:
    """What stands in for `programs.planned`: launches on the shim, of the last `blocks` of each grid or of all."""

    def planned(tier: str, steps: Callable[..., Sequence[Step]], case: Any, arguments: int) -> Callable[..., None]:
        made = steps(case, threads=threads)

        def run_all(*tensors: Tensor | None) -> None:
            for step in made:
                assert isinstance(step, Launch)
                assert step.grid[0] < 1 << 31
                if blocks is None:
                    run(step, *tensors)
                else:
                    with only_blocks(step.grid[0] - blocks, blocks):
                        run(step, *tensors)

        return run_all

    return planned
