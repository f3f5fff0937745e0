"""Merging a LoRA phase, or two at once, into a weight: the products, and what of them can be used again."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ltxkern.ops.dual_add import dual_add
from ltxkern.ops.merge_lora import CHUNK_BYTES, merge_lora_, reference_deltas, reference_rows
from ltxkern.pipeline.files.lora import LoRAPhase
from ltxkern.pipeline.files.lora_kinds import Change, Factors, LoRAFactors
from ltxkern.pipeline.memory.factors import FactorCache

# Of a weight, on average, in mode "inplace".
MAX_CORRECTION_BYTES = 1.0


class CorrectionTooLargeError(RuntimeError):
    """The exact corrections of "inplace" would exceed their limit, or the matrix product is not repeatable."""


def merge_phase(
    weight: Tensor,
    module: str,
    phase: LoRAPhase,
    *,
    rounding: str = "reference",
    sign: int = 1,
    cache: FactorCache | None = None,
) -> Tensor:
    """Merges a phase into one weight in place, or subtracts the same products again.

    Args:
        weight: (out, in) or (out,), in place.
        module: name of its module, or of the parameter where it is no module's weight.
        phase: what to merge.
        rounding: as `merge_lora_`.
        sign: 1 merges; -1 subtracts bit for bit the products that 1 adds. Rounding still loses some weights: a
            subtraction is no unmerge by itself.
        cache: where factors come from that are on the device already.

    Returns:
        `weight`.
    """
    found = merged_changes(module, phase)
    if found:
        matrix = as_matrix(weight)
        a, b = _factors(matrix, found, cache)
        scales = [sign * scale for _, scale in found]
        chunk = _chunk_bytes(matrix, a, b, scales) if rounding == "reference" else CHUNK_BYTES
        merge_lora_(matrix, a, b, scales, chunk_bytes=chunk, rounding=rounding)
    return weight


def merge_phase_beside(
    weight: Tensor,
    other: Tensor,
    module: str,
    phase: LoRAPhase,
    *,
    rounding: str = "reference",
    cache: FactorCache | None = None,
) -> None:
    """`other` becomes `weight` with the phase merged, bit-equal to `merge_phase`; `weight` stays.

    Args:
        weight: (out, in), pristine.
        other: as `weight`; what it holds is overwritten.
        module, phase, rounding, cache: as `merge_phase`.

    Bytes: with "reference", one read of W and one write, and one write and read of the delta; else W is copied first.
    """
    if rounding != "reference" or not merged_changes(module, phase):
        merge_phase(other.copy_(weight), module, phase, rounding=rounding, cache=cache)
        return
    weight, other = as_matrix(weight), as_matrix(other)
    for delta, part in phase_deltas(weight, module, phase, cache):
        torch.add(weight[part], delta, out=other[part])


def merge_phase_pair(
    weight: Tensor,
    other: Tensor,
    module: str,
    phases: tuple[LoRAPhase, LoRAPhase],
    *,
    rounding: str = "reference",
    cache: FactorCache | None = None,
    ratio: float | None = None,
) -> None:
    """Merges two phases at once: `weight` becomes the first, in place, `other` the second; each bit-equal to `merge_phase`.

    Args:
        weight: (out, in), pristine.
        other: as `weight`; what it holds is overwritten.
        module: name of its module.
        phases: what to merge; each changes the module.
        rounding: as `merge_lora_`.
        cache: where factors come from that are on the device already.
        ratio: as `proven_ratios` says of the module; one product makes both deltas then.

    Bytes: with "reference", one read of W, one write of each result, and one write and read of each delta, which is made
    chunk by chunk and stays in the second cache where it fits; with the other roundings, or where the phases do not have the
    same chunks, W is copied first.
    """
    first, second = phases
    found = [merged_changes(module, phase) for phase in phases]
    weight, other = as_matrix(weight), as_matrix(other)
    # Deltas meet W chunk by chunk: for that both phases need the same chunks. A change that is no low-rank product has
    # factors as wide as W, which does not make the chunks smaller.
    rows = {
        reference_rows(weight, first.a.shape[0] if isinstance(first, LoRAFactors) else 1)
        for changes in found
        for first, _ in changes[:1]
    }
    if rounding != "reference" or not all(found) or len(rows) > 1:
        merge_phase_beside(weight, other, module, second, rounding=rounding, cache=cache)
        merge_phase(weight, module, first, rounding=rounding, cache=cache)
        return
    deltas = phase_deltas(weight, module, first, cache)
    if ratio is not None:
        for delta, part in deltas:
            dual_add(weight[part], delta, delta * ratio, out=(weight[part], other[part]))
        return
    for (delta, part), (other_delta, _) in zip(deltas, phase_deltas(weight, module, second, cache), strict=True):
        dual_add(weight[part], delta, other_delta, out=(weight[part], other[part]))


def as_matrix(weight: Tensor) -> Tensor:
    """The weight itself, or a parameter of one dimension as a column."""
    return weight if weight.dim() == 2 else weight.view(-1, 1)


def merged_changes(module: str, phase: LoRAPhase) -> list[tuple[Change, float]]:
    """(change, scale) of what really changes a module's weight: rank and scale are not 0."""
    return [(change, scale) for change, scale in zip(*phase.factors(module), strict=True) if change.rank != 0 and scale]


