"""The Triton kernels on a device: against fp64, and beyond 2^31 elements. The rest is in tests/ops/test_on_gpu.py."""

from __future__ import annotations

import os

import pytest
import torch

import ltxkern
from ltxkern import reference, use_backend
from ltxkern.verify.cases import CASES, OpCase, Size
from tests.triton.exact import hold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

ROWS = [pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case in CASES for dtype in case.dtypes]


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(("case", "dtype"), ROWS)
@pytest.mark.parametrize("size", [Size(2, 5, 13), Size(1, 513, 1024)], ids=str)
def test_against_fp64(case: OpCase, dtype: torch.dtype, size: Size) -> None:
    with torch.device("cuda"):
        tensors = case.tensors(dtype, size)
    hold(case, tensors)


def test_one_bad_value_makes_all_noise_nan() -> None:
    noise = torch.randn(128, 34, 60, device="cuda", dtype=torch.float64)
    noise[77, 3, 5] = float("inf")
    assert ltxkern.normalize_noise(noise).isnan().all()


def _need(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of device memory, {free:.1f} are free")


def test_group_norm_beyond_2_to_31_elements() -> None:
    _need(14)
    x = torch.randn(1, 4, 23200, 23200, device="cuda", dtype=torch.bfloat16)
    out = ltxkern.group_norm_silu(x, None, None, 4)
    for group in (0, 3):
        expected = reference.group_norm_silu(x[:, group : group + 1, -64:].float(), None, None, 1)
        torch.testing.assert_close(out[:, group : group + 1, -64:].float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pixel_norm_beyond_2_to_31_elements(channels_last: bool) -> None:
    _need(14)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(1, 128, 4100, 4100, device="cuda", dtype=torch.bfloat16, memory_format=memory).normal_()
    out = ltxkern.pixel_norm_silu(x)
    torch.testing.assert_close(out[..., -9:, :], reference.pixel_norm_silu(x[..., -9:, :], 1e-8))


def test_noise_beyond_2_to_31_elements() -> None:
    _need(14)
    noise = torch.empty(2, 1 << 16, (1 << 14) + 2, device="cuda", dtype=torch.float16).normal_(0.5, 2.0)
    out = ltxkern.normalize_noise(noise, out=noise.clone())
    tail = (noise[1, -4:].float() - 0.5) / 2.0
    torch.testing.assert_close(out[1, -4:].float(), tail, rtol=0.01, atol=0.01)
    stats = ltxkern.noise_statistics(noise)
    assert stats[1, 0] == noise[0].numel()
    torch.testing.assert_close(stats[:, 1].cpu(), torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_modulate_beyond_2_to_31_elements() -> None:
    _need(14)
    x = torch.randn(1, 525_000, 4096, device="cuda", dtype=torch.bfloat16)
    scale, shift = torch.randn(2, 1, 1, 4096, device="cuda", dtype=torch.bfloat16)
    out = ltxkern.rms_norm_modulate(x, scale, shift)
    expected = reference.rms_norm_modulate(x[:, -5:], scale, shift, 1e-6, None)
    torch.testing.assert_close(out[:, -5:], expected, rtol=0.01, atol=0.02)


def test_tensors_of_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(1, 8, 5, device="cuda:1")
    torch.testing.assert_close(ltxkern.pixel_norm_silu(x), reference.pixel_norm_silu(x, 1e-8))
