"""How strongly a LoRA is merged: alpha and rank from tensors, header and a file beside; places that disagree."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.files.lora_file import load_lora


def one_module(path: Path, metadata: dict[str, str], alpha: float | None = None, **more: torch.Tensor) -> Path:
    module = "transformer.transformer_blocks.0.attn1.to_k"
    tensors = {f"{module}.lora_A.weight": torch.randn(4, 64), f"{module}.lora_B.weight": torch.randn(64, 4)}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors | {f"{module}.{part}": tensor for part, tensor in more.items()}, path, metadata)
    return path


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
        ({"a": '{"lora_alpha": 16}', "b": '{"lora_alpha": 8}'}, None, None, r"16 by its header \(.\), and alpha 8 by its header"),
        ({"r": "8"}, None, None, r"rank 4 by the shapes of its factors, and rank 8 by its header"),
        ({"m": '{"r": 4, "rank_pattern": {"to_k": 16}}'}, None, {}, r"rank 4 by .*, and rank 16 by its header \(m\)"),
        ({}, None, {"lora_alpha": 8, "init_lora_weights": "pissa_niter_16"}, "base weights that its training changed"),
    ],
)  # fmt: skip
def test_places_that_disagree_are_refused_with_both_values(tmp_path, metadata, alpha, beside, message):
    if beside is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    path = one_module(tmp_path / "lora.safetensors", metadata, alpha)
    with pytest.raises(CheckpointError, match=message) as error:
        load_lora(path)
    assert str(path) in str(error.value)
