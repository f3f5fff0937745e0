"""merge_lora_: both roundings, chunks, lists, strided weights, and what is refused before anything changes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.ops.float8 import stochastic_e4m3, to_e4m3
from tests.ops.contract import SAMPLER, assert_as_close, assert_same, noise
from tests.serving import over_backends, serving

SIZES = [(24, 40, 4), (1, 1, 1), (7, 13, 3), (33, 5, 17), (64, 31, 1), (70, 132, 20)]


def lora(rows: int, columns: int, rank: int, dtype: torch.dtype, count: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    scale = 1 / math.sqrt(rank)
    a = [noise(rank, columns, dtype=dtype, seed=10 + k, scale=scale) for k in range(count)]
    b = [noise(rows, rank, dtype=dtype, seed=20 + k, scale=scale) for k in range(count)]
    return a, b


def exact(weight: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float]) -> Tensor:
    terms = [scale * (y.double() @ x.double()) for x, y, scale in zip(a, b, scales, strict=True)]
    return weight.double() + sum(terms)


def official(weight: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float]) -> Tensor:
    """The published fuse: the first delta as one product, further ones by addmm, each rounded, then the sum."""
    delta = torch.matmul(b[0].to(weight.dtype) * scales[0], a[0].to(weight.dtype))
    for x, y, scale in zip(a[1:], b[1:], scales[1:], strict=True):
        delta = torch.addmm(delta, y.to(weight.dtype), x.to(weight.dtype), alpha=scale)
    return weight + delta


@over_backends("merge_lora_")
@pytest.mark.parametrize("dtype", SAMPLER, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_single_rounding(backend: str, dtype: torch.dtype, size: tuple[int, int, int], count: int) -> None:
    rows, columns, rank = size
    weight = noise(rows, columns, dtype=dtype)
    a, b = lora(rows, columns, rank, dtype, count)
    scales = [0.6, -0.25, 1.5][:count]
    merged = weight.clone()
    with serving(backend):
        assert ltxkern.merge_lora_(merged, a, b, scales) is merged
    assert_as_close(merged, official(weight, a, b, scales), exact(weight, a, b, scales), wide=1e-14)


@over_backends("merge_lora_")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_official_rounding(backend: str, dtype: torch.dtype, size: tuple[int, int, int], count: int) -> None:
    rows, columns, rank = size
    weight = noise(rows, columns, dtype=dtype)
    a, b = lora(rows, columns, rank, dtype, count)
    scales = [0.25, 0.8, -0.5][:count]
    merged = weight.clone()
    with serving(backend):
        ltxkern.merge_lora_(merged, a, b, scales, rounding="reference")
    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(merged, official(weight, a, b, scales), atol=tolerance, rtol=tolerance)


@over_backends("merge_lora_")
@pytest.mark.parametrize("rounding", ["single", "reference"])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 1 << 20])
def test_chunks_change_nothing(backend: str, rounding: str, chunk_bytes: int) -> None:
    weight = noise(37, 29, dtype=torch.bfloat16)
    a, b = lora(37, 29, 5, torch.bfloat16, 2)
    whole, chunked = weight.clone(), weight.clone()
    with serving(backend):
        ltxkern.merge_lora_(whole, a, b, [0.5, 0.25], rounding=rounding)
        ltxkern.merge_lora_(chunked, a, b, [0.5, 0.25], rounding=rounding, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(chunked, whole, atol=0, rtol=0 if rounding == "reference" else 2.0**-8)


class LargestTemporary(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that an op made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = isinstance(result, Tensor) and any(
            isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
            for arg in args
        )
        if isinstance(result, Tensor) and not view:
            self.bytes = max(self.bytes, result.numel() * result.itemsize)
        return result


@pytest.mark.parametrize("rounding", ["single", "reference"])
def test_temporaries_stay_below_the_limit(rounding: str) -> None:
    from ltxkern.ops.merge_lora import reference

    weight = noise(512, 96, dtype=torch.bfloat16)
    a, b = lora(512, 96, 8, torch.bfloat16, 2)
    limit = 8192
    with LargestTemporary() as seen:
        reference(weight, a, b, [0.5, 0.25], limit, rounding)
    assert 0 < seen.bytes <= limit
    assert weight.numel() * weight.itemsize > 8 * limit


@over_backends("merge_lora_")
@pytest.mark.parametrize("rounding", ["single", "reference"])
def test_factors_of_another_dtype(backend: str, rounding: str) -> None:
    weight = noise(24, 40, dtype=torch.bfloat16)
    a, b = lora(24, 40, 4, torch.float32)
    merged = weight.clone()
    with serving(backend):
        ltxkern.merge_lora_(merged, a[0], b[0], 0.5, rounding=rounding)
    if rounding == "reference":
        assert_same(merged, official(weight, a, b, [0.5]))
    else:
        assert_as_close(merged, exact(weight, a, b, [0.5]).bfloat16(), exact(weight, a, b, [0.5]))


@over_backends("merge_lora_")
def test_a_zero_scale_or_rank_changes_nothing(backend: str) -> None:
    weight = noise(24, 40)
    a, b = lora(24, 40, 4, torch.float32)
    broken = torch.full_like(a[0], torch.nan)
    for factors in ((broken, b[0], 0.0), (a[0][:0], b[0][:, :0], 1.0), ([], [], [])):
        merged = weight.clone()
        with serving(backend):
            ltxkern.merge_lora_(merged, *factors)
        assert_same(merged, weight)


@over_backends("merge_lora_")
@pytest.mark.parametrize("rounding", ["single", "reference"])
@pytest.mark.parametrize("layout", ["transposed", "rows", "columns"])
def test_strided_weights(backend: str, rounding: str, layout: str) -> None:
    """Only the view is written, whatever its strides."""
    a, b = lora(24, 40, 4, torch.bfloat16)
    base = noise(80, 80, dtype=torch.bfloat16)
    kept = base.clone()

    def view(whole: Tensor) -> Tensor:
        return {"transposed": whole.t()[:24, :40], "rows": whole[:48:2, :40], "columns": whole[3:27, 1:80:2][:, :40]}[
            layout
        ]

    weight = view(base)
    if layout == "columns":
        a = [a[0][:, : weight.shape[1]].contiguous()]
    expected = weight.clone().contiguous()
    with serving(backend):
        ltxkern.merge_lora_(weight, a, b, 0.5, rounding=rounding)
        ltxkern.merge_lora_(expected, a, b, 0.5, rounding=rounding)
    torch.testing.assert_close(weight, expected, atol=0, rtol=0 if rounding == "reference" else 2.0**-8)
    view(base).copy_(view(kept))
    assert_same(base, kept)


@over_backends("merge_lora_")
def test_a_parameter_is_merged_without_a_graph(backend: str) -> None:
    weight = torch.nn.Parameter(noise(24, 40))
    a, b = lora(24, 40, 4, torch.float32)
    expected = exact(weight.detach().clone(), a, b, [1.0])
    with serving(backend), torch.no_grad():
        ltxkern.merge_lora_(weight, a[0], b[0])
    assert weight.grad_fn is None
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=1e-6)


def wrong_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    a, b = torch.ones(2, 5), torch.ones(3, 2)
    return [
        ({"weight": torch.ones(3)}, ValueError, r"weight must be a matrix \(out, in\), got shape \(3,\)"),
        ({"weight": torch.ones(3, 5).long()}, TypeError, "weight must be one of .* got torch.int64"),
        ({"lora_a": torch.ones(2, 4)}, ValueError, r"must be \(rank, 5\) and \(3, rank\), got \(2, 4\) and \(3, 2\)"),
        ({"lora_b": torch.ones(3, 4)}, ValueError, r"got \(2, 5\) and \(3, 4\)"),
        ({"lora_a": [a, a]}, ValueError, "must have one length, got 2, 1 and 2"),
        ({"lora_a": [a], "lora_b": [b], "scale": [1.0, 2.0]}, ValueError, "must have one length, got 1, 1 and 2"),
        ({"lora_a": [a, None], "lora_b": [b, b]}, TypeError, r"lora_a\[1\] must be a torch.Tensor, got NoneType"),
        ({"lora_b": b.int()}, TypeError, r"lora_b\[0\] must be one of"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0: use 33554432"),
        ({"rounding": "exact"}, ValueError, 'rounding must be "single", "reference" or "stochastic", got \'exact\''),
    ]


@pytest.mark.parametrize(("given", "error", "words"), wrong_calls())
def test_errors_leave_the_weight(given: dict[str, Any], error: type[Exception], words: str) -> None:
    weight = given.get("weight", torch.zeros(3, 5))
    kept = weight.clone()
    arguments = {"weight": weight, "lora_a": torch.ones(2, 5), "lora_b": torch.ones(3, 2), **given}
    with pytest.raises(error, match=words):
        ltxkern.merge_lora_(**arguments)
    assert torch.equal(weight, kept)


FLOAT8 = torch.float8_e4m3fn


@over_backends("merge_lora_")
@pytest.mark.parametrize("dtype", [FLOAT8, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_half_factors(backend: str, dtype: torch.dtype, half: torch.dtype, count: int) -> None:
    """Every dtype of the weight with 16-bit factors of a rank beyond the small ones."""
    weight = noise(70, 136).to(dtype)
    a, b = lora(70, 136, 72, half, count)
    scales = [3.0, -2.0][:count]
    merged = weight.clone()
    with serving(backend):
        ltxkern.merge_lora_(merged, a, b, scales)
    terms = [scale * (y.float() @ x.float()) for x, y, scale in zip(a, b, scales, strict=True)]
    total = weight.float() + sum(terms)
    if dtype == FLOAT8:
        # As fp32 numbers: half an ulp of e4m3 is not free.
        assert_as_close(merged.float(), to_e4m3(total).float(), exact(weight, a, b, scales))
    else:
        assert_as_close(merged, total.to(dtype), exact(weight, a, b, scales))


@over_backends("merge_lora_")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float8_nearest(backend: str, size: tuple[int, int, int]) -> None:
    rows, columns, rank = size
    weight = noise(rows, columns).to(FLOAT8)
    a, b = lora(rows, columns, rank, torch.float32, 2)
    merged = weight.clone()
    with serving(backend):
        ltxkern.merge_lora_(merged, a, b, [0.5, -0.75])
    wide = exact(weight.float(), a, b, [0.5, -0.75]).float()
    low, high = to_e4m3(wide * (1 - 1e-6) - 1e-7).double(), to_e4m3(wide * (1 + 1e-6) + 1e-7).double()
    between = (merged.double() >= torch.minimum(low, high)) & (merged.double() <= torch.maximum(low, high))
    assert bool(between.all())


@over_backends("merge_lora_")
def test_float8_stochastic_has_no_bias_and_repeats(backend: str) -> None:
    weight = torch.full((256, 512), 1.0).to(FLOAT8)
    # 1.03125 is a quarter of the way from 1 to 1.125.
    a, b = torch.full((1, 512), 0.25), torch.full((256, 1), 0.125)
    results = []
    with serving(backend):
        for seed, chunk_bytes in ((3, 32 << 20), (3, 1000), (4, 32 << 20)):
            merged = weight.clone()
            ltxkern.merge_lora_(merged, a, b, rounding="stochastic", seed=seed, chunk_bytes=chunk_bytes)
            results.append(merged.float())
    assert set(results[0].unique().tolist()) == {1.0, 1.125}
    # 131,072 draws at probability 1/4: the share's deviation is 0.0012.
    assert float((results[0] > 1).float().mean()) == pytest.approx(0.25, abs=0.006)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    index = torch.arange(weight.numel()).reshape(weight.shape)
    assert torch.equal(results[0], stochastic_e4m3(torch.full(weight.shape, 1.03125), index, 3).float())


@over_backends("merge_lora_")
@pytest.mark.parametrize("rounding", ["single", "stochastic"])
def test_float8_ends_of_the_range(backend: str, rounding: str) -> None:
    """Beyond the largest value comes the largest, NaN stays, and what e4m3 holds stays as it is down to its smallest."""
    held = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    weight = torch.stack([held, held])
    a, b = torch.full((1, 256), 1000.0), torch.tensor([[0.0], [1.0]])
    with serving(backend):
        ltxkern.merge_lora_(weight, a, b, rounding=rounding, seed=5)
    assert torch.equal(weight[0].float().nan_to_num(-1), held.float().nan_to_num(-1))
    assert torch.equal(weight[1].float().nan_to_num(-1), torch.where(held.float().isnan(), -1.0, 448.0))


@over_backends("merge_lora_")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_float8_ties_go_to_even(backend: str, half: torch.dtype) -> None:
    """Every weight with deltas of half a step at some magnitude, of which the sums are exact."""
    deltas = [sign * 2.0**exponent for exponent in range(-11, 6) for sign in (1, -1)]
    weight = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float().repeat(len(deltas), 1).to(FLOAT8)
    a, b = torch.ones(17, 256, dtype=half), torch.zeros(len(deltas), 17, dtype=half)
    b[:, 16] = torch.tensor(deltas)
    merged = weight.clone()
    with serving(backend):
        ltxkern.merge_lora_(merged, a, b)
    expected = to_e4m3(weight.float() + torch.tensor(deltas)[:, None]).float()
    assert torch.equal(merged.float().nan_to_num(-1), expected.nan_to_num(-1))


def test_stochastic_rounding_of_every_magnitude() -> None:
    """Both neighbours come, each as often as the distance to the other says, for denormals and the largest too."""
    for value in (0.0007, -0.0013, 0.0171, 0.99, -3.3, 447.0):
        values = torch.full((200_000,), value)
        rounded = stochastic_e4m3(values, torch.arange(200_000), 1).double()
        assert len(rounded.unique()) == 2
        low, high = rounded.min(), rounded.max()
        assert low < value < high
        assert float(rounded.mean()) == pytest.approx(value, abs=6 * float(high - low) / 2 / math.sqrt(200_000))


@pytest.mark.parametrize(
    ("dtype", "rounding", "words"),
    [
        (FLOAT8, "reference", 'rounding="reference" does not go with a torch.float8_e4m3fn weight: use "single"'),
        (torch.bfloat16, "stochastic", 'rounding="stochastic" does not go with a torch.bfloat16 weight: use "single"'),
    ],
)
def test_roundings_that_do_not_go_with_a_dtype(dtype: torch.dtype, rounding: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ltxkern.merge_lora_(torch.zeros(3, 5).to(dtype), torch.ones(2, 5), torch.ones(3, 2), rounding=rounding)
