"""Every Triton kernel through the public functions, on tiny odd shapes, in every dtype, against fp64."""

from __future__ import annotations

import pytest
import torch

from ltxkern.verify.cases import CASES, F32, OpCase, Size
from tests.triton.exact import hold

PLAIN = {"weight": None, "bias": None}
WIDE = {"weight": F32, "bias": F32}
# Shapes and branches that only Triton's kernels tell apart.
MORE = [
    OpCase("group_norm_silu", "x: 3 12; weight bias: 12", "x", {"num_groups": 4}, variant="2d"),
    OpCase("group_norm_silu", "x: 2 6 13", "x", {"num_groups": 3, **PLAIN}, variant="3d"),
    OpCase("group_norm_silu", "x residual: 2 12 3 5 7; weight bias: 12", "x", {"num_groups": 4}, fixed=WIDE, variant="5d"),
    OpCase("group_norm_silu", "x: 1 8 5 3; weight bias: 8", "x", {"num_groups": 8}, last=True, variant="depth1"),
    OpCase("group_norm_silu", "x residual: 2 8 1 1 1; weight bias: 8", "x", {"num_groups": 2}, variant="one_position"),
    OpCase("pixel_norm_silu", "x: 5 7; weight: 7", "x", fixed={"weight": F32}, variant="2d"),
    OpCase("pixel_norm_silu", "x: 1 1024 1 3 3", "x", variant="1024"),
    OpCase("pixel_norm_silu", "x: 1 1024 3 3", "x", last=True, variant="1024_last"),
    OpCase("rms_norm_modulate", "x: 7 9; scale shift: 9", "x", variant="flat"),
    OpCase("rms_norm_modulate", "x: 7 64; scale shift: 3 64; rows: 7", "x", fixed={"rows": torch.int32}, variant="rows32"),
    OpCase("gated_residual", "x y: 2 5 37; gate: 1", "x", variant="scalar"),
    OpCase("gated_residual", "x y: 2 5 37; gate:", "x", variant="number"),
    OpCase("qk_norm_rope", "q k: 2 3 48; q_weight k_weight: 48; cos sin: 1 4 3 6", "q; k", variant="shared"),
    OpCase("combine_guidance", "cond: 3 5", "cond", {"rescale_scale": 0.5}, variant="rescale_only"),
    OpCase("normalize_noise", "noise: 1 3 2 5 7", "noise", variant="5d"),
    OpCase("normalize_noise", "noise: 7 11", "noise", variant="one_slice"),
]  # fmt: skip
SIZES = [Size(2, 5, 13), Size(1, 1, 2)]
ROWS = [
    pytest.param(case, dtype, size, id=f"{case}-{str(dtype)[6:]}-{'x'.join(map(str, size))}")
    for cases, sizes in ((CASES, SIZES), (MORE, SIZES[:1]))
    for case in cases
    for dtype in case.dtypes
    for size in sizes
]


@pytest.mark.parametrize(("case", "dtype", "size"), ROWS)
def test_small_case(case: OpCase, dtype: torch.dtype, size: Size) -> None:
    hold(case, case.tensors(dtype, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("case", "scale"),
    [
        (OpCase("group_norm_silu", "x: 1 8 2 9 7", "x", {"num_groups": 2, **PLAIN}), 3e-3),
        (OpCase("pixel_norm_silu", "x: 2 12 3 5", "x"), 1e-4),
        (OpCase("rms_norm_modulate", "x: 7 9; scale shift: 9", "x"), 1e-3),
    ],
    ids=str,
)
def test_values_near_eps(case: OpCase, scale: float, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    hold(case, {**tensors, "x": tensors["x"] * scale})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["normalize_noise", "channelwise_normalize"])
def test_noise_far_from_zero(op: str, dtype: torch.dtype) -> None:
    name = "noise" if op == "normalize_noise" else "x"
    case = OpCase(op, f"{name}: 2 2 5 7", name)
    hold(case, {name: (case.tensors(torch.float64)[name] * 0.1 + 100).to(dtype)})
