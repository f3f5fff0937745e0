"""What the small cases do not show: several chunks, hard values, strides, aliasing, launches."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

import ltxkern
from ltxkern import reference, use_backend
from ltxkern.triton import (
    combine_guidance,
    gated_residual,
    group_norm_silu,
    merge_lora,
    normalize_noise,
    pixel_norm_silu,
    res2s,
)
from ltxkern.verify.cases import BF16, BY_NAME, F32, F64, SCALES, OpCase, Size
from tests.ops import test_row_index
from tests.ops.contract import noise
from tests.triton.exact import hold

STEPS = ltxkern.res2s_steps([1.0, 0.93, 0.6, 0.31])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


@pytest.fixture
def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each kernel launch."""
    launches: list[int] = []
    stock = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append(1)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return launches


def limits(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **values: int) -> None:
    monkeypatch.setattr(module, "LIMITS", replace(module.LIMITS, **values))


FULL = "; weight bias conv_bias: "
TWO_PASS = {
    "spans": (OpCase("group_norm_silu", f"x residual: 1 8 3 7 9{FULL}8", "x", {"num_groups": 4}, fixed={"weight": F32}), 0),
    "spans-last": (OpCase("group_norm_silu", f"x residual: 2 12 15 7{FULL}12", "x", {"num_groups": 4}, last=True), 0),
    "mean1e4": (OpCase("group_norm_silu", "x: 1 4 3 9 7; weight bias: 4", "x", {"num_groups": 2}), 1e4),
    "mean1e4-last": (OpCase("group_norm_silu", "x: 1 4 27 7; weight bias: 4", "x", {"num_groups": 2}, last=True), 1e4),
    "deep": (OpCase("group_norm_silu", "x: 1 96 1 3 1; weight bias: 96", "x", {"num_groups": 1}), 0),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "partials"), [(torch.float32, 2), (torch.bfloat16, 64)])
@pytest.mark.parametrize(("case", "mean"), TWO_PASS.values(), ids=TWO_PASS)
def test_group_norm_in_two_passes(
    case: OpCase,
    mean: float,
    partials: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    count_launches: list[int],
) -> None:
    limits(monkeypatch, group_norm_silu, tile=64, single=1, partials=partials, columns=8)
    tensors = case.tensors(dtype)
    hold(case, {**tensors, "x": (tensors["x"].double() + mean).to(dtype)})
    assert len(count_launches) == 2


def test_group_norm_in_one_launch(count_launches: list[int]) -> None:
    case = TWO_PASS["spans"][0]
    hold(case, case.tensors())
    assert len(count_launches) == 1


@pytest.mark.parametrize("single", [1, 16384])
@pytest.mark.parametrize("value", [0.0, 3.3e4, 1e-40])
def test_group_norm_of_a_constant_group_is_its_bias(value: float, single: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, group_norm_silu, tile=32, single=single, partials=4)
    x = torch.full((1, 4, 5, 7), value)
    x[:, 2:] = torch.randn(1, 2, 5, 7)
    weight, bias = torch.rand(4) + 0.5, torch.randn(4)
    out = ltxkern.group_norm_silu(x, weight, bias, 2)
    expected = torch.nn.functional.silu(bias[:2]).reshape(1, 2, 1, 1).expand(1, 2, 5, 7)
    torch.testing.assert_close(out[:, :2], expected, rtol=1e-6, atol=1e-6)
    assert out[:, 2:].isfinite().all()


