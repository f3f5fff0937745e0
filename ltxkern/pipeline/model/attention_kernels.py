"""The kernels that compute attention: what each needs, how it is called, and keys that are taken in shares."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Capability = tuple[int, int]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
# Attention with its queries' log-sum-exp, (B, H, T) or more of it behind: a share of the keys can be joined with others.
Share = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Queries of one thread block in the kernels for heads of 64 and 128, and keys below which a share is not worth its launch.
BLOCK_QUERIES, LEAST_KEYS = 128, 1024
FA3_REPOSITORY = "kernels-community/flash-attn3"


class Case(NamedTuple):
    """What the conditions of a kernel speak of; `head_dim` is None where it is not known yet."""

    device: torch.device
    dtype: torch.dtype | None
    head_dim: int | None
    named: bool = False


@dataclass(frozen=True)
class Conditions:
    """On one type of device: dtypes with the least compute capability of each, the first capability of no use, head widths."""

    dtypes: Mapping[torch.dtype, Capability]
    below: Capability | None = None
    most: int | None = None
    multiple: int = 1

    def refuse(self, case: Case) -> str | None:
        """Why a case of this device type cannot be served."""
        found = capability(case.device)
        least = min(self.dtypes.values()) if case.dtype is None else self.dtypes.get(case.dtype)
        if least is None:
            return f"it takes {', '.join(map(short, self.dtypes))}, not {short(case.dtype)}"
        if found < least or (self.below is not None and found >= self.below):
            until = "" if self.below is None else f" and below {self.below[0]}.{self.below[1]}"
            return f"it needs compute capability {least[0]}.{least[1]}{until}, the device has {found[0]}.{found[1]}"
        d = case.head_dim
        if d is not None and (d % self.multiple or (self.most is not None and d > self.most)):
            most = "" if self.most is None else f" of at most {self.most}"
            return f"it takes heads{most} in multiples of {self.multiple}, not {d}"
        return None


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention of (B, T, H, d) queries over (B, L, H, d) keys and values.

    Args:
        run: the attention.
        conditions: by device type; None where torch serves everything.
        in_shares: the attention with the keys in so many equal shares; None where it cannot.
        absent: why the package that brings it is not here; for a case, since some are only used by their name.
        exact: False for an approximation, which serves by its own name alone.
    """

    run: Run
    conditions: Mapping[str, Conditions] | None = None
    in_shares: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None
    absent: Callable[[Case], str | None] = lambda case: None
    exact: bool = True

    def refuse(self, case: Case) -> str | None:
        """Why it cannot serve a case, from what it declares; None where it can."""
        if self.conditions is None:
            return None
        if case.device.type not in self.conditions:
            return f"it runs on {', '.join(self.conditions)}, not on {case.device.type}"
        return self.absent(case) or self.conditions[case.device.type].refuse(case)


def short(dtype: torch.dtype | None) -> str:
    """A dtype as users write it."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def capability(device: torch.device) -> Capability:
    """Compute capability of a CUDA device; (0, 0) of others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _by_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H, d) as torch's attention takes it, (B, H, T, d)."""
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Whichever kernel torch picks."""
    q, k, v = _by_heads(query, key, value)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _pinned(backend: SDPBackend) -> Run:
    """One of torch's kernels; its switches, which are one set for all threads, are left alone where torch picks it anyway."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = _by_heads(query, key, value)
        if not torch.compiler.is_compiling() and torch._fused_sdp_choice(q, k, v) == backend.value:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def _cudnn(query: Tensor, key: Tensor, value: Tensor, sums: bool) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, sums)


def _efficient(query: Tensor, key: Tensor, value: Tensor, sums: bool) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, sums)


def _flash(query: Tensor, key: Tensor, value: Tensor, sums: bool) -> tuple[Tensor, ...]:
    aten = torch.ops.aten
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return aten._scaled_dot_product_flash_attention(query, key, value)


