"""What Triton's kernels decline, in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ltxkern
from ltxkern import BackendError, use_backend

STEP = ltxkern.res2s_steps([1.0, 0.93])[0]


def strided_tensor() -> torch.Tensor:
    return torch.randn(2, 4, 6).transpose(1, 2)


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "group_norm": (
        lambda: ltxkern.group_norm_silu(torch.randn(1, 2, 3, 4, 5).permute(0, 1, 3, 2, 4), None, None, 1),
        "collapse",
    ),
    "pixel_norm": (lambda: ltxkern.pixel_norm_silu(torch.randn(1, 1025, 2)), "at most 1024"),
    "noise": (lambda: ltxkern.normalize_noise(strided_tensor()), "contiguous"),
    "guidance": (
        lambda: ltxkern.combine_guidance(strided_tensor(), strided_tensor(), cfg_scale=2.0),
        "cond has strides",
    ),
    "half-step": (
        lambda: ltxkern.res2s_midpoint(strided_tensor(), strided_tensor(), torch.randn(2, 6, 4), STEP),
        "takes contiguous",
    ),
    "merge-fp64": (lambda: ltxkern.merge_lora_(torch.zeros(3, 3).double(), torch.ones(1, 3), torch.ones(3, 1)), "fp32"),
    "merge-reference": (
        lambda: ltxkern.merge_lora_(torch.zeros(3, 3), torch.ones(1, 3), torch.ones(3, 1), rounding="reference"),
        "bit-equal",
    ),
    "merge-five": (
        lambda: ltxkern.merge_lora_(torch.zeros(3, 3), [torch.ones(1, 3)] * 5, [torch.ones(3, 1)] * 5),
        "at most 4",
    ),
    "rms": (lambda: ltxkern.rms_norm_modulate(strided_tensor(), torch.ones(4), torch.ones(4)), "not dense"),
    "rope": (
        lambda: ltxkern.qk_norm_rope(
            *([torch.randn(1, 2, 40000)] * 2), *([torch.ones(40000)] * 2), *([torch.ones(1, 2, 2, 10000)] * 2)
        ),
        "at most 16384",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_in_words(name: str) -> None:
    call, words = REFUSALS[name]
    with use_backend("triton"), pytest.raises(BackendError, match=words):
        call()


def test_cpu_tensors_are_refused_where_nothing_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with use_backend("triton"), pytest.raises(BackendError, match="triton serves CUDA tensors, got one on cpu"):
        ltxkern.pixel_norm_silu(torch.randn(1, 2, 3))
