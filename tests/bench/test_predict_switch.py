"""Predicted switches: the committed page is what the counts give, the counts are those of the machine code, and the goal holds."""

from __future__ import annotations

import math
from types import SimpleNamespace

import budget
import launches
import predict_switch
import pytest
import sass
import torch
from cards import CARDS

from ltxkern.compiled import merge_lora, nvrtc
from ltxkern.pipeline.memory import merge


def test_the_committed_page_is_what_the_counts_give() -> None:
    assert predict_switch.PAGE.read_text() == predict_switch.page(), "run python bench/predict_switch.py --docs"


def test_inplace_is_predicted_within_its_goal() -> None:
    found = predict_switch.switches(CARDS["h200"])
    assert found["inplace"][0] <= predict_switch.GOAL == 40
    assert 4 * found["inplace"][0] < found["inplace, step by step"][0]
    # Nothing that moves every weight through the device is faster than its bytes.
    assert found["inplace"][0] > 2 * predict_switch.patched_bytes() / CARDS["h200"].roof * 1e3
    assert predict_switch.both_phases(CARDS["h200"], 1) < predict_switch.both_phases(CARDS["h200"], 2)


def test_the_weights_are_those_of_the_transformer_and_fill_the_kernels_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = predict_switch.SHAPES
    assert sum(shapes.values()) == 1660
    assert sum(math.prod(shape) * count for shape, count in shapes.items()) == 18_977_652_736
    assert all(math.prod(shape) % merge_lora.SWITCH_TILE == 0 for shape in shapes)
    card = CARDS["h200"]
    properties = SimpleNamespace(L2_cache_size=card.l2_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert merge.near_bytes.__wrapped__(torch.device("cuda")) == predict_switch.near_bytes(card) == 8 << 20


def test_the_counts_are_those_of_the_machine_code() -> None:
    try:
        nvrtc._nvrtc().getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"INSTRUCTIONS NOT COUNTED: {error}")
    if sass.tool("cuobjdump") is None:
        pytest.skip("INSTRUCTIONS NOT COUNTED: no cuobjdump; triton brings one")
    weight = torch.empty(1024, 4096, dtype=torch.bfloat16, device="meta")
    tiles, wrong = weight.numel() // merge_lora.SWITCH_TILE, 400_000
    sizes = [((tiles + 1, 2), torch.int32), ((16 * tiles, 2), torch.int16), (wrong, torch.uint8), (wrong, torch.int8)]
    correction = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in [*sizes, (wrong, torch.int16)]]
    steps = merge_lora.switch_steps(merge_lora.Switch(weight.dtype, weight.numel(), 0, 1.0, 2.0))
    sums = torch.empty(*steps[0].grid, 2, dtype=torch.int64, device="meta")
    tensors = [weight, torch.empty_like(weight), *correction, torch.empty_like(weight), sums]
    kernels = [("cuda", "switch_lora part bf16", kernel) for kernel in launches._kernels(steps, tensors)]
    (row,) = budget.rows_of("sm_90", budget.Launches(kernels, {}))
    assert row.registers <= predict_switch.REGISTERS + 8
    assert row.shared_bytes == predict_switch.SHARED
    for name, value in predict_switch.PASS.items():
        assert getattr(row, name) <= 1.03 * value + 0.01, name
