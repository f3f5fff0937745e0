"""Mode "inplace": a merge is taken back by subtracting it and correcting the weights that this does not restore."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxkern.pipeline.files.lora import PRISTINE_KEY, LoRAPhase, WeightKey
from ltxkern.pipeline.memory.merge import (
    MAX_CORRECTION_BYTES,
    CorrectionTooLargeError,
    as_matrix,
    binary_ratio,
    phase_deltas,
)
from ltxkern.pipeline.memory.stores import PhaseStore, StoreContext
from ltxkern.pipeline.memory.table import LiveWeight, LoRAPhaseError, checksum

logger = logging.getLogger(__name__)

_GROUP = 256
_ESCAPE = -128
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Correction:
    """The weights that a subtraction leaves wrong, sparse: offset in a group of 256 and distance in units of bits.

    Args:
        counts: (groups,) int16, wrong weights per group of 256 in row-major order.
        offsets: (n,) uint8, position within the group, ascending.
        codes: (n,) int8, right bit pattern minus wrong one as integers; -128 says that `escapes` holds the next one.
        escapes: (m,) int of the weight's width, distances that a code cannot hold, in order.
    """

    counts: Tensor
    offsets: Tensor
    codes: Tensor
    escapes: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the correction; two for a wrong weight and 1/128 for each weight."""
        return sum(tensor.nbytes for tensor in (self.counts, self.offsets, self.codes, self.escapes))


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
    groups = -(-target.numel() // _GROUP)
    counts = torch.zeros(groups, dtype=torch.int64, device=right.device)
    # bincount would synchronise for its length; every index lies below numel, so the length is known.
    counts.scatter_add_(0, index // _GROUP, torch.ones_like(index))
    escaped = (distance < _ESCAPE + 1) | (distance > -_ESCAPE - 1)
    codes = torch.where(escaped, torch.full_like(distance, _ESCAPE), distance).to(torch.int8)
    return Correction(counts.to(torch.int16), (index % _GROUP).to(torch.uint8), codes, distance[escaped].clone())


def apply_correction(weight: Tensor, correction: Correction) -> Tensor:
    """Puts the recorded bits back, in place.

    Args:
        weight: contiguous; the `wrong` of `record_correction`.

    Returns:
        `weight`, equal to the recorded `right` bit for bit.
    """
    groups = torch.arange(correction.counts.numel(), device=weight.device) * _GROUP
    index = torch.repeat_interleave(groups, correction.counts.to(torch.int64), output_size=correction.offsets.numel())
    index += correction.offsets
    bits = bit_pattern(weight)
    distance = correction.codes.to(bits.dtype, copy=True)
    if correction.escapes.numel():
        distance.masked_scatter_(correction.codes == _ESCAPE, correction.escapes)
    bits[index] = distance.add_(bits[index])
    return weight


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
        try:
            for module, ratio in ratios.items():
                if ratio is not None:
                    self._by_one_product(module, built[module], ratio)
            self._by_two_products({m: tensor for m, tensor in built.items() if ratios[m] is None}, phase)
            self.table.expect_all(built, wanted)
        except LoRAPhaseError:
            if all(ratio is None for ratio in ratios.values()):
                raise
            # An under- or overflow is enough; the long way tells whether it was that or a weight that someone changed.
            self._by_two_products(built, phase)
            self.table.expect_all(built, wanted)
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

    def _by_one_product(self, module: str, tensor: Tensor, ratio: float) -> None:
        """(W - d), corrected, + ratio d."""
        live = self.table.live[module]
        assert live.key is not None
        entry = (module, live.key)
        present, matrix = as_matrix(live.tensor), as_matrix(tensor)
        deltas = list(phase_deltas(matrix, module, self._phase_of[entry], self.factors))
        for delta, rows in deltas:
            torch.sub(present[rows], delta, out=matrix[rows])
        apply_correction(tensor, self._corrections[entry])
        for delta, rows in deltas:
            matrix[rows].add_(delta, alpha=ratio)

    def _by_two_products(self, built: Mapping[str, Tensor], phase: LoRAPhase) -> None:
        """Back to pristine, then the merge, for weights of one block."""
        for module, tensor in built.items():
            tensor.copy_(self.table.live[module].tensor)
            self._subtract(module, tensor)
        # Where the result has a checksum already, that one will tell.
        unproven = {m: tensor for m, tensor in built.items() if (m, phase.key(m)) not in self.table.checksums}
        self.table.expect_all(unproven, dict.fromkeys(unproven, PRISTINE_KEY))
        for module, tensor in built.items():
            if phase.key(module) != PRISTINE_KEY:
                self._merge(module, tensor, phase)

    def _subtract(self, module: str, tensor: Tensor) -> None:
        key = self.table.live[module].key
        if key is None:
            raise LoRAPhaseError(f"{module}.weight is unknown and inplace keeps no copy: load the transformer again")
        if key != PRISTINE_KEY:
            self.merge(tensor, module, self._phase_of[module, key], sign=-1)
            apply_correction(tensor, self._corrections[module, key])

    def _merge(self, module: str, tensor: Tensor, phase: LoRAPhase) -> None:
        """Merges into a pristine tensor; records and proves the correction where there is none yet."""
        entry = (module, phase.key(module))
        if entry in self._corrections:
            self.merge(tensor, module, phase)
            return
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
