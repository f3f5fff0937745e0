"""The CUDA kernels of the sampler, LoRA and transformer ops, run from their own source on CPU fibers through the tests of each op.

The op tests are collected here once more, with the CUDA launches on the shim in the place of the CPU kernels: small blocks, small
chunks, random schedules, fresh memory poisoned.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from ltxkern import dispatch
from ltxkern.compiled import (
    combine_guidance,
    dual_add,
    extension,
    merge_lora,
    normalize_noise,
    qk_norm_rope,
    res2s,
    rows,
)
from ltxkern.compiled.steps import Step
from tests.csrc.shim_build import shim
from tests.ops import (
    test_combine_guidance,
    test_dual_add,
    test_gated_residual,
    test_merge_lora,
    test_merge_lora_many,
    test_normalize_noise,
    test_overlap,
    test_qk_norm_rope,
    test_res2s,
    test_res2s_sde_step,
    test_rms_norm_modulate,
    test_row_index,
)

OPS = (
    *(
        "res2s_midpoint",
        "res2s_advance",
        "res2s_sde_step",
        "normalize_noise",
        "channelwise_normalize",
        "noise_statistics",
    ),
    *("combine_guidance", "merge_lora_", "rms_norm_modulate", "gated_residual_rms_norm_modulate", "gated_residual"),
    *("head_gate", "qk_norm_rope", "dual_add"),
)
LAUNCHES = (combine_guidance, dual_add, merge_lora, normalize_noise, qk_norm_rope, res2s, rows)
# Not about kernels, or about torch's own products.
ELSEWHERE = ("compile", "opcheck", "gradient", "error", "wrong", "threads", "past_the_caches")


def planner(threads: int) -> Callable[..., Callable[..., None]]:
    """`programs.planned`, with the launches on the shim in blocks of this size."""

    def planned(tier: str, steps: Callable[..., Sequence[Step]], case: Any, arguments: int) -> Callable[..., None]:
        # The merge kernels' tiles need their 256 threads.
        size = 256 if isinstance(case, merge_lora.Case) else threads
        return extension.device_program(shim(), steps(case, threads=size), arguments)

    return planned


@pytest.fixture(autouse=True, params=[(32, 1), (96, 2), (256, 3)], ids=lambda value: f"{value[0]}threads")
def on_shim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts the CUDA kernels in the place of the CPU ones for one test."""
    threads, seed = request.param
    shim().schedule(seed)
    for launch in LAUNCHES:
        monkeypatch.setattr(launch, "planned", planner(threads))
    monkeypatch.setattr(normalize_noise, "CHUNK", 256)
    monkeypatch.setattr(normalize_noise, "PARTIALS", 8)
    monkeypatch.setattr(normalize_noise, "FLAGS", 3)
    monkeypatch.setattr(combine_guidance, "CHUNK", 128)
    monkeypatch.setattr(combine_guidance, "PARTIALS", 8)
    # The merge on tensor cores wherever they take the factors, on plain cores, and by the rank; never by addmm.
    monkeypatch.setattr(merge_lora, "SMALL_RANK", (0, 1 << 20, merge_lora.SMALL_RANK)[seed - 1])
    monkeypatch.setattr(merge_lora, "one_product", lambda *_: False)
    for name in OPS:
        op = dispatch._registry[name]
        monkeypatch.setitem(op._kernels, "cpu", op._backends["cuda"].load())
        if name == "merge_lora_":
            served = dispatch.Backend("cpu", merge_lora.refuse, op._backends["cpu"].load)
            monkeypatch.setitem(op._backends, "cpu", served)
    before = torch.are_deterministic_algorithms_enabled()
    # Fresh tensors are then filled with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("op", test_row_index.OPS)
@pytest.mark.parametrize("dtype", test_row_index.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("width", [16, 13])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_a_row_whose_index_is_out_of_range_is_nan(op: str, dtype: torch.dtype, width: int, index: torch.dtype) -> None:
    """Nothing outside the tables is read for it, and the other rows are as they were."""
    tensors = test_row_index.drawn((2, 5, width), dtype, count=2)
    rows = torch.tensor([[0, 1, -1, 0, 2], [torch.iinfo(index).max, 1, 1, torch.iinfo(index).min, 0]], dtype=index)
    good = (rows >= 0) & (rows < 2)
    with dispatch.use_backend("cpu"):
        result = test_row_index.OPS[op](tensors, rows=rows)
        expected = test_row_index.OPS[op](tensors, rows=rows * good)
    pairs = [(result, expected)] if op != "gated_norm" else list(zip(result, expected, strict=True))
    for one, other in pairs:
        assert torch.equal(one[good], other[good])
        assert bool(one[~good].isnan().all())


def on_the_shim_alone(test: Callable[..., None]) -> Callable[..., None]:
    """The same test without its cases of other backends."""
    alone = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    alone.__dict__.update(vars(test))
    marks = []
    for mark in vars(test)["pytestmark"]:
        if mark.name == "parametrize" and "backend" in mark.args[0]:
            names, values = mark.args[:2]
            kept = [value for value in values if (value if names == "backend" else value[1]) == "cpu"]
            mark = pytest.mark.parametrize(names, kept).mark
        marks.append(mark)
    alone.__dict__["pytestmark"] = marks
    return alone


def _collect() -> None:
    modules = (
        *(
            test_res2s,
            test_res2s_sde_step,
            test_normalize_noise,
            test_combine_guidance,
            test_merge_lora,
            test_merge_lora_many,
        ),
        *(test_rms_norm_modulate, test_gated_residual, test_row_index, test_qk_norm_rope, test_dual_add, test_overlap),
    )
    for module in modules:
        for name, test in vars(module).items():
            takes_backend = callable(test) and "backend" in getattr(test, "__code__", _collect.__code__).co_varnames
            if name.startswith("test_") and takes_backend and not any(word in name for word in ELSEWHERE):
                globals()[f"test_{module.__name__.rsplit('test_', 1)[-1]}_{name[5:]}"] = on_the_shim_alone(test)


_collect()
