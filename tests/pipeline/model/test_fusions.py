"""Fused passes and their policies: close to fp64 as "rounded", the bits of the separate ops as "exact"."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.patch import patch
from ltxkern.patching import products, rules
from ltxkern.patching.products import ERROR_RATIO
from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model import fusions
from ltxkern.pipeline.model.fusions import Fusion, FusionPolicy, use_fusions
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity, predict_velocity_batched
from tests.pipeline.model.demo_inputs import FLAGS, inputs, with_mask

TOKENS, WIDTH, HEADS = 6, 64, 4


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Of a fused pass, with a row of modulation for each token of few."""
    x, y, one, two, three = (drawn(1, TOKENS, WIDTH, dtype=dtype, seed=seed) for seed in range(5))
    tables = [drawn(3, WIDTH, dtype=dtype, seed=9 + seed) for seed in range(3)]
    rows = torch.tensor([[0, 2, 1, 1, 0, 2]])
    angles = RotaryTables(drawn(1, HEADS, TOKENS, 8), drawn(1, HEADS, TOKENS, 8, seed=1))
    return {
        "norm_modulate": (x, one[:, :1], two[:, :1], 1e-6, None),
        "norm_modulate by rows": (x, *tables[:2], 1e-6, rows),
        "weighted_norm": (x, one[0, 0], 1e-6),
        "gated_residual": (x, y, one[:, :1], None),
        "gated_norm": (x, y, one[:, :1], two[:, :1], three[:, :1], 1e-6, None),
        "gated_norm by rows": (x, y, *tables, 1e-6, rows),
        "gated_norms": (x, y, one[:, :1], (two[:, :1], three[:, :1], three[:, 1:2], two[:, 1:2]), 1e-6, None),
        "rotated": (x, y[:, :4], one[0, 0], two[0, 0], 1e-6, HEADS, angles, RotaryTables(*(t[:, :, :4] for t in angles[:2]))),
        "head_gate": (x.unflatten(-1, (HEADS, -1)), one[..., :HEADS]),
        "product_gelu": (x, drawn(2 * WIDTH, WIDTH, dtype=dtype, seed=7) / 8, drawn(2 * WIDTH, dtype=dtype)),
        "layer_norm": (x, one[:, :1], two[:, :1], 1e-6),
    }[name]  # fmt: skip


def in_fp64(args: Any) -> Any:
    if isinstance(args, Tensor):
        return args.double() if args.is_floating_point() else args
    if isinstance(args, RotaryTables):
        return RotaryTables(*map(in_fp64, args))
    return tuple(map(in_fp64, args)) if isinstance(args, tuple) else args


def results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "norm_modulate",
        "norm_modulate by rows",
        "weighted_norm",
        "gated_residual",
        "gated_norm",
        "gated_norm by rows",
        "gated_norms",
        "rotated",
        "head_gate",
        "layer_norm",
    ],
)
@torch.no_grad()
def test_a_fused_pass_is_as_close_to_fp64_as_its_ops(name: str, dtype: torch.dtype) -> None:
    fusion, args = getattr(fusions, name.split()[0]), arguments(name, dtype)
    found, apart = results(fusion.fused(*args)), results(fusion.separate(*args))
    exact = [each.double() for each in results(fusion.separate(*in_fp64(args)))]
    for one, other, true in zip(found, apart, exact, strict=True):
        assert one.dtype == other.dtype == dtype
        least = torch.finfo(torch.float32).eps * float(true.norm())
        error = float((one.double() - true).norm())
        assert error <= max(ERROR_RATIO * float((other.double() - true).norm()), least)


def changed(x: Tensor) -> Tensor:
    return x * 2 + 1e-7


