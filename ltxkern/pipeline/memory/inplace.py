"""Mode "inplace": a merge is taken back by subtracting it and correcting the weights that this does not restore."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ltxkern.compiled.merge_lora import SWITCH_TILE, Switch, run_switch
from ltxkern.ops.merge_lora import switch_tier
from ltxkern.pipeline.files.lora import PRISTINE_KEY, LoRAPhase, WeightKey
from ltxkern.pipeline.memory.merge import (
    MAX_CORRECTION_BYTES,
    CorrectionTooLargeError,
    as_matrix,
    bare_deltas,
    binary_ratio,
    phase_deltas,
)
from ltxkern.pipeline.memory.stores import PhaseStore, StoreContext
from ltxkern.pipeline.memory.streams import in_turn
from ltxkern.pipeline.memory.table import LiveWeight, LoRAPhaseError, checksum

logger = logging.getLogger(__name__)

_GROUP = 256
_GROUPS = SWITCH_TILE // _GROUP
_ESCAPE = -128
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Correction:
    """The weights that a subtraction leaves wrong, sparse: offset in a group of 256 and distance in units of bits.

    Args:
        bases: (tiles + 1, 2) int32, wrong weights and escapes before each tile of 16 groups, and in all.
        places: (groups, 2) int16, the same before each group, counted from its tile; whole tiles.
        offsets: (n,) uint8, position within the group, ascending.
        codes: (n,) int8, right bit pattern minus wrong one as integers; -128 says that `escapes` holds the next one.
        escapes: (m,) int of the weight's width, distances that a code cannot hold, in order.
    """

    bases: Tensor
    places: Tensor
    offsets: Tensor
    codes: Tensor
    escapes: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As the kernel takes them."""
        return self.bases, self.places, self.offsets, self.codes, self.escapes

    @property
    def nbytes(self) -> int:
        """Bytes of the correction; two for a wrong weight and about 1/57 for each weight."""
        return sum(tensor.nbytes for tensor in self.tensors)


def bit_pattern(weight: Tensor) -> Tensor:
    """The contiguous tensor as a flat view of integers of its width."""
    return weight.view(-1).view(_WORDS[weight.dtype.itemsize])


