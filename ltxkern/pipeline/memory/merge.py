"""Merging a LoRA phase, or two at once, into a weight: the products, and what of them can be used again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ltxkern.ops.dual_add import dual_add
from ltxkern.ops.merge_lora import merge_lora_, reference_deltas, reference_rows
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
        merge_lora_(matrix, a, b, [sign * scale for _, scale in found], rounding=rounding)
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
) -> None:
    """Merges two phases at once: `weight` becomes the first, in place, `other` the second; each bit-equal to `merge_phase`.

    Args:
        weight: (out, in), pristine.
        other: as `weight`; what it holds is overwritten.
        module: name of its module.
        phases: what to merge; each changes the module.
        rounding: as `merge_lora_`.
        cache: where factors come from that are on the device already.

    Bytes: with "reference", one read of W, one write of each result, and one write and read of each delta, which is made
    chunk by chunk (32 MiB at most); with the other roundings, or where the phases do not have the same chunks, W is
    copied first.
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
    for (delta, part), (other_delta, _) in zip(
        phase_deltas(weight, module, first, cache), phase_deltas(weight, module, second, cache), strict=True
    ):
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
    matrix = as_matrix(weight)
    return reference_deltas(matrix, *_factors(matrix, found, cache), [scale for _, scale in found])


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
