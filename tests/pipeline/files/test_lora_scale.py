"""Where alpha and rank of a LoRA are told, and places that disagree about them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.files.lora_file import load_lora
from tests.pipeline.files.one_module import one_module


@pytest.mark.parametrize(
    ("metadata", "alpha", "beside", "scale"),
    [
        ({}, None, None, 1.0),
        ({"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}, 8.0, None, 2.0),
        ({"ss_network_alpha": "0"}, 4.0, None, 1.0),
        ({"ss_network_alpha": "8.0"}, 8.0, {"lora_alpha": 8, "r": 4}, 2.0),
        ({"text_encoder.lora_alpha": "64", "transformer.lora_alpha": "8"}, None, None, 2.0),
        ({"lora_adapter_metadata": '{"text_encoder.r": 2, "text_encoder.lora_alpha": 64}'}, None, None, 1.0),
        ({"steps": "100", "config": '{"optimizer": {"alpha": 3, "rank": 7}}'}, None, None, 1.0),
        ({"use_rslora": "true"}, 8.0, None, 4.0),
        ({"use_rslora": "true", "lora_alpha": "8"}, 16.0, None, 4.0),
        ({"lora_alpha": "64", "alpha_pattern.attn1.to_k": "8", "alpha_pattern.attn2.to_k": "2"}, None, None, 2.0),
        ({"m": '{"lora_alpha": 64, "alpha_pattern": {"^transformer_blocks.0.attn1": 1, "to_[kv]": 8}}'}, None, None, 2.0),
        ({"r": "4"}, None, {"r": 4, "lora_alpha": 12}, 3.0),
        # Converted from a file of kohya's trainers, which name their module: the alpha is in the factors already.
        ({"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "16"}, None, None, 1.0),
        ({"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "16"}, 16.0, None, 4.0),
        ({"config": '{"network": {"type": "lora", "linear": 4, "linear_alpha": 16}}'}, None, None, 1.0),
        ({"config": '{"network": {"linear": 4, "linear_alpha": 16}}'}, None, None, 4.0),
        ({"ss_network_dim": "4", "ss_network_alpha": "16"}, None, None, 4.0),
        ({"ss_network_dim": "4", "ss_network_alpha": "16"}, 16.0, None, 4.0),
        ({"ss_network_dim": "4", "ss_network_alpha": "8", "ss_network_args": '["rs_lora=True"]'}, 16.0, None, 4.0),
        ({"ss_network_dim": "4", "ss_network_alpha": "8", "ss_network_args": '{"rs_lora": "True"}'}, 8.0, None, 4.0),
        ({"lora_alpha": " .5e1", "r": "4.0"}, None, None, 1.25),
        ({"hyper": '{"params": {"rank": 4, "alpha": 8}}'}, None, None, 2.0),
        ({"m": '{"loraRank": 4, "lora-alpha": 8}'}, None, None, 2.0),
        ({"lora_alpha": '{"attn1.to_k": 8}', "r": "4"}, None, None, 2.0),
        ({"m": '{"r": 4, "lora_alpha": 64, "alpha_pattern": {"transformer_blocks_0_attn1_to_k": 8}}'}, None, None, 2.0),
        ({"ss_network_module": "networks.lora", "ss_network_alpha": "Dynamic"}, None, None, 1.0),
        ({}, None, {"r": 4, "lora_alpha": 8, "peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False,
                    "init_lora_weights": "gaussian", "modules_to_save": None, "layer_replication": None, "fan_in_fan_out": True,
                    "use_qalora": False, "target_parameters": [], "use_rslora": False, "loftq_config": {}, "inference_mode": True,
                    "rank_pattern": {}, "alpha_pattern": {}, "arrow_config": None, "eva_config": None}, 2.0),
    ],
)  # fmt: skip
def test_where_alpha_is_told(tmp_path, metadata, alpha, beside, scale):
    if beside is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    lora = LoRA.from_file(one_module(tmp_path / "lora.safetensors", metadata, alpha))
    assert lora.factors["transformer_blocks.0.attn1.to_k"].scale(1.0) == scale


@pytest.mark.parametrize(
    ("metadata", "alpha", "beside", "message"),
    [
        ({"lora_alpha": "16"}, 8.0, None, r"alpha 8 by its alpha tensor, and alpha 16 by its header"),
        ({"lora_alpha": "16"}, None, {"lora_alpha": 4}, r"alpha 16 by its header, and alpha 4 by adapter_config\.json"),
        ({"lora_alpha": "16", "ss_network_alpha": "8"}, None, None, "itself about the alpha: lora_alpha 16 and network_alpha 8"),
        ({"lora_alpha": "sixteen"}, None, None, "says lora_alpha 'sixteen': expected a number"),
        ({"lora_alpha": "[8]"}, None, None, r"says lora_alpha \[8\]: expected a number"),
        ({"use_rslora": "true", "lora_alpha": "8"}, None, {"lora_alpha": 8, "use_rslora": False},
         r"by alpha / sqrt\(rank\) by its header, and by alpha / rank by adapter_config\.json"),
        ({"use_rslora": "false", "lora_alpha": "8"}, None, {"lora_alpha": 8, "use_rslora": True},
         r"by alpha / sqrt\(rank\) by adapter_config\.json beside it, and by alpha / rank by its header"),
        ({"a": '{"lora_alpha": 16}', "b": '{"lora_alpha": 8}'}, None, None, r"16 by its header \(.\), and alpha 8 by its header"),
        ({"r": "8"}, None, None, r"rank 4 by the shapes of its factors, and rank 8 by its header"),
        ({"m": '{"r": 4, "rank_pattern": {"to_k": 16}}'}, None, {}, r"rank 4 by .*, and rank 16 by its header \(m\)"),
        ({}, None, {"lora_alpha": 8, "init_lora_weights": "pissa_niter_16"}, "base weights that its training changed"),
        *(
            ({}, None, {"peft_type": "LORA", "r": 4, "lora_alpha": 4, name: value}, message)
            for name, value, message in [
                ("init_lora_weights", "OLoRA", "base weights that its training changed"),
                ("init_lora_weights", "something_new", "says init_lora_weights something_new"),
                ("use_dora", True, r"1 modules without weight decomposition .* adapter_config\.json beside it says .*attn1\.to_k"),
                ("lora_bias", True, r"1 modules without a bias \(lora_B\.bias\), which adapter_config\.json"),
                ("layer_replication", [[0, 2], [1, 3]], "says layer_replication .*copies of the transformer's"),
                ("modules_to_save", ["proj_out"], r"says modules_to_save \['proj_out'\]: whole modules"),
                ("target_parameters", ["x.weight"], "says target_parameters"),
                ("trainable_token_indices", [1], "says trainable_token_indices"),
                ("arrow_config", {"top_k": 3}, "says arrow_config"),
                ("alora_invocation_tokens", [1, 2], "says alora_invocation_tokens"),
                ("use_qalora", True, "says use_qalora True: its factors act on groups"),
                ("use_something_new", True, "says use_something_new True, of which it is not known"),
                ("bias", "all", "says bias all: biases of the transformer"),
                ("peft_type", "PeftType.ADALORA", "says peft_type PeftType.ADALORA: expected one of LORA"),
                ("lora_alpha", float("nan"), "says lora_alpha nan"),
                ("r", "inf", "says r inf"),
            ]
        ),
        ({"ss_network_args": '{"dora_wd": "True"}'}, None, None, "without weight decomposition .* its header .network_args"),
        ({"lora_adapter_metadata": '{"transformer.use_dora": true}'}, None, None, "without weight decomposition .* its header"),
        ({"m": "[" * 900 + "]" * 900}, 0.0, None, "the alpha of .*to_k is 0, which some tools read as no change"),
    ],
)  # fmt: skip
def test_places_that_disagree_are_refused_with_both_values(tmp_path, metadata, alpha, beside, message):
    if beside is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    path = one_module(tmp_path / "lora.safetensors", metadata, alpha)
    with pytest.raises(CheckpointError, match=message) as error:
        load_lora(path)
    assert str(path) in str(error.value)


MUSUBI = {"network_module": "networks.lora_ltx2", "network_dim": 4, "network_alpha": 8, "network_args": ["conv_dim=2"]}
TRAINER = {"model": {"rank": 7}, "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}, "optimization": {"alpha": 3}}
TOOLKIT = {
    "config": {"process": [{"network": {"type": "lora", "linear": 4, "linear_alpha": 8}, "ema_config": {"alpha": 1}}]}
}
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
TRANSFORMER = {"_class_name": "LTX2VideoTransformer3DModel", "dim": 4, "alpha": 8, "rank": 4, "num_layers": 48}


@pytest.mark.parametrize(
    ("name", "content", "scale", "warning"),
    [
        ("mine.json", PEFT, 2.0, ""),
        ("mine_000000500.yaml", TRAINER, 2.0, ""),
        ("mine.toml", MUSUBI, 2.0, ""),
        ("mine.yml", {"rank": 4, "alpha": 8}, 2.0, ""),
        ("lora_config.json", {"rank": 4, "alpha": 8}, 2.0, ""),
        ("config.json", PEFT, 2.0, ""),
        ("config.yaml", TRAINER, 2.0, ""),
        ("training_config.yaml", TRAINER, 2.0, ""),
        ("config.toml", MUSUBI, 2.0, ""),
        ("config.yaml", TOOLKIT, 2.0, ""),
        ("config.json", TRANSFORMER, 1.0, ""),
        ("config.json", {"network": {"dim": 64, "alpha": 8}}, 1.0, ""),
        ("config.json", {"lora_alpha": 8}, 1.0, "has an alpha and no rank"),
        ("config.json", "{", 1.0, "config.json beside it is no readable configuration"),
        ("config.yaml", "a: *nowhere", 1.0, "config.yaml beside it is no readable configuration"),
        ("config.toml", "a", 1.0, "config.toml beside it is no readable configuration"),
        ("config.yaml", "lora: {rank: 4, alpha: 8}\na: !!python/tuple [1]\nb: !!python/object/apply:os.abort []", 2.0, ""),
        ("config.yaml", "lora: {rank: 4, alpha: 8}\na: !foreign 1", 1.0, "no readable configuration"),
        ("../training_config.yaml", TRAINER, 2.0, ""),
        ("config.yaml", "a: &a {lora: {rank: 4, alpha: 8}, b: *a}", 2.0, ""),
        ("other.json", PEFT, 1.0, ""),
        ("adapter_config.json", PEFT, 2.0, ""),
        ("config.json", PEFT | {"r": 8}, "rank 4 by the shapes of its factors, and rank 8 by config.json", ""),
        ("config.json", PEFT | {"use_dora": True}, "1 modules without weight decomposition", ""),
        ("mine.yaml", "a: *nowhere", "mine.yaml beside it is no readable configuration", ""),
        ("mine.json", "[" * 100_000, "mine.json beside it is no readable configuration", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "others", [[], ["mine_000000250.safetensors"], ["another.safetensors"], ["adapter_model.safetensors"]]
)
def test_configurations_beside_the_file(tmp_path, caplog, name, content, scale, warning, others):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    path = one_module(folder / "mine_000000500.safetensors", {})
    # Files of kohya's names: of those, and of no others, the alphas of its trainers count.
    save_file(
        {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in load_file(path).items()}, path
    )
    for other in others:
        save_file({"x": torch.zeros(1)}, folder / other)
    writers = {".json": json.dumps, ".toml": _toml}
    written = content if isinstance(content, str) else writers.get(Path(name).suffix, yaml.safe_dump)(content)
    (folder / name).write_text(written)
    own = ("mine", "other") if "adapter_model.safetensors" in others else ("mine", "other", "adapter_config")
    another = [other for other in others if not other.startswith("mine")]
    is_others = bool(another) and not name.startswith(own)
    if isinstance(scale, str) and not is_others:
        with pytest.raises(CheckpointError, match=scale):
            LoRA.from_file(path)
        return
    tells = (scale != 1.0 or "rank 4" in written) and is_others
    with caplog.at_level(logging.WARNING):
        found = LoRA.from_file(path).factors["transformer_blocks.0.attn1.to_k"].scale(1.0)
    assert found == (1.0 if is_others else scale)
    assert (f"{Path(name).name} beside it" in caplog.text) == bool(warning or tells)
    assert warning in caplog.text
    if tells:
        assert f"for {another[0]} lies there too; if it is meant, name it mine_000000500." in caplog.text


def _toml(content: dict[str, Any]) -> str:
    tomllib = pytest.importorskip("tomllib")
    written = "".join(f"{key} = {json.dumps(value)}\n" for key, value in content.items())
    assert tomllib.loads(written) == content
    return written


FOREIGN = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["nan", "pissa", "LORA", "4", "x=4", "{}"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["rank", "alpha", "dim", "r", "linear", "model", "vae", "bias", "use_cache", "x.y"]), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=FOREIGN, suffix=st.sampled_from(["json", "yaml"]))
def test_a_configuration_that_names_no_lora_changes_nothing(tmp_path: Path, content: Any, suffix: str) -> None:
    for old in tmp_path.glob("config.*"):
        old.unlink()
    path = one_module(tmp_path / "mine.safetensors", {})
    (tmp_path / f"config.{suffix}").write_text((json.dumps if suffix == "json" else yaml.safe_dump)(content))
    assert load_lora(path)["transformer_blocks.0.attn1.to_k"][2] is None