def record_correction(right: Tensor, wrong: Tensor) -> Correction:
    """What turns `wrong` into `right`, bit for bit.

    Args:
        right, wrong: contiguous, one shape and dtype.

    Numerical contract: exact for every bit pattern, NaN and signed zero included.
    Bytes: read both once; about 13 bytes of temporaries per wrong weight and 2 per weight.
    """
    target, current = bit_pattern(right), bit_pattern(wrong)
    index = torch.nonzero(target != current).view(-1)
    distance = target[index] - current[index]
    escaped = (distance < _ESCAPE + 1) | (distance > -_ESCAPE - 1)
    codes = torch.where(escaped, torch.full_like(distance, _ESCAPE), distance).to(torch.int8)
    tiles = -(-target.numel() // SWITCH_TILE)
    counts = torch.zeros(tiles * _GROUPS, 2, dtype=torch.int64, device=right.device)
    # bincount would synchronise for its length; every index lies below numel, so the length is known.
    counts.index_add_(0, index // _GROUP, torch.stack((torch.ones_like(index), escaped.to(index.dtype)), dim=1))
    before = torch.cat((counts.new_zeros(1, 2), counts.cumsum(0)))
    bases = before[::_GROUPS]
    places = (before[:-1].view(tiles, _GROUPS, 2) - bases[:-1, None]).view(-1, 2)
    offsets = (index % _GROUP).to(torch.uint8)
    return Correction(bases.to(torch.int32), places.to(torch.int16), offsets, codes, distance[escaped].clone())


def apply_correction(weight: Tensor, correction: Correction) -> Tensor:
    """Puts the recorded bits back, in place.

    Args:
        weight: contiguous; the `wrong` of `record_correction`.

    Returns:
        `weight`, equal to the recorded `right` bit for bit.
    """
    bases = correction.bases[:, 0].to(torch.int64)
    starts = bases[:-1].repeat_interleave(_GROUPS, output_size=correction.places.shape[0]) + correction.places[:, 0]
    counts = torch.diff(starts, append=bases[-1:])
    groups = torch.arange(counts.numel(), device=weight.device) * _GROUP
    index = torch.repeat_interleave(groups, counts, output_size=correction.offsets.numel())
    index += correction.offsets
    bits = bit_pattern(weight)
    distance = correction.codes.to(bits.dtype, copy=True)
    if correction.escapes.numel():
        distance.masked_scatter_(correction.codes == _ESCAPE, correction.escapes)
    bits[index] = distance.add_(bits[index])
    return weight


def switch_in_one_pass(
    tier: str,
    weight: Tensor,
    out: Tensor,
    deltas: Iterable[tuple[Tensor, slice]],
    correction: Correction | None,
    subtract: float,
    add: float,
) -> Tensor:
    """`out = correct(weight - subtract delta) + add delta`, each sum rounded, chunk by chunk as the products are made.

    Args:
        tier: by `switch_tier`.
        weight, out: (out, in), 16-bit; out may be the weight.
        deltas: as `phase_deltas` gives them.
        correction: of the subtraction; None: nothing is corrected.
        subtract, add: powers of two, or 0.

    Returns:
        `checksum(out)`.

    Bytes: read W and the correction, write out; a delta comes from the second cache where its chunk stays there.
    """
    given = correction.tensors if correction is not None else (None,) * 5
    sums: list[Tensor] = []
    held: list[Tensor] = []
    top, (height, width) = 0, weight.shape
    for delta, _ in deltas:
        held.append(delta)
        bottom = top + sum(part.shape[0] for part in held)
        if bottom < height and bottom * width % SWITCH_TILE:
            continue  # a row of the checksum would be cut
        product = held[0] if len(held) == 1 else torch.cat(held)
        case = Switch(weight.dtype, product.numel(), top * width // SWITCH_TILE, subtract, add)
        sums.append(run_switch(tier, case, weight[top:bottom], product, *given, out[top:bottom]))
        held, top = [], bottom
    return (torch.cat(sums) if len(sums) > 1 else sums[0]).sum(0)


class InplaceStore(PhaseStore):
    """One copy and no host copy: back to pristine by subtracting and an exact correction, then the other merge.

    A block is computed beside its present tensors, checked, and only then swapped in; the tensors that it replaces serve
    the next block. So an exception at any point loses nothing.
    """

    merges_again = True

    def __init__(self, context: StoreContext) -> None:
        super().__init__(context)
        self._corrections: dict[tuple[str, WeightKey], Correction] = {}
        self._scratch: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        # Needed to subtract: the phase behind a key.
        self._phase_of: dict[tuple[str, WeightKey], LoRAPhase] = {}

    def switch(self, phase: LoRAPhase) -> None:
        if phase.reads_weights:
            raise CorrectionTooLargeError(
                "a LoRA with weight decomposition depends on the pristine weights, which inplace does not keep"
            )
        for block, modules in self.stale(phase):
            if modules:
                self.clock.note(f"merge {block}")
                self._switch_block(modules, phase)
        self._scratch.clear()
        self._drop_corrections(phase)
        logger.info("inplace corrections: %.3f bytes per weight", self.bytes_per_weight)

    def prepare(self, phases: Sequence[LoRAPhase]) -> None:
        super().prepare(phases)
        self._drop_corrections(None)
        # Both corrections are made now, so that a run finds out here whether they fit.
        for phase in reversed(phases):
            if not all(
                key == PRISTINE_KEY or (module, key) in self._corrections
                for module in self.table.live
                for key in [phase.key(module)]
            ):
                self.switch(phase)
        if self.bytes_per_weight > MAX_CORRECTION_BYTES:
            raise CorrectionTooLargeError(
                f"the exact corrections need {self.bytes_per_weight:.2f} bytes per weight, "
                f"more than {MAX_CORRECTION_BYTES:g}: the LoRAs change the weights too much"
            )

    def _switch_block(self, modules: Sequence[str], phase: LoRAPhase) -> None:
        # Tensors that the block before had and this one cannot use are not kept beside it.
        shapes = {(live.tensor.shape, live.tensor.dtype) for live in map(self.table.live.__getitem__, modules)}
        self._scratch = {shape: free for shape, free in self._scratch.items() if shape in shapes}
        built = {module: self._take(self.table.live[module].tensor) for module in modules}
        ratios = {module: self._known_ratio(module, phase) for module in modules}
        wanted = {module: phase.key(module) for module in modules}
        quick = {module: ratio for module, ratio in ratios.items() if ratio is not None}
        try:
            jobs = [partial(self._by_one_product, module, built[module], ratio) for module, ratio in quick.items()]
            sums = dict(zip(quick, in_turn(self.clock, jobs), strict=True)) if jobs else {}
            sums |= self._by_two_products({m: tensor for m, tensor in built.items() if ratios[m] is None}, phase)
            self.table.expect_sums(sums, wanted)
        except LoRAPhaseError:
            if not quick:
                raise
            # An under- or overflow is enough; the long way tells whether it was that or a weight that someone changed.
            self.table.expect_sums(self._by_two_products(built, phase), wanted)
        for module, tensor in built.items():
            before = self.table.live[module].tensor
            self.table.live[module] = LiveWeight(tensor, phase.key(module))
            self.table.point(module)
            self._scratch[tensor.shape, tensor.dtype].append(before)

    def _known_ratio(self, module: str, phase: LoRAPhase) -> float | None:
        """Of the deltas of `phase` and of the present one, where one product serves both and a checksum proves the result."""
        key, wanted = self.table.live[module].key, phase.key(module)
        if self.rounding != "reference" or key is None or PRISTINE_KEY in (key, wanted):
            return None
        # The checksum comes after the correction: an exception in between leaves nothing that could prove the result.
        if (module, wanted) not in self._corrections or (module, wanted) not in self.table.checksums:
            return None
        return binary_ratio(module, self._phase_of[module, key], phase)

    def _by_one_product(self, module: str, tensor: Tensor, ratio: float) -> Tensor:
        """(W - d), corrected, + ratio d; returns the checksum."""
        live = self.table.live[module]
        assert live.key is not None
        entry = (module, live.key)
        present, matrix = as_matrix(live.tensor), as_matrix(tensor)
        if (tier := switch_tier(present, matrix)) is not None:
            products, scale = bare_deltas(matrix, module, self._phase_of[entry], self.factors)
            return switch_in_one_pass(tier, present, matrix, products, self._corrections[entry], scale, ratio * scale)
        deltas = list(phase_deltas(matrix, module, self._phase_of[entry], self.factors))
        for delta, rows in deltas:
            torch.sub(present[rows], delta, out=matrix[rows])
        apply_correction(tensor, self._corrections[entry])
        for delta, rows in deltas:
            matrix[rows].add_(delta, alpha=ratio)
        return checksum(tensor)

    def _by_two_products(self, built: Mapping[str, Tensor], phase: LoRAPhase) -> dict[str, Tensor]:
        """Back to pristine, then the merge, for weights of one block; returns their checksums."""
        pristine = {module: self._restore(module, tensor) for module, tensor in built.items()}
        # Where the result has a checksum already, that one will tell.
        known = self.table.checksums.keys()
        unproven = {
            m: checksum(built[m]) if s is None else s for m, s in pristine.items() if (m, phase.key(m)) not in known
        }
        self.table.expect_sums(unproven, dict.fromkeys(unproven, PRISTINE_KEY))
        sums = {
            module: pristine[module] if phase.key(module) == PRISTINE_KEY else self._merge(module, tensor, phase)
            for module, tensor in built.items()
        }
        return {module: checksum(built[module]) if found is None else found for module, found in sums.items()}

    def _shift(
        self, weight: Tensor, tensor: Tensor, entry: tuple[str, WeightKey], *, correct: bool, by: tuple[float, float]
    ) -> Tensor | None:
        """`switch_in_one_pass` of a phase's own product; None where that is not to be had."""
        weight, tensor = as_matrix(weight), as_matrix(tensor)
        tier = switch_tier(weight, tensor) if self.rounding == "reference" else None
        if tier is None:
            return None
        products = phase_deltas(tensor, entry[0], self._phase_of[entry], self.factors)
        return switch_in_one_pass(tier, weight, tensor, products, self._corrections[entry] if correct else None, *by)

    def _restore(self, module: str, tensor: Tensor) -> Tensor | None:
        """Makes the pristine weight; its checksum where it came for nothing."""
        live = self.table.live[module]
        if live.key is None:
            raise LoRAPhaseError(f"{module}.weight is unknown and inplace keeps no copy: load the transformer again")
        if live.key != PRISTINE_KEY:
            entry = (module, live.key)
            sums = self._shift(live.tensor, tensor, entry, correct=True, by=(1.0, 0.0))
            if sums is not None:
                return sums
        tensor.copy_(live.tensor)
        if live.key != PRISTINE_KEY:
            self.merge(tensor, module, self._phase_of[entry], sign=-1)
            apply_correction(tensor, self._corrections[entry])
        return None

    def _merge(self, module: str, tensor: Tensor, phase: LoRAPhase) -> Tensor | None:
        """Merges into a pristine tensor; records and proves the correction where there is none yet. The checksum as `_restore`."""
        entry = (module, phase.key(module))
        if entry in self._corrections:
            sums = self._shift(tensor, tensor, entry, correct=False, by=(0.0, 1.0))
            if sums is None:
                self.merge(tensor, module, phase)
            return sums
        pristine = self._take(tensor).copy_(tensor)
        self.merge(tensor, module, phase)
        subtracted = self._take(tensor).copy_(tensor)
        self.merge(subtracted, module, phase, sign=-1)
        correction = record_correction(pristine, subtracted)
        again = subtracted.copy_(tensor)
        self.merge(again, module, phase, sign=-1)
        apply_correction(again, correction)
        if not torch.equal(checksum(again), checksum(pristine)):
            raise CorrectionTooLargeError(f"the matrix product of {module} is not repeatable on this device")
        self._phase_of[entry] = phase
        self._corrections[entry] = correction
        self._scratch[tensor.shape, tensor.dtype] += [pristine, again]
        return None

    def _take(self, like: Tensor) -> Tensor:
        free = self._scratch.setdefault((like.shape, like.dtype), [])
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def _drop_corrections(self, current: LoRAPhase | None) -> None:
        """Keeps the corrections of the prepared phases and of what is in the weights."""
        kept = {(module, phase.key(module)) for module in self.table.live for phase in self.phases}
        kept |= {(module, live.key) for module, live in self.table.live.items() if live.key is not None}
        for entry in set(self._corrections) - kept:
            del self._corrections[entry]
            del self._phase_of[entry]

    def close(self) -> None:
        self._corrections.clear()
        self._phase_of.clear()
        self._scratch.clear()

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of all corrections per patched weight."""
        return self.extra_device_bytes / max(1, self.table.numel)

    @property
    def extra_device_bytes(self) -> int:
        return sum(correction.nbytes for correction in self._corrections.values())
