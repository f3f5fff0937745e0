"""LoRA merge into a weight, in place and in row chunks."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltxkern.aliasing import Read, Written, apart, check
from ltxkern.compiled import merge_lora as launch
from ltxkern.compiled.tensors import refuse_device
from ltxkern.dispatch import Op
from ltxkern.layout import unit_rows
from ltxkern.ops import tiers
from ltxkern.ops.checks import (
    SAMPLER_DTYPES,
    check_choice,
    check_device,
    check_finite_number,
    check_integer,
    check_tensor,
    raise_no_tensor,
)
from ltxkern.ops.float8 import stochastic_e4m3, to_e4m3

ROUNDINGS = ("single", "reference", "stochastic")
WEIGHT_DTYPES = (*SAMPLER_DTYPES, torch.float8_e4m3fn)
CHUNK_BYTES = 32 << 20


class Arguments(NamedTuple):
    """The weight, which is changed, and an entry of lora_a, lora_b and scale a LoRA."""

    weight: Tensor
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scale: Sequence[float]
    chunk_bytes: int
    rounding: str
    seed: int = 0


def rows_per_chunk(rows: int, columns: int, bytes_per_element: int, chunk_bytes: int) -> int:
    """Rows such that one temporary of `columns` columns stays within `chunk_bytes` (one row at least)."""
    return max(1, min(rows, chunk_bytes // max(1, columns * bytes_per_element)))


def _round_into(tile: Tensor, total: Tensor, first: int, columns: int, seed: int | None) -> None:
    """Writes fp32 sums to a tile of e4m3 weights whose first element is element `first` of a weight of that many columns."""
    if seed is None:
        tile.copy_(to_e4m3(total))
        return
    rows = torch.arange(tile.shape[0], device=tile.device)[:, None] * columns
    tile.copy_(stochastic_e4m3(total, first + rows + torch.arange(tile.shape[1], device=tile.device), seed))


def _merge_single(
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    limit: int,
    seed: int | None,
) -> None:
    """fp32 accumulation over all LoRAs, one rounding; tiles of rows and columns so that no temporary exceeds the limit."""
    float8 = weight.dtype == torch.float8_e4m3fn
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # Stochastic rounding has temporaries of int64.
    size = 8 if float8 else compute.itemsize
    rank = max(a.shape[0] for a in lora_a)
    columns = rows_per_chunk(weight.shape[1], rank, size, limit)
    rows = min(
        rows_per_chunk(weight.shape[0], columns, size, limit), rows_per_chunk(weight.shape[0], rank, size, limit)
    )
    for start in range(0, weight.shape[1], columns):
        factors = [a[:, start : start + columns].to(compute) for a in lora_a] if len(lora_a) == 1 else None
        for top in range(0, weight.shape[0], rows):
            tile = weight[top : top + rows, start : start + columns]
            total = tile.to(compute)
            if total is tile or total.data_ptr() == tile.data_ptr():
                total = tile
            for k, b in enumerate(lora_b):
                a = factors[k] if factors is not None else lora_a[k][:, start : start + columns].to(compute)
                # The product first: addmm would round its partial sums at the magnitude of the weight.
                total.add_(torch.mm(b[top : top + rows].to(compute), a), alpha=scale[k])
            if float8:
                _round_into(tile, total, top * weight.shape[1] + start, weight.shape[1], seed)
            elif total is not tile:
                tile.copy_(total)


def reference_rows(weight: Tensor, rank: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of a chunk of `reference_deltas`, for a first LoRA of this rank."""
    # On a CPU a delta is still in its cache when it is added.
    limit = min(chunk_bytes, launch.CPU_CHUNK) if weight.device.type == "cpu" else chunk_bytes
    size = weight.dtype.itemsize
    return rows_per_chunk(weight.shape[0], max(rank, weight.shape[1]), size, limit)


