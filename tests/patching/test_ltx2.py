"""diffusers' LTX-2 transformer and its pipelines on the row ops: same numbers in every form, every site, and out again."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoAttnProcessor
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ltxkern
from ltxkern.patching import ltx2_model, rules
from ltxkern.patching import products as module
from ltxkern.patching.products import gelu_serves
from ltxkern.pipeline.files.demo import DEMO_CONFIGS, build_demo

SIZES = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 32,
}
NEW = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "rope_type": "split",
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
    "cross_attn_timestep_scale_multiplier": 250,
}
KINDS: dict[str, dict[str, Any]] = {
    "2.3": NEW,
    "2.3, fixed prompt modulation": NEW | {"use_prompt_adaln_single": False},
    "2.0": {"rope_type": "split"},
    "2.0, interleaved": {"rope_type": "interleaved"},
}
BATCH, TOKENS, AUDIO_TOKENS, FIRST_FRAME = 2, 24, 5, 12
# Each by its sites in one block of 2.3; 2.0 has no gates of heads and no modulation of the text's queries.
PER_BLOCK = {
    "rms_norm_modulate": 2,
    "gated_residual_rms_norm_modulate": 4,
    "gated_residual_rms_norm_modulate_twice": 2,
    "gated_residual": 2,
    "linear_gelu": 2,
    "qk_norm_rope": 4,
    "head_gate": 6,
}


# The GELU of a CPU's product is that of the error function.
ELSEWHERE = "linear_gelu"


def served(report: Any) -> list[Any]:
    """The rows of what a CPU serves."""
    return [row for row in report.rows if row.op != ELSEWHERE]


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return LTX2VideoTransformer3DModel(**SIZES, **KINDS[kind]).eval().requires_grad_(False)


def inputs_of(kind: str, *, by_token: bool, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    caption = {} if "2.3" in kind else {"width": 32}
    timestep = torch.tensor([700.0, 350.0])
    shown = (torch.arange(TOKENS) < FIRST_FRAME).float()
    return {
        "hidden_states": draw(BATCH, TOKENS, 16),
        "audio_hidden_states": draw(BATCH, AUDIO_TOKENS, 8),
        "encoder_hidden_states": draw(BATCH, 6, caption.get("width", 64)),
        "audio_encoder_hidden_states": draw(BATCH, 6, 32),
        "timestep": timestep[:, None] * (1 - shown) if by_token else timestep,
        "audio_timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * BATCH),
        "audio_encoder_attention_mask": torch.ones(BATCH, 6),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": AUDIO_TOKENS,
        "return_dict": False,
        **more,
    }


def off(values: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(
        float((v.double() - e.double()).norm() / e.double().norm()) for v, e in zip(values, expected, strict=True)
    )


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cross timestep": {"use_cross_timestep": True},
    "isolated": {"isolate_modalities": True},
    "guided": {"spatio_temporal_guidance_blocks": [1]},
    "guided in part": {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([0.0, 1.0])},
    "masked": {"video_self_attention_mask": torch.eye(TOKENS).expand(BATCH, -1, -1)},
}


class RowOps(TorchDispatchMode):
    """Counts what the row ops stand for in a stock forward, and rows that go into the timestep embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.embedded = 0
        self.kinds: dict[int, tuple[str, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        kinds = {self.kinds[id(part)][0] for part in args if id(part) in self.kinds}
        kind = ""
        if name == "rsqrt":
            kind = "norm"
        elif name in ("addmm", "mm"):
            kind = "linear"
            self.embedded += result.shape[0] if result.shape[1] == 9 * 64 else 0
        elif name in ("view", "_to_copy", "_unsafe_view"):
            kind = next(iter(kinds), "")
        elif name == "mul":
            # What the first block normalises is a linear layer's result.
            kind = "scaled" if "norm" in kinds else "gated" if "linear" in kinds else ""
            # The norm itself is a product with the root, and then one with the scale.
            kind = "normed" if kind == "scaled" and args[1].shape[-1] == 1 else "scaled" if "normed" in kinds else kind
        elif name == "add":
            self.counts["modulated"] += "scaled" in kinds
            self.counts["gated"] += "gated" in kinds
        self.counts["sigmoid"] += name == "sigmoid"
        self.counts["rotated"] += name == "addcmul_"
        if kind:
            self.kinds[id(result)] = (kind, result)
        return result


@pytest.mark.parametrize("by_token", [False, True], ids=["", "per token"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformer(kind: str, by_token: bool) -> None:
    model = model_of(kind)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    for name, flags in FLAGS.items():
        if name != "plain" and kind != "2.3":
            continue
        inputs = inputs_of(kind, by_token=by_token, **flags)
        plain = model(**inputs)
        report = ltxkern.patch(model)
        assert off(model(**inputs), plain) < 1e-5, name
        if name == "plain":
            assert all((row.calls, row.composed) == ((0, 1) if row.op == ELSEWHERE else (1, 0)) for row in report.rows)
            assert report.left == []
            copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
            assert off(copied(**inputs), plain) < 1e-5
            assert len(ltxkern.patch(copied).sites) == len(report.sites)
        report.undo()
        assert all(map(torch.equal, model(**inputs), plain))
    assert ([type(module) for module in model.modules()], list(model.state_dict())) == (classes, keys)


@torch.no_grad()
def test_every_site() -> None:
    model, inputs = model_of("2.3"), inputs_of("2.3", by_token=True)
    with RowOps() as stock:
        model(**inputs)
    report = ltxkern.patch(model)
    ops = Counter(row.op for row in report.rows)
    assert ops == {op: 2 * count for op, count in PER_BLOCK.items()}
    both, twice = (ops[f"gated_residual_rms_norm_modulate{end}"] for end in ("", "_twice"))
    # Two addcmul_ rotate a tensor, and a site has two tensors.
    assert stock.counts == {
        "modulated": ops["rms_norm_modulate"] + both + 2 * twice,
        "gated": ops["gated_residual"] + both + twice,
        "sigmoid": ops["head_gate"],
        "rotated": 4 * ops["qk_norm_rope"],
    }
    with RowOps() as patched:
        model(**inputs)
    assert not patched.counts.total()
    # Three distinct timesteps of the video's tokens.
    assert (stock.embedded, patched.embedded) == (BATCH * TOKENS, 3)


@torch.no_grad()
def test_gelu_in_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose product has the right one; not where a feed-forward is more than its products."""

    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.gelu(nn.functional.linear(x, weight, bias), approximate="tanh")

    monkeypatch.setattr(module, "_onednn_multiplies", lambda _: True)
    monkeypatch.setattr(module, "_of_onednn", product)
    gelu_serves.cache_clear()
    model, inputs = model_of("2.3"), inputs_of("2.3", by_token=True)
    plain = model(**inputs)
    seen: list[int] = []
    model.transformer_blocks[1].ff.net[0].register_forward_hook(lambda *_: seen.append(1))
    with ltxkern.patch(model) as report:
        assert off(model(**inputs), plain) < 1e-5
        rows = {row.name: (row.calls, row.composed, row.backend) for row in report.rows if row.op == ELSEWHERE}
    gelu_serves.cache_clear()
    there, hooked = (1, 0, "torch"), (0, 1, "")
    names = [f"transformer_blocks.{index}.{prefix}ff" for index in (0, 1) for prefix in ("", "audio_")]
    assert rows == dict(zip(names, (there, there, hooked, there), strict=True))
    assert seen == [1]


@pytest.mark.parametrize("kind", ["2.3", "2.0"])
@torch.no_grad()
def test_dtypes(kind: str) -> None:
    model = model_of(kind)
    exact = copy.deepcopy(model).double()(**inputs_of(kind, by_token=True, dtype=torch.float64))
    half, inputs = (
        nn.Module.to(copy.deepcopy(model), torch.bfloat16),
        inputs_of(kind, by_token=True, dtype=torch.bfloat16),
    )
    plain = half(**inputs)
    report = ltxkern.patch(half)
    assert off(half(**inputs), exact) <= 1.5 * off(plain, exact)
    assert all(row.calls for row in served(report))
    # Nothing of ours where the dtype of every step is autocast's, or no kernel takes it.
    inputs = inputs_of(kind, by_token=False)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs)
        report = ltxkern.patch(model)
        assert all(map(torch.equal, model(**inputs), plain))
    assert all(row.composed and not row.calls for row in report.rows)
    assert off(model.double()(**inputs_of(kind, by_token=True, dtype=torch.float64)), exact) < 1e-12


def test_gradients() -> None:
    model = model_of("2.3").train().requires_grad_(True)
    inputs = inputs_of("2.3", by_token=True)

    def gradients() -> tuple[Tensor, ...]:
        model.zero_grad()
        sum(part.square().sum() for part in model(**inputs)).backward()
        return (torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]),)

    plain = gradients()
    with ltxkern.patch(model):
        assert off(gradients(), plain) < 1e-5
        model.enable_gradient_checkpointing()
        assert off(gradients(), plain) < 1e-5


@torch.no_grad()
def test_compiled_block() -> None:
    block: Any = model_of("2.3").transformer_blocks[0]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    states = [draw(1, 6, 64), draw(1, 5, 32), draw(1, 4, 64), draw(1, 4, 32)]
    widths = [9 * 64, 9 * 32, 4 * 64, 4 * 32, 64, 32, 2 * 64, 2 * 32]
    tables = [(draw(1, 4, tokens, r), draw(1, 4, tokens, r)) for tokens, r in ((6, 8), (5, 4), (6, 4), (5, 4))]
    inputs = (*states, *(draw(1, 1, width) for width in widths), *tables)
    ops: list[str] = []

    def look(graph: Any, _: Any) -> Any:
        ops.extend(name for node in graph.graph.nodes if (name := str(node.target)).startswith("ltxkern"))
        return graph

    directions = [{f"use_{one}_cross_attention": False} for one in ("a2v", "v2a")]
    plain = [block(*inputs, **flags) for flags in directions]
    report = ltxkern.patch(block)
    assert all(off(block(*inputs, **flags), one) < 1e-5 for flags, one in zip(directions, plain, strict=True))
    expected = block(*inputs)
    torch._dynamo.reset()
    assert all(map(torch.equal, torch.compile(block, backend=look, fullgraph=True)(*inputs), expected))
    assert len(ops) == len(served(report)) == sum(PER_BLOCK.values()) - PER_BLOCK[ELSEWHERE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_exact_has_the_bits_of_the_stock_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """While both run and afterwards; what has not the bits is never served. The sound's results are too few to tell."""
    monkeypatch.setattr(rules, "ENOUGH", BATCH * TOKENS * 64)
    monkeypatch.setattr(ltx2_model._EXACT, "verdicts", {})
    model = model_of("2.3").to(dtype)
    inputs = inputs_of("2.3", by_token=True, dtype=dtype)
    plain = model(**inputs)
    with ltxkern.patch(model, policy="exact") as report:
        assert {row.op for row in report.rows} == PER_BLOCK.keys() - {ELSEWHERE, "qk_norm_rope"}
        assert all("the policy is exact, and " in left.reason for left in report.left)
        for _ in range(3):
            assert all(map(torch.equal, model(**inputs), plain))
        assert {row.op for row in report.rows if row.calls} == ({"gated_residual"} if dtype is torch.float32 else set())
        assert all(row.calls + row.composed == 3 for row in report.rows)


class _OwnProcessor(LTX2AudioVideoAttnProcessor):
    """Somebody else's."""

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        return 2 * super().__call__(*args, **keywords)


@torch.no_grad()
def test_what_is_left_alone() -> None:
    model, inputs = model_of("2.3"), inputs_of("2.3", by_token=True)
    plain = model(**inputs)
    with ltxkern.patch(model, ops=["qk_norm_rope", "head_gate"]) as report:
        assert off(model(**inputs), plain) < 1e-5
        assert {row.op for row in report.rows} == {"qk_norm_rope", "head_gate"}
        assert len(report.left) == 2 * (sum(PER_BLOCK.values()) - 4 - 6)
    model.transformer_blocks[0].norm1.register_forward_hook(lambda *_: None)
    model.transformer_blocks[1].attn1.norm_q.register_forward_hook(lambda *_: None)
    with ltxkern.patch(model) as report:
        assert [left.reason for left in report.left] == [
            "LTX2VideoTransformerBlock has a norm1 that has forward hooks",
            "LTX2Attention has a norm_q that has forward hooks",
        ]
        assert off(model(**inputs), plain) < 1e-5
    model = model_of("2.3")
    model.transformer_blocks[0].attn1.set_processor(_OwnProcessor())
    plain = model(**inputs)
    with ltxkern.patch(model) as report:
        assert off(model(**inputs), plain) < 1e-5
        composed = [row.name for row in served(report) if row.composed]
        assert composed == [f"transformer_blocks.0.attn1.{name}" for name in ("norm_q", "to_gate_logits")]


@cache
def _components() -> dict[str, Any]:
    """The demo's parts, with the stock transformer."""
    parts = build_demo()
    transformer = LTX2VideoTransformer3DModel(**DEMO_CONFIGS["transformer"]).eval().requires_grad_(False)
    transformer.load_state_dict(parts.transformer.state_dict())
    names = ("audio_vae", "text_encoder", "tokenizer", "connectors", "vocoder")
    shift = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    found = {name: getattr(parts, name) for name in names}
    return found | {"vae": parts.video_vae, "transformer": transformer, "scheduler": scheduler}


def _picture() -> Image.Image:
    return Image.new("RGB", (64, 64), (200, 30, 30))


PIPELINES: dict[type, dict[str, Any]] = {
    LTX2Pipeline: {},
    LTX2ImageToVideoPipeline: {"image": _picture()},
    LTX2ConditionPipeline: {"conditions": [LTX2VideoCondition(frames=_picture(), index=0, strength=1.0)]},
}


@pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_pipeline(kind: Any) -> None:
    pipeline = kind(**_components())
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a cat", "negative_prompt": "bad", "height": 64, "width": 64, "num_frames": 17}
    settings = {"num_inference_steps": 2, "spatio_temporal_guidance_blocks": [1], "max_sequence_length": 128}

    def latents() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            **arguments, **settings, **PIPELINES[kind], generator=generator, output_type="latent", return_dict=False
        )

    plain = latents()
    with ltxkern.patch(pipeline) as report:
        assert off(latents(), plain) < 1e-5
        assert all(row.calls and not row.composed for row in served(report))
        assert sum(name.startswith("transformer.") for name in report.sites) == 2 * sum(PER_BLOCK.values())
    assert all(map(torch.equal, latents(), plain))
