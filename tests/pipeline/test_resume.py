"""A run that ended anywhere goes on in its work folder to the bits of one that did not, whatever sampler and inputs it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.parallel.by_branch import CFGParallel
from ltxkern.pipeline.sampling.guidance import GuidanceScales
from ltxkern.pipeline.work.folder import WorkFolder, WorkFolderError
from tests.pipeline.demo_runs import SMALL, make, same


class CutError(Exception):
    """Stands for whatever ends a process."""


class Cut:
    """Ends a run after some steps of a stage; remembers the steps that were told."""

    def __init__(self, stage: str = "", step: int = 0) -> None:
        self.at, self.told = (stage, step), list[tuple[str, int]]()

    def __call__(self, stage: str, done: int, *_: Any) -> None:
        self.told.append((stage, done))
        if (stage, done) == self.at:
            raise CutError


def run(pipe: HQTwoStagePipeline, cut: Cut | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    found = pipe(**{"prompt": "a kite", **SMALL, "output_type": "latents", "callback": cut, **changes})
    return found.latents


def skipping(pipe: HQTwoStagePipeline) -> dict[str, Any]:
    scales = GuidanceScales(cfg=3.0, skip_step=1)
    return {"video_guidance": scales, "audio_guidance": scales, "steps": 5}


def given(pipe: HQTwoStagePipeline) -> dict[str, Any]:
    from ltxkern.pipeline.run.request import GenerationRequest

    draw = torch.Generator().manual_seed(5)
    stages = GenerationRequest("a", **SMALL).stages(pipe.geometry)
    noise = [torch.randn(1, part.tokens, width, generator=draw) for stage in stages for part, width in parts(stage)]
    contexts = [torch.randn(1, 7, width, generator=draw) for width in (64, 32)]
    return {"initial_noise": noise, "embeddings": contexts, "negative_embeddings": [-one for one in contexts]}


def parts(stage: Any) -> list[tuple[Any, int]]:
    return [(stage.video, 16), (stage.audio, 32)]


@pytest.mark.parametrize(
    ("preset", "changes", "at"),
    [
        ("hq", {}, ("stage 1", 1)),
        ("hq", {}, ("stage 2", 2)),
        ("hq", {"images": True}, ("stage 1", 2)),
        ("hq", {"images": True}, ("stage 2", 1)),
        ("hq", {"prompt": ["a kite", "a boat"], "seed": [3, 4]}, ("stage 2", 1)),
        ("hq", given, ("stage 1", 1)),
        ("two-stage", skipping, ("stage 1", 2)),
        ("distilled", {"steps": None}, ("stage 1", 3)),
        ("distilled", {"steps": None}, ("stage 2", 1)),
    ],
)
def test_the_bits_of_a_whole_run(preset: str, changes: Any, at: tuple[str, int], tmp_path: Path) -> None:
    with make(preset) as pipe:
        changes = dict(changes(pipe) if callable(changes) else changes)
        if changes.pop("images", False):
            pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
            for name in ("a.png", "b.png"):
                Image.fromarray(pixels).save(tmp_path / name)
            changes["images"] = [f"{tmp_path}/a.png", f"{tmp_path}/b.png:8:0.5"]
        whole = run(pipe, **changes)
        work = tmp_path / "work"
        with pytest.raises(CutError):
            run(pipe, Cut(*at), work_dir=work, **changes)
    with make(preset) as again:
        cut = Cut()
        assert same(whole, run(again, cut, work_dir=work, **changes))
        assert cut.told[0] == (at[0], at[1] + 1)
        # Everything is there: nothing is computed, and no other result comes of it.
        assert same(whole, run(again, cut := Cut(), work_dir=work, **changes))
        assert cut.told == []


def test_the_next_run_of_a_pipeline_goes_on_too(tmp_path: Path, pipeline: HQTwoStagePipeline) -> None:
    """Weights that are in a LoRA phase are those of the run all the same; another model, or a missing record, is noticed."""
    whole = run(pipeline)
    with pytest.raises(CutError):
        run(pipeline, Cut("stage 2", 3), work_dir=tmp_path)
    (tmp_path / "stage1.safetensors").write_bytes(b"half")
    cut = Cut()
    assert same(whole, run(pipeline, cut, work_dir=tmp_path))
    assert cut.told == [("stage 1", 1), ("stage 1", 2), ("stage 1", 3), ("stage 2", 4)]
    with pytest.raises(WorkFolderError, match=r"differs in seed \(10 there, 11 here\)"):
        run(pipeline, seed=11, work_dir=tmp_path)
    with (
        make(dtype=torch.bfloat16) as other,
        pytest.raises(WorkFolderError, match=r"model .*; dtype \(torch.float32' there|dtype"),
    ):
        run(other, work_dir=tmp_path)


@pytest.mark.parametrize(("seed", "equal"), [(10, True), (11, False)])
def test_stage_2_anew(tmp_path: Path, pipeline: HQTwoStagePipeline, seed: int, equal: bool) -> None:
    """The same seed gives the same bits, the noise of stage 1 being drawn though the stage is not run."""
    whole = run(pipeline, work_dir=tmp_path)
    cut = Cut()
    with WorkFolder(tmp_path, restart="stage2") as folder:
        anew = run(pipeline, cut, seed=seed, work_dir=folder)
    assert {stage for stage, _ in cut.told} == {"stage 2"}
    assert torch.equal(anew["stage1_video"], whole["stage1_video"])
    assert same(whole, anew) is equal
    if not equal:  # what stage 2 of a run of that seed would have been, had it had this stage 1
        assert torch.equal(anew["upsampled_video"], whole["upsampled_video"])


def test_ranks_that_share_branches_keep_nothing(tmp_path: Path, pipeline: HQTwoStagePipeline) -> None:
    pipeline.denoiser_factory = CFGParallel.denoiser  # type: ignore[assignment]
    try:
        with pytest.raises(ValueError, match="work_dir is kept by a process that runs all branches: leave it out"):
            run(pipeline, work_dir=tmp_path / "w")
    finally:
        pipeline.denoiser_factory = None
    assert not (tmp_path / "w").exists()
