"""Which checkpoint a preset is for: what tells a distilled file, and the warnings where it meets the wrong preset."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.run.presets import PRESETS, tell_distilled, warn_if_unfit

PLAIN = {"model_version": "2.3.0"}
CONFIG = {"transformer": {"_class_name": "AVTransformer3DModel", "activation_fn": "gelu"}}

# What a file is called, what its header says, and whether that makes it a distilled one.
FILES: list[tuple[str, dict[str, Any], bool | None]] = [
    ("ltx-2.3-22b-distilled.safetensors", PLAIN, True),
    ("LTX-2.3-22B-Distilled-1.1_fp8.safetensors", {}, True),
    ("ltx-2.3-22b-dev.safetensors", PLAIN, False),
    ("ltx-2.3-22b-dev-distilled-merged.safetensors", PLAIN, True),
    ("model.safetensors", PLAIN, None),
    ("device.safetensors", PLAIN, None),
    ("model.safetensors", {"model_version": "2.3.0-distilled"}, True),
    ("ltx-2.3-22b-dev.safetensors", {"model_version": "2.3.0-distilled"}, True),
    ("model.safetensors", {"modelspec.title": "LTX-2.3 22B Distilled"}, True),
    ("model.safetensors", {"name": "ltx 2.3 dev"}, False),
    ("model.safetensors", {"variant": "non-distilled"}, None),
    ("model.safetensors", {"is_distilled": "true"}, True),
    ("x-distilled.safetensors", {"is_distilled": "false"}, False),
    ("model.safetensors", {"config": CONFIG | {"allowed_inference_steps": [1.0, 0.99]}}, True),
    ("model.safetensors", {"config": CONFIG | {"allowed_inference_steps": None}}, None),
    ("model.safetensors", {"config": {"transformer": {"distilled": True}}}, True),
    ("model.safetensors", {"config": CONFIG, "notes": "needs the distilled LoRA in stage 2"}, None),
]


def found(folder: Path, name: str, metadata: dict[str, Any]) -> FoundModel:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({"x": torch.zeros(1)}, folder / name, metadata=texts)
    return FoundModel.of(folder / name)


@pytest.mark.parametrize(("name", "metadata", "expected"), FILES)
def test_what_tells_a_distilled_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, metadata: dict[str, Any], expected: bool | None
) -> None:
    model = found(tmp_path, name, metadata)
    distilled, where = tell_distilled(model)
    assert distilled is expected
    for preset in PRESETS.values():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_if_unfit(preset, model, preset.distilled_strengths)
        assert bool(caplog.messages) == (bool(expected) != preset.for_distilled)
        assert all(where in text and preset.name in text and name in text for text in caplog.messages)


def test_the_merged_lora_makes_a_checkpoint_a_distilled_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = found(tmp_path, "ltx-2.3-22b-dev.safetensors", PLAIN)
    warn_if_unfit(PRESETS["distilled"], model, (1.0, 1.0))
    warn_if_unfit(PRESETS["distilled"], FoundModel.of("demo-random"), (0.0, 0.0))
    assert not caplog.messages
    distilled = found(tmp_path, "ltx-2.3-22b-distilled.safetensors", PLAIN)
    mixed = FoundModel.of(model.name, transformer=distilled.name)  # the transformer decides, wherever the rest lies
    assert tell_distilled(mixed)[0] is True
    assert tell_distilled(FoundModel.of(distilled.name, transformer=model.name))[0] is False
    hub = FoundModel.of("owner/LTX-2.3-distilled-diffusers")
    assert tell_distilled(hub) == (True, "its name is LTX-2.3-distilled-diffusers")
