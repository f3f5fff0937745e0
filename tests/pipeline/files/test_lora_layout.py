"""LoRA files as the tools write them: every layout merges to the same bits, and alpha is found wherever it is told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ltxkern.pipeline.files.demo import DEMO_CONFIGS
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.files.lora import LoRA, LoRAFactors, LoRAPhase
from ltxkern.pipeline.files.lora_file import load_lora
from ltxkern.pipeline.files.lora_layout import LAYOUTS, STARTS, ModuleNames, parameter_shapes, read_key
from ltxkern.pipeline.files.official_names import TRANSFORMER_PREFIX, official_name
from ltxkern.pipeline.memory.merge import merge_phase
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS, build
from tests.pipeline.files.one_module import one_module

SHAPES = parameter_shapes(build("transformer", DEMO_CONFIGS["transformer"]))
ATTENTION = "transformer_blocks.1.audio_attn1"
MODULES = (
    "proj_in",
    "time_embed.linear",
    "audio_time_embed.emb.timestep_embedder.linear_1",
    "av_cross_attn_video_a2v_gate.linear",
    "prompt_adaln.emb.timestep_embedder.linear_2",
    "transformer_blocks.0.audio_to_video_attn.to_gate_logits",
    "transformer_blocks.1.attn2.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    f"{ATTENTION}.to_q",
    f"{ATTENTION}.to_k",
    f"{ATTENTION}.to_v",
)
RANK = 4
Alphas = dict[str, float | None]


def spelled(module: str, names: str) -> str:
    """The module as a tool writes it."""
    if names == "diffusers":
        return module
    official = official_name("transformer", f"{module}.").removeprefix(TRANSFORMER_PREFIX).removesuffix(".")
    return {"official": official, "underscored": official.replace(".", "_")}.get(names, module.replace(".", "_"))


def random_factors(alphas: Alphas) -> dict[str, LoRAFactors]:
    """Factors for some modules; a fused projection has one A."""
    generator = torch.Generator().manual_seed(len(alphas))
    a = {columns: torch.randn(RANK, columns, generator=generator) for columns in {SHAPES[m][1] for m in alphas}}
    return {
        module: LoRAFactors(a[SHAPES[module][1]], torch.randn(SHAPES[module][0], RANK, generator=generator), alpha)
        for module, alpha in alphas.items()
    }


def assert_merges_alike(path: Path, expected: dict[str, LoRAFactors], transformer: Any = SHAPES) -> None:
    """The file's LoRA makes the weights that the factors make, bit for bit, with both roundings."""
    found, wanted = LoRA.from_file(path, transformer), LoRA("wanted", expected)
    assert set(found.factors) == set(wanted.factors)
    for rounding, dtype in (("reference", torch.bfloat16), ("single", torch.float32)):
        for module in expected:
            weight = torch.linspace(-0.1, 0.1, math.prod(SHAPES[module])).view(SHAPES[module]).to(dtype)
            merged = [
                merge_phase(weight.clone(), module, LoRAPhase(((lora, -0.7),)), rounding=rounding)
                for lora in (found, wanted)
            ]
            assert torch.equal(*merged), module
            assert not torch.equal(merged[0], weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.writer)
@pytest.mark.parametrize("known", [True, False], ids=["model", "no model"])
def test_every_layout_of_the_table_merges_to_the_same_bits(tmp_path, layout, known):
    expected = random_factors(dict.fromkeys(MODULES, 2.0 if layout.alpha else None))
    tensors = {}
    for module, factors in expected.items():
        a, b, alpha = layout.keys(spelled(module, layout.names))
        tensors |= {a: factors.a.clone(), b: factors.b} | ({alpha: torch.tensor(2.0)} if alpha else {})
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_merges_alike(tmp_path / "lora.safetensors", expected, SHAPES if known else None)


def test_the_documentation_lists_every_layout():
    page = (Path(__file__).parents[3] / "docs" / "files.md").read_text()
    for layout in LAYOUTS:
        keys = f"`{layout.module.format('<module>')}{layout.a}`, `{layout.b}`"
        assert f"| {layout.writer} | {layout.names} | {keys} | {f'`{layout.alpha}`' if layout.alpha else ''} |" in page
    assert all(f"`{start}." in page or f"`{start}_" in page for start in STARTS)