def _directly(kernel: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]]) -> Run:
    """What torch calls where it picks a kernel, without the switches."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        backward = query.requires_grad or key.requires_grad or value.requires_grad
        return kernel(*_by_heads(query, key, value), backward)[0].transpose(1, 2)

    return run


def _with_sums(kernel: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]]) -> Share:
    def share(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        output, sums = kernel(*_by_heads(query, key, value), True)[:2]
        return output.transpose(1, 2), sums

    return share


_flash_on_cpu, _flash_on_card = _pinned(SDPBackend.FLASH_ATTENTION), _directly(_flash)


def _flash_anywhere(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (_flash_on_cpu if query.device.type == "cpu" else _flash_on_card)(query, key, value)


def _fa3(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    result = _fa3_function()(query, key, value, **settings)
    return result[0] if isinstance(result, tuple) else result  # some versions return the log-sum-exp beside it


@functools.cache
def _fa3_function() -> Callable[..., Any]:
    if find_spec("flash_attn_interface") is not None:
        return importlib.import_module("flash_attn_interface").flash_attn_func
    return importlib.import_module("kernels").get_kernel(FA3_REPOSITORY, version=1).flash_attn_func


def _fa3_absent(case: Case) -> str | None:
    if find_spec("flash_attn_interface") is not None or (case.named and find_spec("kernels") is not None):
        return None
    # The package downloads a compiled kernel: nobody gets that who did not ask for it.
    return "it needs the package flash_attn_interface, or, named, the package kernels, which fetches it from the hub"


def _sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return importlib.import_module("sageattention").sageattn(query, key, value, tensor_layout="NHD", is_causal=False)


def _sage_absent(case: Case) -> str | None:
    return None if find_spec("sageattention") is not None else "it needs the package sageattention"


def math_share(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The composition, in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = _by_heads(query.to(wide), key.to(wide), value.to(wide))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def joined(share: Share, shares: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over equal shares of the keys, all in one call, joined by their log-sum-exp in fp32.

    Args:
        share: attention with its log-sum-exp.
        shares: a divisor of L.
        query, key, value: (B, T, H, d), (B, L, H, d), (B, L, H, d).
    Returns:
        (B, T, H, d).

    Contract: rounded; a share's result is rounded once more than in one walk over the keys.
    """
    batch, queries = query.shape[:2]
    k, v = (x.unflatten(1, (shares, -1)).flatten(0, 1) for x in (key, value))
    results, sums = share(query[:, None].expand(-1, shares, -1, -1, -1).flatten(0, 1), k, v)
    # One kernel keeps a trailing dim, another fills up the queries to a multiple of 32.
    logs = sums.flatten(2)[:, :, :queries].transpose(1, 2).unflatten(0, (batch, shares))
    parts = results.unflatten(0, (batch, shares)).to(logs.dtype)
    return (parts * logs.softmax(1).unsqueeze(-1)).sum(1).to(query.dtype)


_HALF: dict[torch.dtype, Capability] = {torch.float16: (8, 0), torch.bfloat16: (8, 0)}
_CPU = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), (0, 0))

KERNELS: Mapping[str, Kernel] = {
    "cudnn": Kernel(
        _directly(_cudnn),
        {"cuda": Conditions(_HALF, most=128, multiple=8)},
        functools.partial(joined, _with_sums(_cudnn)),
        absent=lambda case: None if torch.backends.cudnn.is_available() else "this torch has no cuDNN",
    ),
    "fa3": Kernel(
        _fa3,
        {"cuda": Conditions(dict.fromkeys(_HALF, (9, 0)), below=(10, 0), most=256, multiple=8)},
        lambda shares, query, key, value: _fa3(query, key, value, num_splits=shares),
        absent=_fa3_absent,
    ),
    "flash": Kernel(
        _flash_anywhere,
        {"cuda": Conditions(_HALF, most=256, multiple=8), "cpu": Conditions(_CPU)},
        functools.partial(joined, _with_sums(_flash)),
    ),
    "efficient": Kernel(
        _directly(_efficient),
        {"cuda": Conditions({torch.float16: (5, 0), torch.bfloat16: (8, 0), torch.float32: (5, 0)}, multiple=8)},
        functools.partial(joined, _with_sums(_efficient)),
    ),
    "math": Kernel(_pinned(SDPBackend.MATH), in_shares=functools.partial(joined, math_share)),
    "torch": Kernel(torch_attention),
    "sage": Kernel(_sage, {"cuda": Conditions(_HALF, most=128, multiple=64)}, absent=_sage_absent, exact=False),
}


def key_shares(batch: int, queries: int, keys: int, heads: int, multiprocessors: int) -> int:
    """In how many equal shares the keys of a few queries are taken; 1 where the queries keep the card busy.

    A kernel gives every `BLOCK_QUERIES` queries of a head a thread block that walks over all keys. Where these fill at most half
    of the multiprocessors, shares of at least `LEAST_KEYS` keys fill the rest; their results are small beside the keys.
    """
    blocks = batch * heads * -(-queries // BLOCK_QUERIES)
    most = min(multiprocessors // blocks, keys // LEAST_KEYS) if blocks else 1
    return next((count for count in range(most, 1, -1) if keys % count == 0), 1)
