"""Sampler, LoRA and row ops on a GPU: no wait for the device, capture into a CUDA graph, the caller's stream, equal bits on repeat.

Their numbers are held by the tests of each op, which run on the GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern import dispatch, res2s_steps
from ltxkern.ops.float8 import to_e4m3
from tests.ops.contract import assert_as_close, assert_same, noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU OPS NOT TESTED: no CUDA device"),
]

STEP = res2s_steps([0.9, 0.7])[0]
SHAPES = {"video": (1, 8160, 128), "audio": (1, 126, 128)}
Call = Callable[[], Any]


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return noise(*shape, dtype=dtype, seed=seed).cuda()


def both(dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [drawn(*shape, dtype=dtype, seed=seed) for shape in SHAPES.values()]


def half_steps() -> Call:
    latent, x0, x0_mid = (both(torch.bfloat16, seed) for seed in range(3))
    first, second = both(torch.float64, 3), both(torch.float64, 4)

    def run() -> list[Tensor]:
        stats = [[ltxkern.noise_statistics(value) for value in values] for values in (first, second)]
        middles, anchors = ltxkern.res2s_midpoint(latent, x0, first, STEP, noise_stats=stats[0])
        return [*middles, *ltxkern.res2s_advance(anchors, x0, x0_mid, second, STEP, noise_stats=stats[1])]

    return run


def standardised() -> Call:
    x = drawn(2, 8160, 128, dtype=torch.float64)
    return lambda: [ltxkern.normalize_noise(x), ltxkern.channelwise_normalize(x)]


def guidance() -> Call:
    branches = [drawn(1, 8160, 128, seed=seed) for seed in range(4)]
    scales = {"cfg_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "rescale_scale": 0.45}
    return lambda: ltxkern.combine_guidance(*branches, **scales)


def lora(rank: int, **how: Any) -> Call:
    weight, a, b = drawn(1000, 520), drawn(rank, 520, seed=1), drawn(1000, rank, seed=2)
    weight = weight.to(torch.float8_e4m3fn) if how else weight

    def run() -> Tensor:
        merged = weight.clone()
        ltxkern.merge_lora_(merged, a, b, 0.1, **how)
        return merged.float()

    return run


def two_sums() -> Call:
    x, first, second = (drawn(1000, 520, seed=seed) for seed in range(3))

    def run() -> list[Tensor]:
        weight, other = x.clone(), torch.empty_like(x)
        return list(ltxkern.dual_add(weight, first, second, out=(weight, other)))

    return run


def rows() -> Call:
    x, y = drawn(1, 1000, 4096), drawn(1, 1000, 4096, seed=1)
    scale, shift, gate = (drawn(1, 1, 4096, seed=seed) for seed in range(3))
    logits = drawn(1, 1000, 32, seed=3)

    def run() -> list[Tensor]:
        gated = ltxkern.gated_residual_rms_norm_modulate(x, y, gate, scale, shift)
        heads = ltxkern.head_gate(x.unflatten(-1, (32, 128)), logits)
        return [*gated, ltxkern.rms_norm_modulate(x, scale, shift), ltxkern.gated_residual(x, y, gate), heads]

    return run


def row_index() -> Call:
    x, y = drawn(1, 1000, 4096), drawn(1, 1000, 4096, seed=1)
    scale, shift, gate = drawn(2, 3, 4096).unbind(1)
    index = torch.arange(1000, device=x.device)[None]

    def run() -> list[Tensor]:
        rows = (index >= 100).long()
        gated = ltxkern.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, rows=rows)
        normed = ltxkern.rms_norm_modulate(x, scale, shift, rows=rows.int())
        return [*gated, normed, ltxkern.gated_residual(x, y, gate, rows=rows)]

    return run


def rope() -> Call:
    q, k = drawn(1, 1000, 4096), drawn(1, 1000, 4096, seed=1)
    weights = [drawn(4096, seed=seed) for seed in (2, 3)]
    tables = [drawn(1, 32, 1000, 64, dtype=torch.float32, seed=seed) for seed in (4, 5)]
    return lambda: list(ltxkern.qk_norm_rope(q, k, *weights, *tables))


CALLS = {
    "half_steps": half_steps,
    "standardised": standardised,
    "guidance": guidance,
    "merge_tile": lambda: lora(16),
    "merge_addmm": lambda: lora(64),
    "merge_float8": lambda: lora(16, rounding="stochastic", seed=7),
    "merge_tensor_cores": lambda: lora(384, rounding="single"),
    "merge_tensor_cores_stochastic": lambda: lora(64, rounding="stochastic", seed=7),
    "two_sums": two_sums,
    "rows": rows,
    "row_index": row_index,
    "rope": rope,
}
over_tiers = pytest.mark.parametrize("tier", ["cuda", "nvrtc"])
over_calls = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)


def use(tier: str) -> None:
    if (reason := dispatch.unavailable(tier)) is not None:
        pytest.skip(reason)


@over_tiers
@over_calls
def test_no_wait_and_equal_bits(tier: str, make: Callable[[], Call]) -> None:
    use(tier)
    call = make()
    with ltxkern.use_backend(tier):
        expected = call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_same(again, expected)


@over_tiers
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [2056, 2051])
def test_merge_of_many_tiles(tier: str, dtype: torch.dtype, half: torch.dtype, columns: int) -> None:
    """More blocks than run at once, of a weight and factors that are met in 16 bytes and that are not, against fp64."""
    use(tier)
    rows, ranks, scales = 4000, (384, 40), [0.7, -1.5]
    weight = drawn(rows, columns).to(dtype)
    a = [drawn(rank, columns, dtype=half, seed=rank) * rank**-0.25 for rank in ranks]
    b = [drawn(rows, rank, dtype=half, seed=rank + 1) * rank**-0.25 for rank in ranks]
    for count in (1, 2):
        exact, plain, merged = weight.double(), weight.float(), weight.clone()
        for one, other, scale in zip(a[:count], b, scales, strict=False):
            exact = exact + scale * (other.double() @ one.double())
            plain = plain + scale * (other.float() @ one.float())
        with ltxkern.use_backend(tier):
            ltxkern.merge_lora_(merged, a[:count], b[:count], scales[:count])
        if dtype == torch.float8_e4m3fn:
            # As fp32 numbers: half an ulp of e4m3 is not free.
            assert_as_close(merged.float(), to_e4m3(plain).float(), exact)
        else:
            assert_as_close(merged, plain.to(dtype), exact)


@over_tiers
def test_a_row_whose_index_is_out_of_range_is_nan(tier: str) -> None:
    use(tier)
    x, tables = drawn(5, 64), drawn(2, 3, 64).unbind(1)
    rows = torch.tensor([0, -1, 1, 2, 1 << 40], device=x.device)
    with ltxkern.use_backend(tier):
        results = [
            *ltxkern.gated_residual_rms_norm_modulate(x, x, *tables, rows=rows),
            ltxkern.rms_norm_modulate(x, *tables[:2], rows=rows),
            ltxkern.gated_residual(x, x, tables[0], rows=rows),
        ]
    for result in results:
        assert result.isnan().all(-1).tolist() == [False, True, False, True, True]
        assert bool(result[[0, 2]].isfinite().all())


@over_tiers
@over_calls
def test_capture_and_replay(tier: str, make: Callable[[], Call]) -> None:
    use(tier)
    call = make()
    with ltxkern.use_backend(tier):
        expected = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_side = call()
        torch.cuda.current_stream().wait_stream(side)
        assert_same(on_side, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
    for tensor in captured if isinstance(captured, list) else [captured]:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)