def reference_deltas(
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[tuple[Tensor, slice]]:
    """What the official rule adds to a weight, by the same chunks of rows as `merge_lora_(rounding="reference")`.

    Args:
        weight: (out, in); only its shape, dtype and device are read.
        lora_a, lora_b, scale, chunk_bytes: as `merge_lora_`; at least one LoRA, of rank 1 at least, no scale 0.
    Yields:
        (delta, rows): `round(B s) @ A` rounded, further LoRAs added by addmm; weight[rows] + delta is the merged weight.
    """
    rows = reference_rows(weight, lora_a[0].shape[0], chunk_bytes)
    factors = [a.to(weight.dtype) for a in lora_a]
    for top in range(0, weight.shape[0], rows):
        with launch.full_precision_reduction():
            first = lora_b[0][top : top + rows].to(weight.dtype)
            delta = torch.matmul(first if scale[0] == 1.0 else first * scale[0], factors[0])
            for k in range(1, len(factors)):
                delta.addmm_(lora_b[k][top : top + rows].to(weight.dtype), factors[k], alpha=scale[k])
        yield delta, slice(top, top + rows)


def _merge_reference(
    weight: Tensor, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Sequence[float], limit: int
) -> None:
    """The official rule: the deltas, then the sum with W rounded."""
    for delta, rows in reference_deltas(weight, lora_a, lora_b, scale, limit):
        weight[rows].add_(delta)


def reference(
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    chunk_bytes: int,
    rounding: str,
    seed: int = 0,
) -> None:
    """The torch composition of `merge_lora_`, chunked."""
    with torch.no_grad():
        if rounding == "reference":
            _merge_reference(weight, lora_a, lora_b, scale, chunk_bytes)
        else:
            _merge_single(weight, lora_a, lora_b, scale, chunk_bytes, seed if rounding == "stochastic" else None)


def refuse_cuda(args: Arguments) -> str | None:
    """What the CUDA tiers decline: fp64, and more LoRAs than share one rounding."""
    if args.rounding == "reference":
        return None
    if any(tensor.dtype == torch.float64 for tensor in (args.weight, *args.lora_a, *args.lora_b)):
        return "torch.float64 weights or factors: the kernel accumulates in fp32"
    if len(args.lora_a) > launch.LORAS:
        return f"{len(args.lora_a)} LoRAs at once: the kernel merges at most {launch.LORAS} with one rounding"
    return None


def _refuse_triton(args: Arguments) -> str | None:
    weight = args.weight
    if args.rounding == "reference":
        return "reference rounding must be bit-equal to torch's own matrix product, whose order of sums the kernel does not follow"
    if (reason := refuse_cuda(args)) is not None:
        return reason
    if weight.dtype == torch.float8_e4m3fn:
        return "torch.float8_e4m3fn weight: the kernel rounds to fp16, bf16 or fp32"
    if not unit_rows(weight) or (weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]):
        return f"{tiers.strided('weight', weight)}: the kernel takes dense rows that do not overlap"
    if not all(factor.is_contiguous() for factor in (*args.lora_a, *args.lora_b)):
        return "lora_a or lora_b is not contiguous"
    return None


OP = Op(
    "merge_lora_",
    Arguments,
    "()",
    reference,
    backends=[
        *tiers.compiled(launch.run, reference, refuse_cuda=refuse_cuda),
        tiers.triton("merge_lora", _refuse_triton),
    ],
)


def switch_tier(*tensors: Tensor) -> str | None:
    """The compiled tier that takes 16-bit weights of this device from phase to phase in one pass; None: there is none.

    The pass is no op of its own: it is chosen as `merge_lora_` is, and whoever asks for it proves every result by its checksum.
    """
    if not tensors[0].is_cuda or launch.refuse_switch(*tensors) is not None:
        return None
    tiers = (name for name in OP.present() if name in ("cuda", "nvrtc"))
    return next((tier for tier in tiers if refuse_device(tier, tensors[0]) is None), None)


