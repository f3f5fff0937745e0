"""Exact corrections: every bit pattern comes back, and their size at the HQ strengths."""

import pytest
import torch

from ltxkern.pipeline.files.lora import LoRA, LoRAFactors, LoRAPhase
from ltxkern.pipeline.memory.inplace import apply_correction, bit_pattern, record_correction
from ltxkern.pipeline.memory.merge import merge_phase


def random_bits(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(words)
    bits = torch.randint(info.min, info.max, shape, dtype=words, generator=generator)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 257), (13, 256), (37, 101)])
def test_any_bits_come_back(dtype, shape):
    right, wrong = random_bits(shape, dtype, 0), random_bits(shape, dtype, 1)
    # Half of them equal, some one unit apart, the rest anything: infinities, NaN and signs included.
    flat_right, flat_wrong = bit_pattern(right), bit_pattern(wrong)
    flat_wrong[::2] = flat_right[::2]
    flat_wrong[1::8] = flat_right[1::8] + 1
    correction = record_correction(right, wrong)
    assert torch.equal(bit_pattern(apply_correction(wrong.clone(), correction)), flat_right)


def test_the_extreme_distances_that_a_code_holds():
    right = torch.arange(-140, 140, dtype=torch.int16).view(torch.bfloat16)
    wrong = torch.zeros(280, dtype=torch.int16).view(torch.bfloat16)
    correction = record_correction(right, wrong)
    # Of -140 .. 139 these do not fit: -140 .. -128 and 128 .. 139.
    assert correction.escapes.numel() == 13 + 12
    assert torch.equal(bit_pattern(apply_correction(wrong, correction)), bit_pattern(right))


def test_signed_zeros_differ_and_equal_tensors_cost_next_to_nothing():
    zero = torch.zeros(1 << 16)
    assert record_correction(-zero, zero).offsets.numel() == 1 << 16
    nothing = record_correction(zero, zero)
    assert nothing.offsets.numel() == 0
    assert nothing.nbytes == 17 * 8 + 256 * 4 <= zero.numel() / 56


@pytest.mark.parametrize(("rounding", "limit"), [("single", 0.3), ("reference", 0.5)])
def test_bytes_per_weight_at_the_hq_strengths(rounding, limit):
    """Half a byte per weight for both directions; rows of the 4096 x 4096 matrix do not depend on one another."""
    torch.manual_seed(0)
    rows, columns, rank = 512, 4096, 384
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    # Stored by columns: torch's CPU product of bf16 is thirty times faster that way.
    a = torch.randn(columns, rank).bfloat16().t()
    b = (torch.randn(rows, rank) * (0.05 * 0.02 / 0.25 / rank**0.5)).bfloat16()
    lora = LoRA("distilled", {"m": LoRAFactors(a, b)})
    total = 0
    for strength, share in ((0.25, 0.05), (0.5, 0.1)):
        phase = LoRAPhase(((lora, strength),))
        merged = merge_phase(weight.clone(), "m", phase, rounding=rounding)
        spread = (merged.float() - weight.float()).std() / weight.float().std()
        assert spread == pytest.approx(share, rel=0.02)
        subtracted = merge_phase(merged, "m", phase, rounding=rounding, sign=-1)
        correction = record_correction(weight, subtracted)
        assert torch.equal(apply_correction(subtracted, correction), weight)
        total += correction.nbytes
    assert total / weight.numel() <= limit