@pytest.mark.parametrize("single", [1, 16384])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_group_norm_spreads_what_is_not_finite_over_its_group(
    value: float, single: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(monkeypatch, group_norm_silu, tile=32, single=single, partials=4)
    x = torch.randn(2, 4, 5, 7)
    x[1, 3, 2, 6] = value
    out = ltxkern.group_norm_silu(x, None, None, 2)
    expected = reference.group_norm_silu(x, None, None, 2)
    assert out[1, 2:].isnan().all()
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_group_norm_serves_slices_and_its_own_input() -> None:
    store = torch.randn(3, 10, 4, 9)
    x = store[1:, 2:8, :, :]
    expected = reference.group_norm_silu(x.contiguous(), None, None, 3)
    torch.testing.assert_close(ltxkern.group_norm_silu(x, None, None, 3), expected, rtol=1e-5, atol=1e-6)
    out = torch.empty(9, 4, 6, 2).permute(3, 2, 1, 0)
    torch.testing.assert_close(ltxkern.group_norm_silu(x, None, None, 3, out=out), expected, rtol=1e-5, atol=1e-6)
    fresh = x.contiguous()
    assert ltxkern.group_norm_silu(fresh, None, None, 3, out=fresh) is fresh
    torch.testing.assert_close(fresh, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixel_norm_of_several_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, pixel_norm_silu, tile=64, line=4, last_tile=32)
    for case in (
        OpCase("pixel_norm_silu", "x: 2 6 5 7; weight: 6", "x", fixed={"weight": F32}),
        OpCase("pixel_norm_silu", "x: 2 6 5 7", "x", last=True),
    ):
        hold(case, case.tensors(dtype))


def test_pixel_norm_keeps_bad_values_in_their_position() -> None:
    x = torch.randn(1, 6, 3, 5)
    x[0, 2, 1, 1], x[0, :, 2, 3], x[0, :, 0, 0] = NAN, 0.0, 1e-30
    out = ltxkern.pixel_norm_silu(x)
    assert out[0, :, 1, 1].isnan().all()
    assert (out[0, :, 2, 3] == 0).all()
    torch.testing.assert_close(out, reference.pixel_norm_silu(x), equal_nan=True)


NOISE = [
    OpCase("normalize_noise", "noise: 3 13 11", "noise"),
    OpCase("channelwise_normalize", "x: 3 13 11", "x"),
    OpCase("noise_statistics", "noise: 3 13 11"),
]


@pytest.mark.parametrize(("dtype", "partials"), [(torch.float64, 1), (torch.bfloat16, 3), (torch.float64, 64)])
@pytest.mark.parametrize("case", NOISE, ids=str)
def test_noise_in_chunks(
    case: OpCase, partials: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, count_launches: list[int]
) -> None:
    limits(monkeypatch, normalize_noise, block=16, partials=partials, single=1, flags=4)
    hold(case, case.tensors(dtype))
    assert len(count_launches) == 2


@pytest.mark.parametrize("single", [1, 4096])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(3, 5, 4), (5, 4)])
def test_one_bad_value_makes_all_noise_nan(
    shape: tuple[int, ...], value: float, single: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(monkeypatch, normalize_noise, block=8, single=single, flags=2)
    noise = torch.randn(shape, dtype=torch.float64)
    noise.view(-1)[-1] = value
    assert ltxkern.normalize_noise(noise).isnan().all()
    assert reference.normalize_noise(noise).isnan().all()
    if len(shape) == 3:
        channelwise = ltxkern.channelwise_normalize(noise)
        assert channelwise[-1].isnan().all()
        assert channelwise[:-1].isfinite().all()


@pytest.mark.parametrize("single", [1, 4096])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
def test_a_constant_slice_of_noise_is_nan(value: float, single: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, normalize_noise, block=8, single=single)
    noise = torch.randn(3, 7, 5, dtype=torch.float64)
    noise[1] = value
    out = ltxkern.normalize_noise(noise)
    assert out[1].isnan().all()
    assert out[0].isfinite().all()
    assert out[2].isfinite().all()
    assert ltxkern.noise_statistics(noise)[1].tolist() == [35.0, value, 0.0]


def test_noise_of_one_element_is_nan_and_none_is_empty() -> None:
    assert ltxkern.normalize_noise(torch.randn(2, 1, 1)).isnan().all()
    assert ltxkern.normalize_noise(torch.randn(0, 4, 3)).shape == (0, 4, 3)
    assert ltxkern.noise_statistics(torch.randn(0, 4, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [(F64, 1, 50), (F32, 1, 50), (BF16, 1, 50), (F32, 1e-24, 0), (F32, 1e-30, 1e-28), (F32, 1e-36, 0), (BF16, 1e30, 0)],
)
def test_guidance_in_chunks(
    dtype: torch.dtype, scale: float, shift: float, monkeypatch: pytest.MonkeyPatch, count_launches: list[int]
) -> None:
    """Squares of deviations may be none that fp32 has, some chunks zeros, and the last one shorter."""
    limits(monkeypatch, combine_guidance, block=8, partials=7)
    case = OpCase("combine_guidance", "cond uncond perturbed isolated: 3 37", "cond", SCALES)
    given = {name: value.double() * scale + shift for name, value in case.tensors(F64).items()}
    for value in given.values():
        value[1] = 0
    hold(case, {name: value.to(dtype) for name, value in given.items()})
    assert len(count_launches) == 2


def test_guidance_without_rescale_is_one_launch(count_launches: list[int]) -> None:
    cond, uncond = torch.randn(2, 3, 7)
    ltxkern.combine_guidance(cond, uncond, cfg_scale=3.0)
    assert len(count_launches) == 1


def test_guidance_of_bad_values_and_constants() -> None:
    cond, uncond = torch.randn(2, 40)
    cond[7] = INF
    assert ltxkern.combine_guidance(cond, uncond, cfg_scale=3.0, rescale_scale=0.5).isnan().all()
    still = torch.full((40,), 0.3)
    out = ltxkern.combine_guidance(still, still, cfg_scale=3.0, rescale_scale=0.5)
    assert out.isnan().all()


MODALITIES = [Size(2, 9, 6), Size(2, 5, 4), Size(2, 3, 8)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "name", ["res2s_midpoint-raw_noise_fp64", "res2s_midpoint-unmasked", "res2s_advance-raw_noise_fp64"]
)
def test_half_steps_in_blocks(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch, count_launches: list[int]
) -> None:
    """Of several modalities the bits of each alone, two in a launch."""
    monkeypatch.setattr(res2s, "BLOCK", 16)
    case = BY_NAME[name]
    given = [case.tensors(torch.bfloat16, size) for size in MODALITIES[:count]]
    for tensors in given:
        hold(case, tensors)
    alone = [case.run(tensors) for tensors in given]
    count_launches.clear()
    together = case.run({name: [tensors[name] for tensors in given] for name in given[0]})
    assert len(count_launches) == (count + 1) // 2
    columns = together if isinstance(together[0], list) else [together]
    for results, expected in zip(columns, zip(*alone, strict=True), strict=True):
        assert all(map(torch.equal, results, expected))


def test_half_step_may_write_over_its_latent_and_skips_an_empty_modality() -> None:
    latent, x0 = torch.randn(2, 1, 5, 4).bfloat16()
    noise = torch.randn(1, 5, 4, dtype=torch.float64)
    expected = ltxkern.res2s_midpoint(latent, x0, noise, STEPS[0])
    anchor = torch.full_like(noise, NAN)
    ltxkern.res2s_midpoint(latent, x0, noise, STEPS[0], out=(latent, anchor))
    assert torch.equal(latent, expected[0])
    assert torch.equal(anchor, expected[1])
    empty = torch.empty(1, 0, 4).bfloat16()
    mids, _ = ltxkern.res2s_midpoint([empty, x0], [empty, x0], [empty, noise], STEPS[0])
    assert mids[0].shape == (1, 0, 4)
    assert mids[1].isfinite().all()


def test_fractional_mask_rounds_the_prediction_to_its_own_dtype_first() -> None:
    draw = torch.Generator().manual_seed(3)
    latent, x0, clean = (torch.randn(1, 7, 6, generator=draw).bfloat16() for _ in range(3))
    noise = torch.randn(1, 7, 6, generator=draw, dtype=torch.float64)
    mask = torch.rand(1, 7, 1, generator=draw)
    got = ltxkern.res2s_midpoint(latent, x0, noise, STEPS[1], mask=mask, clean=clean)
    with use_backend("torch"):
        expected = ltxkern.res2s_midpoint(latent, x0, noise, STEPS[1], mask=mask, clean=clean)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-14)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_over_several_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = replace(merge_lora.HALF, rows=16, columns=16, ranks=16)
    monkeypatch.setattr(merge_lora, "HALF", tile)
    monkeypatch.setattr(merge_lora, "FULL", tile)
    check_merge(dtype, dtype, 5, 19)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ranks", "factor"), [((5, 40, 3), None), ((5, 8), F32)])
def test_merge_of_several(dtype: torch.dtype, ranks: tuple[int, ...], factor: torch.dtype | None) -> None:
    check_merge(dtype, factor or dtype, *ranks)


def check_merge(dtype: torch.dtype, factor: torch.dtype, *ranks: int) -> None:
    """A merge of LoRAs of these ranks against fp64."""
    weight, scales = noise(37, 53, dtype=dtype), [0.7, -0.4, 1.3][: len(ranks)]
    a = [noise(rank, 53, dtype=factor, seed=rank, scale=0.3) for rank in ranks]
    b = [noise(37, rank, dtype=factor, seed=rank + 1, scale=0.3) for rank in ranks]
    case = OpCase("merge_lora_", "", others={"lora_a": a, "lora_b": b, "scale": scales})
    hold(case, {"weight": weight})


def test_merge_changes_only_the_given_rows_of_a_larger_store() -> None:
    store = torch.zeros(9, 20)
    ltxkern.merge_lora_(store[2:5, :13], torch.ones(2, 13), torch.ones(3, 2), 0.5)
    assert (store[2:5, :13] == 1).all()
    assert store.count_nonzero() == 39


def test_gates_over_several_columns_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_residual, "TILE", 16)
    x, y = torch.randn(2, 3, 4, 37)
    gate = torch.randn(4, 37)
    torch.testing.assert_close(ltxkern.gated_residual(x, y, gate), reference.gated_residual(x, y, gate))
    logits = torch.randn(3, 4)
    torch.testing.assert_close(ltxkern.head_gate(x, logits), reference.head_gate(x, logits))


