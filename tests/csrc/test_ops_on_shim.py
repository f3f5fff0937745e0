"""The tests of every op once more, with its CUDA kernels from their own source on CPU fibers in the place of the CPU kernels.

On three devices: small and larger blocks, random schedules, other kernels of GroupNorm and of the merge.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator

import pytest
import torch

import ltxkern
from ltxkern import dispatch
from tests.csrc.on_shim import FEW_PROCESSORS, H200, HOLDS_NONE, on_shim
from tests.csrc.shim_build import ROOT
from tests.ops import test_qk_norm_rope, test_row_index

# Not about kernels, or about torch's own products.
ELSEWHERE = ("compile", "opcheck", "gradient", "error", "wrong", "threads", "past_the_caches")
# Threads of a block, seed of the schedule, device, largest rank of the merge on plain cores: none, any, the library's own.
DEVICES = {
    "32threads": (32, 1, H200, 0),
    "96threads": (96, 2, FEW_PROCESSORS, 1 << 20),
    "256threads": (256, 3, HOLDS_NONE, None),
}


@pytest.fixture(autouse=True, params=DEVICES.values(), ids=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Puts the CUDA kernels in the place of the CPU ones for one test."""
    threads, seed, limits, small_rank = request.param
    # A row of a norm is too long for the contract where 32 threads sum it: these have the library's own blocks.
    own = "norm_silu" in request.node.name
    with on_shim(None if own else threads, limits, seed=seed, small_rank=small_rank):
        yield


@pytest.mark.parametrize("op", test_row_index.OPS)
@pytest.mark.parametrize("dtype", test_row_index.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("width", [16, 13, 1024])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_a_row_whose_index_is_out_of_range_is_nan(op: str, dtype: torch.dtype, width: int, index: torch.dtype) -> None:
    with dispatch.use_backend("cpu"):
        test_row_index.nan_where_out_of_range(op, dtype, width, index)


@pytest.mark.parametrize("heads", [2, 16], ids=["general", "packs"])
@pytest.mark.parametrize("axes", [1, 3])
def test_nan_comes_into_a_token_with_a_row_out_of_range(heads: int, axes: int) -> None:
    """Of queries and keys, and into no other."""
    tables = test_qk_norm_rope.by_row(2, 5, heads, 64, axes, torch.float32, 4)
    x, weight = test_qk_norm_rope.noise(2, 5, 64 * heads, dtype=torch.bfloat16), torch.ones(64 * heads).bfloat16()
    wrong = tables.rows.clone()
    for at, value in (((0, axes - 1, 1), -1), ((1, 0, 3), 4 * axes), ((1, axes - 1, 4), torch.iinfo(torch.int32).max)):
        wrong[at] = value
    with dispatch.use_backend("cpu"):
        results, expected = (
            ltxkern.qk_norm_rope(x, x, weight, weight, tables.cos, tables.sin, rows=rows, heads=heads)
            for rows in (wrong, tables.rows)
        )
    good = (wrong == tables.rows).all(1)
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one[good], other[good])
        assert bool(one[~good].isnan().any(-1).all())


def on_the_shim_alone(test: Callable[..., None]) -> Callable[..., None] | None:
    """The same test without its cases of other backends; None where it has no other."""
    alone = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    alone.__dict__.update(vars(test))
    marks = []
    for mark in vars(test)["pytestmark"]:
        if mark.name == "parametrize" and "backend" in mark.args[0]:
            names, values = mark.args[:2]
            # Torch is among the backends of every test that is not about others.
            plain = names == "backend"
            kept = [
                "cpu" if plain else (value[0], "cpu") for value in values if (value if plain else value[1]) == "torch"
            ]
            if not kept:
                return None
            mark = pytest.mark.parametrize(names, kept, **mark.kwargs).mark
        marks.append(mark)
    alone.__dict__["pytestmark"] = marks
    return alone


def _collect() -> None:
    for path in sorted((ROOT / "tests/ops").glob("test_*.py")):
        for name, test in vars(importlib.import_module(f"tests.ops.{path.stem}")).items():
            takes_backend = isinstance(test, types.FunctionType) and "backend" in test.__code__.co_varnames
            here = name.startswith("test_") and takes_backend and not any(word in name for word in ELSEWHERE)
            if here and (alone := on_the_shim_alone(test)) is not None:
                globals()[f"{path.stem}_{name[5:]}"] = alone


_collect()
