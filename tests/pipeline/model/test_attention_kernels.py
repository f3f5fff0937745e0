"""Attention kernels: what each declares, the bits of torch's own choice on a CPU, keys taken in shares held to fp64."""

import functools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.pipeline.model import attention_kernels
from ltxkern.pipeline.model.attention_kernels import (
    KERNELS,
    Case,
    joined,
    key_shares,
    math_share,
    torch_attention,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CARD = torch.device("cuda", 0)


def random(queries: int, keys: int, dtype: torch.dtype, batch: int = 2, heads: int = 3, d: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(batch, n, heads * d, generator=generator).to(dtype) for n in (queries, keys, keys))
    return [x.unflatten(2, (heads, d)) for x in rows]


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "head_dim", "reason"),
    [
        ("cudnn", (9, 0), BF16, 128, None),
        ("cudnn", (9, 0), FP32, 128, "it takes float16, bfloat16, not float32"),
        ("cudnn", (7, 5), FP16, 64, "it needs compute capability 8.0, the device has 7.5"),
        ("cudnn", (9, 0), BF16, 192, "it takes heads of at most 128 in multiples of 8, not 192"),
        ("cudnn", (9, 0), BF16, None, None),
        ("flash", (8, 6), FP16, 64, None),
        ("flash", (9, 0), BF16, 20, "in multiples of 8, not 20"),
        ("efficient", (7, 5), FP16, 64, None),
        ("efficient", (7, 5), BF16, 64, "it needs compute capability 8.0"),
        ("efficient", (7, 5), None, 512, None),
        ("efficient", (9, 0), FP32, 12, "it takes heads in multiples of 8, not 12"),
        ("fa3", (9, 0), BF16, 128, "the package flash_attn_interface, or, named, the package kernels"),
        ("sage", (9, 0), BF16, 128, "it needs the package sageattention"),
        ("math", (5, 0), FP32, 7, None),
        ("torch", (5, 0), FP32, 7, None),
    ],
)
def test_conditions_are_declared(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype | None,
    head_dim: int | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(attention_kernels, "capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    found = KERNELS[name].refuse(Case(CARD, dtype, head_dim))
    assert found == reason if reason is None else reason in str(found)
    on_cpu = KERNELS[name].refuse(Case(torch.device("cpu"), dtype, head_dim))
    assert (on_cpu is None) == (name in ("flash", "math", "torch"))


def package(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for function, value in functions.items():
        setattr(module, function, value)
    monkeypatch.setitem(sys.modules, name, module)
    attention_kernels._fa3_function.cache_clear()


def by_package(query: Tensor, key: Tensor, value: Tensor, num_splits: int = 1) -> tuple[Tensor, None]:
    return torch_attention(query, key, value) * num_splits, None


def test_packages_serve_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "capability", lambda device: (9, 0))
    case = Case(CARD, BF16, 128)
    given = random(3, 5, FP32)
    fetched = []

    def get_kernel(repository: str, version: int) -> Any:
        fetched.append(repository)
        return sys.modules["kernels"]

    package(monkeypatch, "kernels", get_kernel=get_kernel, flash_attn_func=by_package)
    assert "named" in str(KERNELS["fa3"].refuse(case))  # it would be fetched
    assert KERNELS["fa3"].refuse(case._replace(named=True)) is None
    assert torch.equal(KERNELS["fa3"].run(*given), torch_attention(*given))
    assert fetched == [attention_kernels.FA3_REPOSITORY]
    package(monkeypatch, "flash_attn_interface", flash_attn_func=by_package)
    assert KERNELS["fa3"].refuse(case) is None
    assert "below 10.0" in str(functools.partial(refuse_at, monkeypatch)((10, 0), case))
    assert KERNELS["fa3"].in_shares is not None
    assert torch.equal(KERNELS["fa3"].in_shares(2, *given), 2 * torch_attention(*given))
    package(monkeypatch, "sageattention", sageattn=lambda *given, tensor_layout, is_causal: torch_attention(*given))
    assert torch.equal(KERNELS["sage"].run(*given), torch_attention(*given))
    attention_kernels._fa3_function.cache_clear()


def refuse_at(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], case: Case) -> str | None:
    monkeypatch.setattr(attention_kernels, "capability", lambda device: capability)
    return KERNELS["fa3"].refuse(case)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, torch.float64])
def test_flash_on_a_cpu_is_what_torch_picks(dtype: torch.dtype) -> None:
    given = random(9, 70, dtype)
    picked = torch_attention(*given)
    assert torch.equal(KERNELS["flash"].run(*given), picked)
    math = KERNELS["math"].run(*given)
    torch.testing.assert_close(math, picked, rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert not torch.equal(math, picked)


def padded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As the memory-efficient kernel hands out its sums: filled up to a multiple of 32 queries."""
    result, sums = math_share(query, key, value)
    return result, torch.nn.functional.pad(sums, (0, -sums.shape[-1] % 32))


def trailing(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As cuDNN does: with a dim of 1 at the end."""
    result, sums = math_share(query, key, value)
    return result.to(query.dtype), sums[..., None]


@pytest.mark.parametrize(
    "share", [math_share, padded, trailing, attention_kernels._with_sums(attention_kernels._flash)]
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_shares_of_the_keys_are_as_close_to_fp64_as_one_walk(share: Any, dtype: torch.dtype, scale: float) -> None:
    query, key, value = random(5, 96, dtype)
    query = query * scale  # nearly all weight on one key, hence in one share
    expected = math_share(query.double(), key.double(), value.double())[0]
    plain = (torch_attention(query, key, value).double() - expected).abs()
    error = (joined(share, 3, query, key, value).double() - expected).abs()
    floor = torch.finfo(dtype).eps * expected.abs().max()
    assert error.square().mean().sqrt() <= 1.5 * plain.square().mean().sqrt() + floor / 8
    assert error.max() <= 1.5 * plain.max() + floor


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("gradient", [False, True])
def test_kernels_of_a_card_are_called_as_torch_declares_them(name: str, gradient: bool) -> None:
    given = [x.to("meta").requires_grad_(gradient) for x in random(126, 96, BF16, d=64)]
    kernel = KERNELS[name]
    assert kernel.in_shares is not None
    for result in (kernel.run(*given), kernel.in_shares(3, *given)):
        assert (result.shape, result.dtype, result.requires_grad) == (given[0].shape, BF16, gradient)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "multiprocessors", "shares"),
    [
        (1, 126, 32640, 32, 132, 4),  # sound looks at the picture, stage 2
        (1, 126, 8160, 32, 132, 4),
        (2, 126, 32640, 32, 132, 2),
        (3, 126, 32640, 32, 132, 1),
        (1, 129, 32640, 32, 132, 2),
        (1, 126, 32640, 32, 24, 1),
        (1, 126, 8161, 32, 132, 1),  # a prime
        (1, 126, 1024, 32, 132, 1),
        (1, 126, 2048, 32, 132, 2),
        (1, 32640, 126, 32, 132, 1),
        (1, 32640, 32640, 32, 132, 1),
        (0, 126, 8160, 32, 132, 1),
    ],
)
def test_keys_are_shared_out_where_few_queries_leave_the_card_idle(
    batch: int, queries: int, keys: int, heads: int, multiprocessors: int, shares: int
) -> None:
    assert key_shares(batch, queries, keys, heads, multiprocessors) == shares
