"""Standardisation of sampler noise, and the mergeable statistics behind it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import normalize_noise as launch
from ltxkern.dispatch import Op
from ltxkern.layout import like, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import SAMPLER_DTYPES, check_device, check_out, check_tensor

# Below the size from which torch shares one sum among threads.
STATISTICS_CHUNK = 16384


class NoiseArguments(NamedTuple):
    """Of `normalize_noise` and `noise_statistics`."""

    noise: Tensor


class Arguments(NamedTuple):
    """Of `channelwise_normalize`."""

    x: Tensor


def normalize_reference(noise: Tensor) -> Tensor:
    """The torch composition: whole-tensor standardisation, then over the last two dims."""
    if noise.numel() == 0:
        return torch.empty_like(noise)
    return channelwise_reference((noise - noise.mean()) / noise.std())


def channelwise_reference(x: Tensor) -> Tensor:
    """The torch composition: standardisation over the last two dims, unbiased."""
    if x.numel() == 0:
        return torch.empty_like(x)
    return like((x - x.mean(dim=(-2, -1), keepdim=True)) / x.std(dim=(-2, -1), keepdim=True), x)


def statistics_reference(noise: Tensor) -> Tensor:
    """Count, mean and M2 of each slice over the last two dims, in fp64.

    Each slice is cut into chunks of a fixed length, each of which torch sums in one thread, and the chunks are merged in order:
    a plain `mean` or `sum` over a long slice depends on the number of threads.
    """
    shape = _statistics_shape(noise)
    size = noise.shape[-2] * noise.shape[-1]
    slices = noise.double().reshape(shape[0], size)
    whole = size - size % STATISTICS_CHUNK
    parts = [slices[:, :whole].reshape(shape[0], -1, STATISTICS_CHUNK)] if whole else []
    if size > whole:
        parts.append(slices[:, whole:].unsqueeze(1))
    rows = [_chunk_rows(part) for part in parts]
    if not rows:
        return slices.new_zeros(shape)
    count, mean, deviation = (torch.cat(columns, dim=1) for columns in zip(*rows, strict=True))
    origin = mean[:, :1]
    merged = origin + ((mean - origin) * count).sum(dim=1, keepdim=True) / size
    total = (deviation + count * (mean - merged).square()).sum(dim=1)
    return torch.stack([torch.full_like(total, size), merged[:, 0], total], dim=1)


def _chunk_rows(chunks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(slices, chunks, length) to count, mean and M2 of each chunk."""
    mean = chunks.mean(dim=-1)
    return torch.full_like(mean, chunks.shape[-1]), mean, (chunks - mean[..., None]).square().sum(dim=-1)


def _statistics_shape(noise: Tensor) -> tuple[int, int]:
    slices = 1
    for size in noise.shape[:-2]:
        slices *= size
    return slices, 3


def _refuse_triton(args: NoiseArguments | Arguments) -> str | None:
    x = args[0]
    if x.shape[-1] * x.shape[-2] == 0 and x.shape[:-2].numel() > 0:
        return f"slices of {args._fields[0]} have no elements: shape {tuple(x.shape)}"
    return tiers.not_contiguous(args)


NORMALIZE = Op(
    "normalize_noise",
    NoiseArguments,
    "Tensor",
    normalize_reference,
    lambda args: torch.empty_like(args[0]),
    backends=[*tiers.compiled(launch.run, "normalize"), tiers.triton("normalize_noise", _refuse_triton)],
    may_be=[("noise",)],
)
CHANNELWISE = Op(
    "channelwise_normalize",
    Arguments,
    "Tensor",
    channelwise_reference,
    lambda args: torch.empty_like(args[0]),
    backends=[
        *tiers.compiled(launch.run, "channelwise"),
        tiers.triton("normalize_noise", _refuse_triton, "launch_channelwise"),
    ],
    may_be=[("x",)],
)
STATISTICS = Op(
    "noise_statistics",
    NoiseArguments,
    "Tensor",
    statistics_reference,
    lambda args: args.noise.new_empty(_statistics_shape(args.noise), dtype=torch.float64),
    backends=[
        *tiers.compiled(launch.run, "statistics"),
        tiers.triton("normalize_noise", _refuse_triton, "launch_statistics"),
    ],
)


