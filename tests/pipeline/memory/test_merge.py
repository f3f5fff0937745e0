"""Merges of a phase into a weight: the official rule, two phases in one pass, deltas that are multiples of each other."""

import pytest
import torch

import ltxkern
from ltxkern.compiled import merge_lora as launch
from ltxkern.pipeline.files.lora import NO_LORA, LoRA, LoRAFactors, LoRAPhase
from ltxkern.pipeline.memory import merge as merging
from ltxkern.pipeline.memory.factors import FactorCache
from ltxkern.pipeline.memory.merge import binary_ratio, merge_phase, merge_phase_pair, proven_ratios
from tests.ops.contract import noise
from tests.pipeline.memory.lora_models import Touched, linear_weights, one_lora, random_lora
from tests.serving import serving


@pytest.mark.parametrize("rounding", ["reference", "single"])
@pytest.mark.parametrize("strengths", [((1.0, 0.5), (0.25, 0.5)), ((0.0, 0.7), (0.3, 0.0)), ((1.0, 0.0), (0.5, 1.5))])
@pytest.mark.parametrize("alpha", [None, 0.0, 2.5])
def test_a_pair_of_phases_equals_two_merges(model, rounding, strengths, alpha):
    user, distilled = random_lora("user", model, seed=1), random_lora("distilled", model, seed=2)
    distilled = LoRA("distilled", {name: LoRAFactors(f.a, f.b, alpha) for name, f in distilled.factors.items()})
    first, second = (LoRAPhase(((user, one), (distilled, other))) for one, other in strengths)
    for name, weight in linear_weights(model).items():
        expected = [merge_phase(weight.clone(), name, phase, rounding=rounding) for phase in (first, second)]
        other = torch.full_like(weight, float("nan"))
        merge_phase_pair(weight, other, name, (first, second), rounding=rounding)
        assert torch.equal(weight, expected[0])
        assert torch.equal(other, expected[1])


def stacked(shape, dtype, ranks, strengths):
    """A weight, and the phases of LoRAs of these ranks at each set of strengths."""
    weight = noise(*shape, dtype=dtype, scale=0.02)
    loras = [
        LoRA(
            f"rank {rank}",
            {
                "m": LoRAFactors(
                    noise(rank, shape[1], dtype=dtype, seed=2 * k, scale=0.05),
                    noise(shape[0], rank, dtype=dtype, seed=2 * k + 1, scale=0.05),
                )
            },
        )
        for k, rank in enumerate(ranks)
    ]
    return weight, tuple(LoRAPhase(tuple(zip(loras, phase, strict=True))) for phase in strengths)


@pytest.mark.parametrize("backend", ltxkern.backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("ranks", "strengths"),
    [
        ((4,), ((0.25,), (0.5,))),
        ((3, 5, 2), ((0.7, -0.4, 0.25), (0.7, -0.4, 0.5))),
        ((3, 5), ((0.7, 0.25), (0.0, 0.5))),
        # A first LoRA of more ranks than the weight has columns, in one phase: its chunks are smaller than the other's.
        ((40, 3), ((1.0, 0.25), (0.0, 0.5))),
    ],
    ids=["one", "stacked", "not in both", "chunks that differ"],
)
def test_a_pair_in_several_chunks_equals_two_merges(backend, dtype, ranks, strengths, monkeypatch):
    monkeypatch.setattr(launch, "CPU_CHUNK", 6 * 24 * dtype.itemsize)
    weight, phases = stacked((37, 24), dtype, ranks, strengths)
    expected = [merge_phase(weight.clone(), "m", phase) for phase in phases]
    other = torch.full_like(weight, float("nan"))
    with serving(backend):
        merge_phase_pair(weight, other, "m", phases)
    assert torch.equal(weight, expected[0])
    assert torch.equal(other, expected[1])


def test_a_pair_reads_the_weight_once(monkeypatch):
    monkeypatch.setattr(launch, "CPU_CHUNK", 6 * 24 * 2)
    weight, phases = stacked((37, 24), torch.bfloat16, (3, 5), ((0.7, 0.25), (0.7, 0.5)))
    with torch.no_grad(), Touched(weight) as touched:
        merge_phase_pair(weight, torch.empty_like(weight), "m", phases)
    assert touched.kernel_calls() == 7


@pytest.mark.parametrize(
    ("first", "second", "ratio"),
    [
        (0.25, 0.5, 2.0),
        (1.0, -0.125, -0.125),
        (0.3, 0.6, 2.0),
        (0.3, 0.7, None),
        (0.5, 1.5, None),
        (1e-300, 1e300, None),
    ],
)
def test_deltas_are_multiples_where_the_scales_are(model, first, second, ratio):
    lora = random_lora("distilled", model, seed=1)
    assert binary_ratio("proj_in", LoRAPhase(((lora, first),)), LoRAPhase(((lora, second),))) == ratio


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strengths", [(0.25, 0.5), (0.5, 0.25), (0.3, -0.15), (0.7, 22.4)])
def test_one_product_gives_the_bits_of_both_phases(dtype, strengths, monkeypatch):
    weight, phases = stacked((64, 48), dtype, (16,), [(one,) for one in strengths])
    (ratio,) = proven_ratios({"m": weight}, phases, FactorCache()).values()
    assert ratio == strengths[1] / strengths[0]
    expected = [merge_phase(weight.clone(), "m", phase) for phase in phases]
    products, real = [], merging.phase_deltas
    monkeypatch.setattr(merging, "phase_deltas", lambda *args: (products.append(1), real(*args))[1])
    other = torch.full_like(weight, torch.nan)
    merge_phase_pair(weight, other, "m", phases, ratio=ratio)
    assert products == [1]
    assert torch.equal(weight, expected[0])
    assert torch.equal(other, expected[1])