HALVES = (
    ("lora_A", "lora_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("lora_linear_layer.down", "lora_linear_layer.up"),
)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """A way to name keys, and a place for alpha."""
    underscored = draw(st.booleans())
    starts = draw(st.lists(st.sampled_from([s for s in STARTS if s != "lora" or underscored]), max_size=4))
    cut = draw(st.integers(0, len(starts))) if underscored else len(starts)
    place = draw(st.sampled_from(sorted(PLACES)))
    start = "".join(f"{s}." for s in starts[:cut]) + "".join(f"{s}_" for s in starts[cut:])
    return {
        "start": start.upper() if draw(st.booleans()) else start,
        "names": draw(st.sampled_from(("underscored", "underscored diffusers") if underscored else ("official", "diffusers"))),
        "halves": draw(st.sampled_from(HALVES)),
        "kernel": draw(st.sampled_from(((), (), (1,), (1, 1), (1, 1, 1)))),
        "late": draw(st.booleans()),
        "adapter": draw(st.sampled_from(("", ".default", ".my-style_2", ".0"))),
        "end": draw(st.sampled_from((".weight", ""))),
        "fused": draw(st.sampled_from((None, None, "to_qkv", "qkv"))),
        "alpha": draw(st.sampled_from((None, 1.0, 4.0, 6.5))),
        "root": draw(st.booleans()),
        "place": place,
    }  # fmt: skip


def _peft(alpha: float, root: bool) -> dict[str, Any]:
    return {"r": RANK, "lora_alpha": alpha, "use_rslora": root, "rank_pattern": {}, "alpha_pattern": {}}


# What stands in the header, what in a file beside; None: in tensors.
PLACES: dict[str, Any] = {
    "tensors": lambda alpha, root: None,
    "diffusers": lambda alpha, root: (
        {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in _peft(alpha, root).items()})},
        {},
    ),
    "nested": lambda alpha, root: ({"training": json.dumps({"network": {"peft": json.dumps(_peft(alpha, root))}})}, {}),
    "kohya": lambda alpha, root: (
        {"ss_network_dim": str(RANK), "ss_network_alpha": str(alpha), "use_rslora": str(root)},
        {},
    ),
    "parameters": lambda alpha, root: ({"hyper": json.dumps([{"params": {"rank": RANK, "alpha": alpha, "useRslora": root}}])}, {}),
    "one for all": lambda alpha, root: (
        {"lora-rank": str(RANK), "lora-alpha": json.dumps({".*": alpha}), "use-rslora": str(root)}, {},
    ),
    "flat": lambda alpha, root: ({"rank": str(RANK), "alpha": str(alpha), "use_rslora": str(root).lower()}, {}),
    "ai-toolkit": lambda alpha, root: (
        {"config": json.dumps({"network": {"linear": RANK, "linear_alpha": alpha, "use_rslora": root}, "optim": {"alpha": 0.9}})},
        {},
    ),
    "peft file": lambda alpha, root: ({}, {"adapter_config.json": _peft(alpha, root)}),
    "own file": lambda alpha, root: ({"format": "pt"}, {"lora.json": {"lora": {"rank": RANK, "alpha": alpha, "rslora": root}}}),
    "pattern": lambda alpha, root: (
        {
            "lora_adapter_metadata": json.dumps(
                {"transformer.r": 9, "transformer.lora_alpha": 77, "transformer.use_rslora": root}
                | {"transformer.rank_pattern": {".*": RANK}, "transformer.alpha_pattern": {".*": alpha}}
            )
        },
        {},
    ),
}  # fmt: skip


def write(folder: Path, layout: dict[str, Any]) -> tuple[Path, dict[str, LoRAFactors]]:
    """A file in a layout, and what it stands for."""
    path, alpha = folder / "lora.safetensors", layout["alpha"]
    expected = random_factors(dict.fromkeys(MODULES, alpha))
    tensors: dict[str, torch.Tensor] = {}
    fused = [f"{ATTENTION}.to_{letter}" for letter in "qkv"] if layout["fused"] else []
    written = {m: (f.a, f.b) for m, f in expected.items() if m not in fused}
    if fused:
        written[f"{ATTENTION}.{layout['fused']}"] = (expected[fused[0]].a, torch.cat([expected[m].b for m in fused]))
    told = None if alpha is None else PLACES[layout["place"]](alpha, layout["root"])
    for module, pair in written.items():
        key = layout["start"] + spelled(module, layout["names"])
        for half, tensor in zip(layout["halves"], pair, strict=True):
            ends = (layout["adapter"], layout["end"])[:: -1 if layout["late"] and layout["end"] else 1]
            tensors[f"{key}.{half}{''.join(ends)}"] = tensor.reshape(*tensor.shape, *layout["kernel"]).clone()
        if alpha is not None and told is None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    metadata, beside = told or ({}, {})
    for old in folder.iterdir():
        old.unlink()
    save_file(tensors, path, metadata or None)
    for name, content in beside.items():
        (folder / name).write_text(json.dumps(content))
    if alpha is not None and told is not None and layout["root"]:
        expected = {m: LoRAFactors(f.a, f.b, alpha * math.sqrt(RANK)) for m, f in expected.items()}
    return path, expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts())
