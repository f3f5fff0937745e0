"""The text phase of a run: one context a prompt, kept on disk, the text encoder let go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.generator import HQTwoStagePipeline
from tests.official_files import write_diffusers_demo
from tests.pipeline.demo_runs import latents, same


def test_several_prompts_are_several_videos(pipeline: HQTwoStagePipeline) -> None:
    both = latents(pipeline, ["a kite", "a boat"])
    assert both["video"].shape[0] == 2
    assert not torch.allclose(both["video"][0], both["video"][1], atol=1e-3)


def test_cached_embeddings_need_no_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = build_demo()
    lora = tmp_path / "distilled.safetensors"
    save_file(demo_lora(), lora)
    folder = write_diffusers_demo(tmp_path / "folder", demo)

    def opened() -> HQTwoStagePipeline:
        return HQTwoStagePipeline.from_pretrained(
            folder, device="cpu", dtype=torch.float32, distilled_lora=lora, embedding_cache=tmp_path / "cache"
        )

    with opened() as pipe:
        first = latents(pipe)
        assert not pipe.components.is_loaded("text_encoder")
    with opened() as pipe:
        monkeypatch.setattr(pipe.prompts, "_encode_now", lambda texts: pytest.fail(f"encoded again: {texts}"))
        assert same(latents(pipe), first)