def test_rows_of_a_fused_projection_are_served_by_their_strides() -> None:
    fused = torch.randn(2, 5, 24)
    q, k = fused[..., :8], fused[..., 8:16]
    tables = torch.rand(1, 2, 5, 2)
    got = ltxkern.qk_norm_rope(q, k, torch.ones(8), torch.ones(8), tables, tables)
    expected = reference.qk_norm_rope(q, k, torch.ones(8), torch.ones(8), tables, tables, 1e-6, "split")
    torch.testing.assert_close(got, expected)
    rows = fused[..., 3:11]
    scale = torch.randn(2, 1, 24)[..., 1:9]
    torch.testing.assert_close(
        ltxkern.rms_norm_modulate(rows, scale, scale), reference.rms_norm_modulate(rows, scale, scale, 1e-6, None)
    )


def test_repeats_are_bit_identical() -> None:
    for case in (TWO_PASS["spans"][0], *NOISE):
        tensors = case.tensors()
        assert torch.equal(case.run(tensors)[0], case.run(tensors)[0])


@pytest.mark.parametrize("op", test_row_index.OPS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_whose_index_is_out_of_range_is_nan(op: str, index: torch.dtype, dtype: torch.dtype) -> None:
    test_row_index.nan_where_out_of_range(op, dtype, 13, index)