def test_one_lora_merges_to_the_same_bits_in_every_layout(tmp_path: Path, layout: dict[str, Any]) -> None:
    path, expected = write(tmp_path, layout)
    assert_merges_alike(path, expected)


@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_every_module_of_the_published_transformer_is_found_under_all_its_names(names):
    shapes = parameter_shapes(build("transformer", PRODUCTION_CONFIGS["transformer"]))
    find = ModuleNames(shapes)
    for target in shapes:
        name = spelled(target, names)
        assert find(f"diffusion_model.{name}") == find(f"lora_unet_{name.replace('.', '_')}") == target


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.audio_embeddings_connector.x.lora_A.weight",
        "transformer.text_embedding_projection.video_aggregate_embed.lora_B.weight",
        "connectors.video_connector.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te1_layers_0_q.lora_down.weight",
        "text_encoder.model.layers.0.q_proj.lora_A.weight",
        "text_encoders.gemma3.layers.0.strange_part",
    ],
)  # fmt: skip
def test_keys_of_connectors_and_text_encoders_are_left_out_and_counted(tmp_path, caplog, key):
    path = one_module(tmp_path / "lora.safetensors", {})
    with_foreign = {key: torch.ones(4, 3), **_tensors(path)}
    save_file(with_foreign, path)
    assert set(load_lora(path)) == {"transformer_blocks.0.attn1.to_k"}
    assert "1 keys of the text connectors or a text encoder are left out" in caplog.text


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["x.oft_blocks"], r"got x\.oft_blocks"),
        (["x.lora_mid.weight"], r"got x\.lora_mid\.weight"),
        (["x.hada_t1"], r"got x\.hada_t1"),
        (["x.lokr_t2"], r"got x\.lokr_t2 \(core of a convolution's Tucker form"),
        (["x.lora_A.weight.absmax"], r"got x\.lora_A\.weight\.absmax \(of a quantised factor"),
        (["x.lora_E"], r"got x\.lora_E \(AdaLoRA\)"),
        (["vae.decoder.conv_in.weight"], r"got vae\.decoder"),
        (["transformer.transformer_blocks.0.attn1.to_k.lora.down.weight"], "1 parts are there twice: .*lora"),
        (["proj_in.lora_A.one.weight", "proj_out.lora_A.two.weight"], "expected one adapter, got 2: one, two"),
        (["lora_unet_transformer_blocks_0_attn7_to_q.lora_down.weight"], "1 names that stand for no module of it"),
        (["lora_unet_double_blocks_0.lora_down.weight"], "1 names that stand for no module of it"),
        (["transformer.transformer_blocks.0.attn2.qkv.lokr_w1"], "attn2.qkv"),
        (["text_encoder.x.lora_A.weight"], None),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_key(tmp_path, keys, message):
    path = one_module(tmp_path / "lora.safetensors", {})
    tensors = {} if message is None else _tensors(path)
    save_file(tensors | {key: torch.ones(4, 64) for key in keys}, path)
    with pytest.raises(
        CheckpointError, match=message or r"changes nothing of the transformer, all 1 keys .*: text_encoder\.x\.lora_A"
    ):
        load_lora(path, transformer=SHAPES)


def test_a_name_of_two_modules_is_refused():
    find = ModuleNames({"a.b_c": (2, 2), "a_b.c": (2, 2), "a.d": (2, 2)})
    assert find("lora_unet_a_b_c") is None
    assert find("lora_unet_a_d") == "a.d"


@pytest.mark.parametrize(
    "key", ["to_k.weight", "lora_A.weight", "x.lora_C.weight", "x.lora_A.bias", "x.scale_shift_table"]
)
def test_keys_that_are_no_part_of_a_lora(key):
    assert read_key(key) is None