def _factors(
    matrix: Tensor, found: Sequence[tuple[Change, float]], cache: FactorCache | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Both factors of each change, on the device of the weight, which is pristine wherever a change reads it."""
    source = cache if cache is not None else FactorCache()
    pairs: list[Factors] = [change.factors(source.on(matrix.device, change), matrix) for change, _ in found]
    return [a for a, _ in pairs], [b for _, b in pairs]


def phase_deltas(
    weight: Tensor, module: str, phase: LoRAPhase, cache: FactorCache | None = None
) -> Iterator[tuple[Tensor, slice]]:
    """`reference_deltas` of what a phase merges into one module, which it changes."""
    found = merged_changes(module, phase)
    return _deltas(as_matrix(weight), found, [scale for _, scale in found], cache)


def bare_deltas(
    weight: Tensor, module: str, phase: LoRAPhase, cache: FactorCache | None = None
) -> tuple[Iterator[tuple[Tensor, slice]], float]:
    """Deltas, and the power of two by which they are multiplied to give `phase_deltas`, short of under- and overflow.

    Of one LoRA at a strength that is a power of two it is the bare product, for which no factor is scaled.
    """
    found = merged_changes(module, phase)
    scales = [scale for _, scale in found]
    if len(found) == 1 and abs(math.frexp(scales[0])[0]) == 0.5:
        return _deltas(as_matrix(weight), found, [1.0], cache), scales[0]
    return _deltas(as_matrix(weight), found, scales, cache), 1.0


def _deltas(
    matrix: Tensor, found: Sequence[tuple[Change, float]], scales: Sequence[float], cache: FactorCache | None
) -> Iterator[tuple[Tensor, slice]]:
    a, b = _factors(matrix, found, cache)
    return reference_deltas(matrix, a, b, scales, _chunk_bytes(matrix, a, b, scales))


@functools.cache
def near_bytes(device: torch.device) -> int | None:
    """Bytes of a delta that are still in the device's second cache when they are added; None where no chunk helps.

    A quarter of it, for the weight passes through it too. A CPU's chunks are the op's own.
    """
    if device.type != "cuda":
        return None
    return 1 << (torch.cuda.get_device_properties(device).L2_cache_size // 4).bit_length() - 1


# Chunks that were asked for, by everything that a library picks its product by.
_chunks: dict[tuple[object, ...], int] = {}


def _chunk_bytes(weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> int:
    """The chunk of a delta: near the multiprocessors if its bits are those of the whole product, which the first weight of each
    shape shows; else the op's own if that holds for it; else the whole."""
    near = near_bytes(weight.device)
    if near is None:
        return CHUNK_BYTES
    shapes = tuple((one.shape, one.dtype) for one in a)
    key = weight.device, weight.dtype, weight.shape, shapes, tuple(one.dtype for one in b)
    if key not in _chunks:
        whole = max(1, weight.nbytes, b[0].numel() * weight.itemsize)
        (expected, _), *_ = reference_deltas(weight, a, b, scales, whole)
        candidates = [size for size in (near, CHUNK_BYTES) if size < whole]
        equal = (
            size
            for size in candidates
            if all(torch.equal(delta, expected[rows]) for delta, rows in reference_deltas(weight, a, b, scales, size))
        )
        _chunks[key] = next(equal, whole)
    return _chunks[key]


def binary_ratio(module: str, before: LoRAPhase, after: LoRAPhase) -> float | None:
    """What the delta of `before` is multiplied by to give that of `after`, where that is exact; else None.

    It is for one LoRA whose two scales differ by a power of two, as 0.25 and 0.5 do: roundings commute with it, short of
    under- and overflow.
    """
    one, other = merged_changes(module, before), merged_changes(module, after)
    if len(one) != 1 or len(other) != 1 or one[0][0] is not other[0][0]:
        return None
    first, second = one[0][1], other[0][1]
    ratio = second / first
    return ratio if abs(math.frexp(ratio)[0]) == 0.5 and first * ratio == second else None


def proven_ratios(
    weights: Mapping[str, Tensor], phases: tuple[LoRAPhase, LoRAPhase], cache: FactorCache
) -> dict[str, float]:
    """`binary_ratio` of the modules where it holds for every bit, by the sizes of the factors. The host waits once.

    Scaling by a power of two commutes with every rounding on the way to a delta, as long as no number met there, nor any part of
    one, lies below the normal numbers or beyond the largest.

    Args:
        weights: of a block, by module.
        phases: of which deltas are wanted.
        cache: factors that it would not keep are not asked for: to bring them twice costs more than a product.
    """
    found: dict[str, tuple[float, Tensor, Tensor, float]] = {}
    for module, weight in weights.items():
        ratio = binary_ratio(module, *phases)
        if ratio is None:
            continue
        change, scale = merged_changes(module, phases[0])[0]
        if isinstance(change, LoRAFactors) and cache.stays_on(weight.device, change):
            found[module] = ratio, *change.factors(cache.on(weight.device, change), weight), scale
    if not found:
        return {}
    factors = [factor for _, a, b, _ in found.values() for factor in (a, b)]
    largest = torch._foreach_norm(factors, torch.inf)
    # Of a zero the reciprocal is infinite: that factor proves nothing.
    inverse = torch._foreach_norm(torch._foreach_reciprocal(factors), torch.inf)
    bounds = torch.stack([torch.stack((high.float(), low.float())) for high, low in zip(largest, inverse, strict=True)])
    sizes = iter(bounds.tolist())
    proven = {}
    for module, (ratio, a, _, scale) in found.items():
        (a_high, a_low), (b_high, b_low) = next(sizes), next(sizes)
        limits = torch.finfo(weights[module].dtype)
        few, many = sorted((abs(scale), abs(scale * ratio)))
        # The last bit of a product of the smallest factors, of which that of A counts as 1 at most; and a sum of the largest.
        least = few / (max(a_low, 1.0) * b_low) * limits.eps**2 if b_low else 0.0
        most = many * max(a_high, 1.0) * b_high * a.shape[0]
        # The sixteenth is for the roundings of the bounds themselves.
        if least > 16 * limits.tiny and most < limits.max / 16:
            proven[module] = ratio
    return proven