@pytest.mark.parametrize(("fused", "serves"), [(lambda x: x + x, True), (changed, False)])
def test_exact_keeps_what_has_the_bits(fused: Any, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run until enough was compared, and from then on one of them alone; another shape is another case."""
    monkeypatch.setattr(rules, "ENOUGH", 10)
    calls: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            calls.append(name)
            return function(x)

        return run

    fusion, policy = Fusion(noted("fused", fused), noted("apart", lambda x: x * 2)), FusionPolicy("exact")
    x, longer = drawn(5), drawn(7)
    for tensor in (x, x, x, longer, x):
        assert torch.equal(policy.checked(fusion.fused, fusion.separate, (tensor,)), tensor * 2)
    first, both = ["apart", "fused"], ["apart", "fused"] if serves else ["apart"]
    one = both[-1:]
    assert calls == [*first, *both, *one, *first, *one]
    assert list(policy.verdicts.values()) == ([10, 7] if serves else [0, 0])
    with use_fusions("rounded"):
        fusions._serve(fusion, x)
    assert calls[-1] == "fused"


def test_exact_judges_no_shapes_without_values() -> None:
    policy = FusionPolicy("exact")
    policy.checked(lambda x: x + x, lambda x: x * 2, (torch.empty(3, device="meta"),))
    assert policy.verdicts == {}


@pytest.mark.parametrize("masked", [False, True])
def test_exact_gives_the_bits_of_separate_ops(model: LTX2Transformer, monkeypatch: Any, masked: bool) -> None:
    """In both of the first calls; every pass of the block is asked."""
    pair = inputs()
    if masked:
        pair["video"] = dataclasses.replace(with_mask(pair["video"]), levels=(1.0, 0.0, 0.25))
    rounded = predict_velocity(model, **pair)
    with use_fusions("exact") as policy:
        found = [predict_velocity(model, **pair) for _ in range(2)]
    assert {layout[0] for layout in policy.verdicts} >= {
        getattr(fusions, name).fused
        for name in (
            "norm_modulate",
            "weighted_norm",
            "gated_residual",
            "gated_norm",
            "gated_norms",
            "rotated",
            "head_gate",
        )
    }
    monkeypatch.setattr(fusions, "_serve", lambda fusion, *args: fusion.separate(*args))
    expected = predict_velocity(model, **pair)
    for velocities in found:
        assert all(map(torch.equal, velocities, expected))
    assert not all(map(torch.equal, rounded, expected))


def test_exact_holds_for_branches_side_by_side() -> None:
    transformer = build_demo(dtype=torch.bfloat16).transformer
    assert transformer is not None
    pair = inputs(dtype=torch.bfloat16)
    branches = [pair | flags for flags in FLAGS]
    with use_fusions("exact"):
        together = predict_velocity_batched(transformer, branches, most=1)
        for outputs, branch in zip(together, branches, strict=True):
            assert all(map(torch.equal, outputs, predict_velocity(transformer, **branch)))


def test_names(monkeypatch: Any) -> None:
    """One rule for the pipeline and for `patch`."""
    monkeypatch.setenv("LTXKERN_POLICY", "exact")
    assert FusionPolicy().name == "exact"
    assert FusionPolicy("rounded").name == "rounded"
    with pytest.raises(ValueError, match=r"strict: .* the policy is exact"):
        patch(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), strict=True)
    assert patch(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), "rounded").sites
    monkeypatch.setenv("LTXKERN_POLICY", "fast")
    with pytest.raises(ValueError, match='LTXKERN_POLICY must be "rounded" or "exact", got \'fast\''):
        FusionPolicy()
    with pytest.raises(ValueError, match='policy must be "rounded" or "exact", got \'all\''):
        FusionPolicy("all")
    with pytest.raises(ValueError, match='LTXKERN_POLICY must be "rounded" or "exact", got \'fast\''):
        patch(nn.Sequential())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PRODUCTS NOT TESTED: torch has no oneDNN")
@torch.no_grad()
def test_every_product_is_the_policys(model: LTX2Transformer, monkeypatch: Any) -> None:
    """All but those within diffusers' timestep embedding; the separate one is torch's."""
    assert fusions.product.separate is torch.nn.functional.linear
    assert fusions.product.fused is products.product
    plain: list[int] = []
    within: list[int] = []
    asked: list[Any] = []
    of_torch, embedding = torch.nn.functional.linear, TimestepEmbedding.forward
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: plain.append(1) or of_torch(*args))
    monkeypatch.setattr(TimestepEmbedding, "forward", lambda *args: within.append(2) or embedding(*args))
    monkeypatch.setattr(products, "onednn_quicker", lambda: False)
    products.gelu_serves.cache_clear()
    expected = predict_velocity(model, **inputs())
    every = len(plain)
    monkeypatch.setattr(products, "onednn_quicker", lambda: True)
    monkeypatch.setattr(products, "LEAST_WIDTH", 1)
    products.gelu_serves.cache_clear()
    assert products.gelu_serves(torch.device("cpu"), torch.float32, True)
    plain.clear()
    within.clear()
    serve = fusions._serve
    monkeypatch.setattr(fusions, "_serve", lambda fusion, *args: asked.append(fusion) or serve(fusion, *args))
    found = predict_velocity(model, **inputs())
    products.gelu_serves.cache_clear()
    assert asked.count(fusions.product_gelu) == 2 * len(model.transformer_blocks)
    assert asked.count(fusions.product) + asked.count(fusions.product_gelu) + len(plain) == every
    assert len(plain) == sum(within)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