def merge_lora_(
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scale: float | Sequence[float] = 1.0,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    rounding: str = "single",
    seed: int = 0,
) -> Tensor:
    """Merge one LoRA or several into a weight, in place: `W += sum_k scale_k (B_k @ A_k)`.

    Args:
        weight: (out, in), fp16, bf16, fp32, fp64 or float8 e4m3; changed in place. A float8 weight that is stored divided by a
            factor f takes scale / f.
        lora_a: (rank, in), or a list of them, any floating dtype.
        lora_b: (out, rank), or a list of the same length.
        scale: strength, or a list of the same length. A zero skips its LoRA.
        chunk_bytes: upper bound of each temporary. With "reference", factors of another dtype than the weight's are converted
            whole: its matrix product may not be cut along the columns.
        rounding: "single": fp32 accumulation over all LoRAs, one rounding. "reference": the official rule, bit-equal to it: the
            first delta is `round(B s) @ A` rounded to the weight's dtype, further ones are added by addmm in that dtype, then the
            sum with W is rounded; not for float8. "stochastic", for float8 only: as "single", then one of the two neighbours at
            random, the nearer the likelier, so that what is lost has mean zero.
        seed: of the stochastic rounding; seed and position alone decide, on every backend. Layers want different seeds.
    Returns:
        `weight`.
    Raises:
        TypeError, ValueError: each names the parameter; nothing is changed then.

    Contract: "single" rounded (closest to fp64), "reference" exact against the official fuse. float8 results beyond 448 become 448.
    Bytes: read and write W, read the factors once.
    Source: Hu et al. 2021; the LoRA fuse of LTX-2.
    """
    factors = checked_factors(weight, lora_a, lora_b, scale, chunk_bytes, rounding, seed)
    if (call := _call(weight, *factors, chunk_bytes, rounding, seed)) is not None:
        OP(call)
    return weight


def _call(
    weight: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], scales: list[float], *options: Any
) -> Arguments | None:
    """The op's arguments without the LoRAs that add nothing; None where nothing is left to do."""
    kept = [k for k, s in enumerate(scales) if s != 0.0 and lora_a[k].shape[0] > 0]
    if not kept or not weight.numel():
        return None
    factors = [lora_a[k] for k in kept], [lora_b[k] for k in kept]
    return Arguments(weight, *factors, [scales[k] for k in kept], *options)