@pytest.mark.parametrize(
    ("dtype", "spoil"),
    [
        # A product of fp16 factors has bits below the normal numbers, whatever the factors.
        (torch.float16, lambda a, b: None),
        (torch.bfloat16, lambda a, b: a.view(-1)[:1].fill_(1e-38)),
        (torch.bfloat16, lambda a, b: b.view(-1)[:1].fill_(1e-37)),
        (torch.bfloat16, lambda a, b: b.view(-1)[:1].fill_(0.0)),
        (torch.bfloat16, lambda a, b: a.view(-1)[:1].fill_(3e38)),
        (torch.float32, lambda a, b: b.view(-1)[:1].fill_(torch.nan)),
        (torch.float32, lambda a, b: a.mul_(1e-20) if b.mul_(1e-12) is b else None),
    ],
)
def test_what_could_underflow_or_overflow_takes_two_products(dtype, spoil):
    weight, phases = stacked((64, 48), dtype, (16,), ((0.25,), (0.5,)))
    factors = phases[0].entries[0][0].factors["m"]
    spoil(factors.a, factors.b)
    assert proven_ratios({"m": weight}, phases, FactorCache()) == {}


@pytest.mark.parametrize("wrong", [(), (4096,), (4096, 32 << 20)], ids=["near", "own chunk", "whole"])
def test_a_chunk_that_changes_the_bits_is_not_taken(wrong, monkeypatch):
    """Asked once of each shape; what has the bits of the whole product and lies nearest is taken."""
    monkeypatch.setattr(merging, "near_bytes", lambda device: 4096)
    monkeypatch.setattr(merging, "_chunks", {})
    monkeypatch.setattr(merging, "CHUNK_BYTES", 5000)
    wrong = [5000 if size == 32 << 20 else size for size in wrong]
    weight, phases = stacked((200, 24), torch.bfloat16, (4,), ((0.25,), (0.5,)))
    expected, calls, real = merge_phase(weight.clone(), "m", phases[0]), [], merging.reference_deltas
    monkeypatch.setattr(merging, "_chunks", {})

    def deltas(weight, a, b, scales, size):
        calls.append(size)
        for delta, rows in real(weight, a, b, scales, size):
            yield (delta + 1 if size in wrong and rows.start else delta), rows

    monkeypatch.setattr(merging, "reference_deltas", deltas)
    for _ in range(2):
        assert torch.equal(merge_phase(weight.clone(), "m", phases[0]), expected)
    taken = next(size for size in (4096, 5000, weight.nbytes) if size not in wrong)
    assert list(merging._chunks.values()) == [taken]
    assert calls == [weight.nbytes, *dict.fromkeys((*wrong, *([taken] if taken < weight.nbytes else [])))]


def test_two_loras_or_another_one_have_no_ratio(model):
    one, other = random_lora("one", model, seed=1), random_lora("other", model, seed=2)
    single = LoRAPhase(((one, 1.0),))
    for phase in (LoRAPhase(((one, 1.0), (other, 1.0))), LoRAPhase(((other, 1.0),)), LoRAPhase()):
        assert binary_ratio("proj_in", single, phase) is None


@pytest.mark.parametrize(("alpha", "expected"), [(None, 0.5), (1.5, 0.5 * 1.5 / 3), (3.0, 0.5), (0.3, 0.05)])
def test_fractional_alpha_scales_and_no_alpha_does_not(alpha, expected):
    lora = one_lora(alpha=alpha)
    weight = torch.zeros(5, 4)
    merge_phase(weight, "m", LoRAPhase(((lora, 0.5),)), rounding="single")
    torch.testing.assert_close(weight, expected * lora.factors["m"].b @ lora.factors["m"].a)


def test_stacked_loras_follow_the_official_rule():
    user, distilled = one_lora("user", dtype=torch.bfloat16), one_lora("distilled", seed=1, dtype=torch.bfloat16)
    weight = torch.randn(5, 4).bfloat16()
    u, d = user.factors["m"], distilled.factors["m"]
    delta = torch.matmul(u.b * 0.7, u.a)
    delta.addmm_(d.b, d.a, alpha=0.25)
    merged = merge_phase(weight.clone(), "m", LoRAPhase(((user, 0.7), (distilled, 0.25))))
    assert torch.equal(merged, delta + weight)


def test_a_module_without_factors_and_a_phase_without_loras_change_nothing():
    weight = torch.randn(5, 4)
    assert torch.equal(merge_phase(weight.clone(), "other", LoRAPhase(((one_lora(), 1.0),))), weight)
    assert torch.equal(merge_phase(weight.clone(), "m", NO_LORA), weight)


def test_an_fp8_lora_merges_like_its_dequantised_values():
    a, b = torch.randn(3, 4).to(torch.float8_e4m3fn), torch.randn(5, 3).to(torch.float8_e4m3fn)
    lora = LoRA.from_tensors("a", {"m": (a, b, None)})
    merged = merge_phase(torch.zeros(5, 4), "m", LoRAPhase(((lora, 1.0),)), rounding="single")
    torch.testing.assert_close(merged, b.float() @ a.float())
