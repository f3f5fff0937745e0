"""From LoRA phase to phase in one pass, run from its own source on CPU fibers: bits, corrections, checksums, whole switches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ltxkern.compiled import merge_lora as launch
from ltxkern.pipeline.files.lora import NO_LORA, LoRAPhase, lora_phases
from ltxkern.pipeline.memory import inplace
from ltxkern.pipeline.memory.inplace import (
    apply_correction,
    bit_pattern,
    record_correction,
    switch_in_one_pass,
)
from ltxkern.pipeline.memory.table import checksum
from tests.csrc.on_shim import noting, on_shim
from tests.ops.contract import noise
from tests.pipeline.memory.lora_models import (
    assert_switches,
    assert_weights,
    fresh_merges,
    linear_weights,
    prepared,
    random_lora,
    small_model,
)

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def a_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "switch_tier", lambda *given: "cuda" if launch.refuse_switch(*given) is None else None)


def composed(
    weight: Tensor, delta: Tensor, correction: inplace.Correction | None, subtract: float, add: float
) -> Tensor:
    """By torch, one step after the other."""
    out = torch.sub(weight, delta, alpha=subtract) if subtract else weight.clone()
    if correction is not None:
        apply_correction(out, correction)
    return out.add_(delta, alpha=add) if add else out


def chunks(delta: Tensor, rows: int) -> Iterator[tuple[Tensor, slice]]:
    for top in range(0, delta.shape[0], rows):
        yield delta[top : top + rows].clone(), slice(top, top + rows)


@HALVES
@pytest.mark.parametrize(("subtract", "add"), [(1.0, 2.0), (1.0, 0.0), (0.0, 1.0), (0.25, -0.5)])
@pytest.mark.parametrize(
    ("shape", "rows"),
    # One chunk; many, of several blocks; chunks that would cut rows of the checksum; a last one that is shorter.
    [((64, 64), 64), ((160, 256), 32), ((128, 96), 24), ((48, 512), 32)],
    ids=str,
)
@pytest.mark.parametrize("wrong", [None, 0.0, 0.1, 1.0])
def test_bits_and_checksums(
    dtype: torch.dtype, subtract: float, add: float, shape: tuple[int, int], rows: int, wrong: float | None
) -> None:
    """Corrections of none, some and all elements, most of which no code holds."""
    weight, delta = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1, scale=0.3)
    correction = None
    if wrong is not None:
        found = torch.sub(weight, delta, alpha=subtract) if subtract else weight
        right = torch.where(noise(*shape, seed=2).sigmoid() < wrong, noise(*shape, dtype=dtype, seed=3), found)
        # Some by a little.
        near = noise(*shape, seed=4) > 1
        bit_pattern(right)[near.view(-1)] = bit_pattern(found)[near.view(-1)] + (3 if wrong else 0)
        correction = record_correction(right, found)
        assert (correction.offsets.numel() > 0) == (correction.escapes.numel() > 0) == (wrong > 0)
    expected = composed(weight, delta, correction, subtract, add)
    for out in (torch.full_like(weight, torch.nan), weight):
        with on_shim(seed=3):
            sums = switch_in_one_pass("cuda", weight, out, chunks(delta, rows), correction, subtract, add)
        assert torch.equal(bit_pattern(out), bit_pattern(expected))
        assert sums.tolist() == checksum(expected).tolist()


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(64, 64, dtype=torch.bfloat16), None),
        (torch.zeros(64, 64), "it takes float16 and bfloat16, not torch.float32"),
        (torch.zeros(64, 63, dtype=torch.bfloat16), "whole rows of 4096 elements of the checksum, not 4032 elements"),
        (torch.zeros(64, 128, dtype=torch.bfloat16)[:, ::2], "whole vectors"),
        (torch.zeros(64 * 64 + 1, dtype=torch.bfloat16)[1:].view(64, 64), "whole vectors"),
    ],
)
def test_what_the_kernel_takes(weight: Tensor, reason: str | None) -> None:
    assert inplace.switch_tier(weight, weight) == (None if reason else "cuda")
    assert reason is None or reason in str(launch.refuse_switch(weight))


@HALVES
@pytest.mark.parametrize(("strengths", "products"), [((0.25, 0.5), 1), ((0.3, 0.7), 2)])
def test_switches_equal_fresh_merges(dtype: torch.dtype, strengths: tuple[float, float], products: int) -> None:
    """Weights that the kernel takes, and one that it does not; two LoRAs at once, and no LoRA."""
    model = small_model(width=64, hidden=128, blocks=2, dtype=dtype)
    distilled, user = random_lora("distilled", model, seed=1), random_lora("user", model, seed=2)
    phases = lora_phases([], distilled, strengths)
    both = LoRAPhase(((user, 0.4), (distilled, 0.25)))
    pristine = linear_weights(model)
    expected = fresh_merges(pristine, [*phases, both, NO_LORA])
    kernels: list[str] = []
    with on_shim(run=noting(kernels)), prepared(model, phases, "inplace") as manager:
        kernels.clear()
        manager.switch_lora_phase(phases[1])
        assert_weights(model, expected[phases[1]])
        taken = sum(weight.numel() % launch.SWITCH_TILE == 0 for weight in pristine.values())
        assert taken == len(pristine) - 1
        # Of fp16 products some bits lie below the normal numbers: what one product gives fails its checksum, and two are taken.
        assert len(kernels) == taken * (3 if dtype == torch.float16 and products == 1 else products)
        assert_switches(manager, model, expected, phases[0], both, phases[1], NO_LORA, phases[0])
        weight = model.proj_in.weight
        kept = weight[3, 4].clone()
        weight[3, 4] += 1
        with pytest.raises(inplace.LoRAPhaseError, match=r"proj_in\.weight does not have the bits"):
            manager.switch_lora_phase(phases[1])
        weight[3, 4] = kept
        assert_switches(manager, model, expected, phases[1])