def normalize_noise(noise: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Noise standardised as the res2s sampler wants it: over the whole tensor, then over the last two dims.

    `m = (n - mean(n)) / std(n)`, then `(m - mean_s(m)) / std_s(m)` for each slice s over the last two dims, unbiased std. Both
    steps are affine, so one pass of per-slice statistics gives the same result.

    Args:
        noise: (..., T, C), fp16, bf16, fp32 or fp64. On packed (B, T, C) latents a slice is a whole sample.
        out: written in place of a fresh tensor; may be `noise` itself.
    Returns:
        Shape, dtype and strides of `noise`. A constant slice gives NaN, as the formula does.
    Raises:
        TypeError, ValueError: not a floating tensor of at least two dims.

    Contract: rounded; fp64 tensors agree with the two-step composition to 1e-14 relative.
    Bytes: two reads (the second from cache where it fits) and one write.
    Source: the res2s sampler of LTX-2.
    """
    if check_tensor("noise", noise, dtypes=SAMPLER_DTYPES, min_dim=2, arrays=True):
        return through_torch(normalize_noise, locals())
    if out is not None:
        check_out(out, noise.shape, noise.dtype, noise.device)
    return NORMALIZE(NoiseArguments(noise), out)


def channelwise_normalize(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Standardisation over the last two dims: `(x - mean) / std`, unbiased std, one pair per leading index.

    Args:
        x: (..., T, C), fp16, bf16, fp32 or fp64.
        out: written in place of a fresh tensor; may be `x` itself.
    Returns:
        Shape, dtype and strides of x. A constant slice gives NaN.
    Raises:
        TypeError, ValueError: not a floating tensor of at least two dims.

    Contract: rounded; statistics in fp64, one rounding.
    Bytes: two reads and one write.
    Source: the res2s sampler of LTX-2.
    """
    if check_tensor("x", x, dtypes=SAMPLER_DTYPES, min_dim=2, arrays=True):
        return through_torch(channelwise_normalize, locals())
    if out is not None:
        check_out(out, x.shape, x.dtype, x.device)
    return CHANNELWISE(Arguments(x), out)


def noise_statistics(noise: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Statistics of raw noise, for the `noise_stats=` of the sampler ops and for sharded latents.

    Row s holds `(n_s, mean_s, M2_s)` of slice s over the last two dims, with `M2 = sum((x - mean)^2)`; std is `sqrt(M2 / (n - 1))`.

    Args:
        noise: (..., T, C), fp16, bf16, fp32 or fp64.
        out: (slices, 3) fp64.
    Returns:
        (slices, 3) fp64 on the noise's device.
    Raises:
        TypeError, ValueError: not a floating tensor of at least two dims.

    Contract: rounded; fp64 in fixed chunks, so that the result does not depend on the number of threads.
    Bytes: one read of the noise.
    Source: Chan, Golub, LeVeque 1979.
    """
    if check_tensor("noise", noise, dtypes=SAMPLER_DTYPES, min_dim=2, arrays=True):
        return through_torch(noise_statistics, locals())
    if out is not None:
        check_out(out, _statistics_shape(noise), torch.float64, noise.device)
    return STATISTICS(NoiseArguments(noise), out)


def merge_noise_statistics(parts: Sequence[Tensor]) -> Tensor:
    """Statistics of the whole from those of its shards, by Chan's rule, in the order given.

    `n = n1 + n2; d = mean2 - mean1; mean = mean1 + d * n2 / n; M2 = M2_1 + M2_2 + d^2 * n1 * n2 / n`.

    Args:
        parts: tensors (slices, 3) fp64 of `noise_statistics`, one per shard.
    Returns:
        (slices, 3) fp64.
    Raises:
        TypeError, ValueError: no list, no part, or parts of different shapes, dtypes or devices.
    """
    if not isinstance(parts, (list, tuple)):
        use = ": use [parts]" if isinstance(parts, Tensor) else ""
        raise TypeError(f"parts must be a list of tensors of noise_statistics, got {type(parts).__name__}{use}")
    if not parts:
        raise ValueError("parts must hold at least one tensor of noise_statistics, got none")
    for index, part in enumerate(parts):
        check_tensor(f"parts[{index}]", part, dtypes=(torch.float64,))
        if part.dim() != 2 or part.shape[1] != 3:
            raise ValueError(f"parts[{index}] must be (slices, 3), got {tuple(part.shape)}")
        if part.shape != parts[0].shape:
            raise ValueError(
                f"parts[{index}] must have shape {tuple(parts[0].shape)} like parts[0], got {tuple(part.shape)}"
            )
        check_device(f"parts[{index}]", part, parts[0].device)
    merged = parts[0]
    for part in parts[1:]:
        count_a, mean_a, m2_a = merged.unbind(1)
        count_b, mean_b, m2_b = part.unbind(1)
        count = count_a + count_b
        delta = mean_b - mean_a
        mean = mean_a + delta * count_b / count
        merged = torch.stack([count, mean, m2_a + m2_b + delta.square() * count_a * count_b / count], dim=1)
    return merged