def _factors(name: str, value: Any) -> list[Tensor]:
    """One factor, or several in a list or tuple, as a list."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise_no_tensor(name, value, "a tensor or a list of tensors")
    for index, factor in enumerate(value):
        if not isinstance(factor, Tensor):
            raise_no_tensor(f"{name}[{index}]", factor)
    return list(value)


def checked_factors(
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scale: float | Sequence[float],
    chunk_bytes: int,
    rounding: str,
    seed: int,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Factors and scales as lists of one length."""
    check_tensor("weight", weight, dtypes=WEIGHT_DTYPES)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix (out, in), got shape {tuple(weight.shape)}")
    factors_a, factors_b = _factors("lora_a", lora_a), _factors("lora_b", lora_b)
    given: Sequence[Any] = scale if isinstance(scale, (list, tuple)) else [scale] * len(factors_a)
    for index, one in enumerate(given):
        check_finite_number("scale" if given is not scale else f"scale[{index}]", one)
    scales = [float(one) for one in given]
    check_choice("rounding", rounding, ROUNDINGS)
    if rounding == ("reference" if weight.dtype == torch.float8_e4m3fn else "stochastic"):
        raise ValueError(f'rounding="{rounding}" does not go with a {weight.dtype} weight: use "single"')
    check_integer("seed", seed, 0, (1 << 63) - 1)
    check_integer("chunk_bytes", chunk_bytes, 1, use=CHUNK_BYTES)
    if not len(factors_a) == len(factors_b) == len(scales):
        raise ValueError(
            f"lora_a, lora_b and scale must have one length, got {len(factors_a)}, {len(factors_b)} and {len(scales)}"
        )
    for index, (a, b) in enumerate(zip(factors_a, factors_b, strict=True)):
        for name, factor in (("lora_a", a), ("lora_b", b)):
            if factor.dtype not in SAMPLER_DTYPES or factor.device != weight.device:
                check_tensor(f"{name}[{index}]", factor, dtypes=SAMPLER_DTYPES)
                check_device(f"{name}[{index}]", factor, weight.device)
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != weight.shape[1] or b.shape != (weight.shape[0], a.shape[0]):
            raise ValueError(
                f"lora_a[{index}] and lora_b[{index}] must be (rank, {weight.shape[1]}) and ({weight.shape[0]}, rank), "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
    return factors_a, factors_b, scales


def merge_lora_many_(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor | Sequence[Tensor]],
    lora_b: Sequence[Tensor | Sequence[Tensor]],
    scale: float | Sequence[float | Sequence[float]] = 1.0,
    *,
    chunk_bytes: int = 32 << 20,
    rounding: str = "single",
    seed: int = 0,
) -> list[Tensor]:
    """`merge_lora_` for a list of layers, all or none: each is checked and its backend chosen before the first is changed.

    The layers follow one another on the current stream with no wait in between, each by the launch that `merge_lora_` makes: a
    layer of a few MB is bound by the host's calls, larger ones by the memory. Layers of one shape share a program.

    Args:
        weights: one matrix a layer, changed in place; no two of them, and no factor of any layer, may share memory.
        lora_a, lora_b: for each layer what `merge_lora_` takes.
        scale: one strength for all, or for each layer what `merge_lora_` takes.
        chunk_bytes, rounding: as in `merge_lora_`.
        seed: of the stochastic rounding; layer i takes `seed + i`.
    Returns:
        The weights.
    Raises:
        TypeError, ValueError: each names the layer and the parameter; no weight is changed then.
        BackendError, RuntimeError: a layer that no permitted backend serves, or a wanted gradient; no weight is changed then.

    Contract, bytes and source: as `merge_lora_`.
    """
    for name, listed in (("weights", weights), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(listed, (list, tuple)):
            raise_no_tensor(name, listed, "a list with an entry for each layer")
    check_integer("seed", seed, 0)
    count = len(weights)
    if isinstance(scale, (list, tuple)):
        scales: list[Any] = list(scale)
    else:
        check_finite_number("scale", scale)
        scales = [scale] * count
    if not len(lora_a) == len(lora_b) == len(scales) == count:
        raise ValueError(
            f"weights, lora_a, lora_b and scale must have one length, got {count}, {len(lora_a)}, {len(lora_b)} and {len(scales)}"
        )
    layers = list(zip(weights, lora_a, lora_b, scales, strict=True))
    calls: list[Arguments] = []
    given: list[tuple[list[Tensor], list[Tensor]]] = []
    for index, (weight, a, b, s) in enumerate(layers):
        try:
            factors = checked_factors(weight, a, b, s, chunk_bytes, rounding, seed + index)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {index}: {error}") from error
        given.append(factors[:2])
        if (call := _call(weight, *factors, chunk_bytes, rounding, seed + index)) is not None:
            calls.append(call)
    OP.run_each(calls, functools.partial(_check_layers_apart, weights, given))
    return list(weights)


def _check_layers_apart(weights: Sequence[Tensor], factors: Sequence[tuple[list[Tensor], list[Tensor]]]) -> None:
    if apart(weights, (tensor for pair in factors for given in pair for tensor in given)):
        return
    read = [
        Read(f"{name}[{layer}][{k}]", tensor)
        for layer, pair in enumerate(factors)
        for name, given in zip(("lora_a", "lora_b"), pair, strict=True)
        for k, tensor in enumerate(given)
    ]
    check([Written(f"weights[{layer}]", weight) for layer, weight in enumerate(weights)], read)
