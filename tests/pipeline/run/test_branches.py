"""Branch specs: keyword arguments where a forward holds one branch, per-item perturbations where it holds several; same numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.model.transformer import LTX2Transformer
from ltxkern.pipeline.run.stage import BranchForward, batched_runner
from ltxkern.pipeline.sampling.guidance import (
    COND,
    NEG,
    CFGBranch,
    CFGPolicy,
    GuidanceRequest,
    GuidanceScales,
    GuidedDenoiser,
    MultiModalPolicy,
    PlainCFGPolicy,
)
from ltxkern.pipeline.sampling.latents import AudioLatentShape, LatentState, VideoLatentShape

SCALES = GuidanceScales(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,))
AUDIO_SCALES = replace(SCALES, cfg=7.0, stg_blocks=(0,))
NAMES = ["cond", "neg", "perturbed", "modality"]


@pytest.fixture(scope="module")
def transformer() -> LTX2Transformer:
    model = build_demo().transformer
    assert model is not None
    return model


def policy(batch: int) -> MultiModalPolicy:
    """Four branches with contexts of their own; STG in another block of video than of audio."""
    generator = torch.Generator().manual_seed(1)

    def contexts() -> dict[str, Tensor]:
        sizes = {"video_context": (batch, 11, 64), "audio_context": (batch, 11, 32)}
        return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}

    return MultiModalPolicy.build(GuidanceRequest(SCALES, AUDIO_SCALES), contexts(), contexts())


def forward(transformer: LTX2Transformer, batch: int, masked: bool) -> BranchForward:
    generator = torch.Generator().manual_seed(2)
    video = LatentState.create(VideoLatentShape(3, 2, 3, channels=16, batch=batch), fps=24.0, dtype=torch.float32)
    audio = LatentState.create(AudioLatentShape(7, channels=2, batch=batch), fps=24.0, dtype=torch.float32)
    if masked:
        mask = video.mask.clone()
        mask[:, :6] = 0.25
        video = replace(video, mask=mask)
    states = {"video": video.noise(1.0, generator=generator), "audio": audio.noise(1.0, generator=generator)}
    return BranchForward(transformer, states, masked)


def latents(given: BranchForward) -> dict[str, Tensor]:
    return {name: state.latent for name, state in given.states.items()}


class Calls:
    """Counts, of each transformer forward, the perturbation configs of every batch."""

    def __init__(self, transformer: LTX2Transformer) -> None:
        self.branches: list[list[int]] = []
        self._handle = transformer.register_forward_pre_hook(
            lambda _, inputs: self.branches.append([len(batch.perturbations) for batch in inputs[2]])
        )

    def close(self) -> None:
        self._handle.remove()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("size", "calls"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [3, 1]), (4, [4]), (9, [4])])
def test_batched_branches_give_the_numbers_of_single_ones(
    transformer: LTX2Transformer, size: int, calls: list[int], batch: int, masked: bool
) -> None:
    given, branches = forward(transformer, batch, masked), policy(batch).branches
    assert [branch.name for branch in branches] == NAMES
    singly = {branch.name: given(latents(given), 0.725, branch) for branch in branches}
    counted = Calls(transformer)
    together = batched_runner(size)(branches, given, latents(given), 0.725)
    counted.close()
    assert counted.branches == [calls]
    assert list(together) == NAMES
    tolerance = 0 if size == 1 else 2e-5
    for name in NAMES:
        for modality in ("video", "audio"):
            torch.testing.assert_close(together[name][modality], singly[name][modality], atol=tolerance, rtol=tolerance)


def test_every_option_matters(transformer: LTX2Transformer) -> None:
    """The numbers above agree because each item keeps its own options, not because the options do nothing."""
    given, branches = forward(transformer, 1, False), policy(1).branches
    found = {branch.name: given(latents(given), 0.725, branch) for branch in branches}
    for name in NAMES[1:]:
        for modality in ("video", "audio"):
            assert (found[name][modality] - found["cond"][modality]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "option",
    [
        {"skip_video_self_attn_blocks": (0, 1)},
        {"skip_audio_self_attn_blocks": (1,)},
        {"disable_a2v_cross_attn": True},
        {"disable_v2a_cross_attn": True},
    ],
)
def test_an_option_beside_a_full_branch(transformer: LTX2Transformer, option: dict[str, Any]) -> None:
    """Each option alone, in a call whose other item keeps everything."""
    given, full = forward(transformer, 1, False), policy(1).branches[0]
    partial = replace(full, name="partial", kwargs={**full.kwargs, **option})
    alone = given(latents(given), 0.5, partial)
    whole = given(latents(given), 0.5, full)
    first, second = given.batched(latents(given), 0.5, [partial, full])
    for modality in ("video", "audio"):
        torch.testing.assert_close(first[modality], alone[modality], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(second[modality], whole[modality], atol=2e-5, rtol=2e-5)
    assert max(float((alone[name] - whole[name]).abs().max()) for name in alone) > 1e-3


def test_the_combination_is_the_same(transformer: LTX2Transformer) -> None:
    given, built = forward(transformer, 1, False), policy(1)
    results = [
        GuidedDenoiser(built, given, runner=batched_runner(size))(latents(given), 0.725, step=0, substep=False)
        for size in (1, 4)
    ]
    for modality in ("video", "audio"):
        torch.testing.assert_close(results[0][modality], results[1][modality], atol=2e-4, rtol=2e-4)


class Mean(CFGPolicy):
    """Somebody's own scheme: the mean of the predictions for the prompt and for the negative prompt."""

    def __init__(self, branches: tuple[CFGBranch, ...]) -> None:
        self.branches = branches

    @classmethod
    def build(cls, request: Any, positive: Any, negative: Any = None) -> "Mean":
        if negative is None:
            raise ValueError("negative is needed for a mean: give it")
        return cls((CFGBranch(COND, True, positive), CFGBranch(NEG, False, negative)))

    def combine(self, predictions: Any) -> dict[str, Tensor]:
        first, second = predictions[COND], predictions[NEG]
        return {name: (first[name] + second[name]) / 2 for name in first}


def test_the_pipeline_takes_a_policy() -> None:
    """Plain guidance leaves the modality scale out; one's own policy runs its own branches, its negative prompt encoded."""
    scales = GuidanceScales(cfg=3.0, modality=3.0, rescale=0.5)
    size: dict[str, Any] = {"height": 64, "width": 128, "num_frames": 9, "steps": 2, "output_type": "latents"}
    both = {"video_guidance": scales, "audio_guidance": scales}
    alone = {name: replace(scales, modality=1.0) for name in both}
    void = {name: GuidanceScales() for name in both}
    with HQTwoStagePipeline.from_pretrained("demo-random", dtype=torch.float32, device="cpu") as pipeline:
        plain = pipeline("kite", **size, **both, guidance_policy=PlainCFGPolicy)
        expected = pipeline("kite", **size, **alone)
        mean = pipeline("kite", **size, **void, guidance_policy=Mean)
        unguided = pipeline("kite", **size, **void)
        with pytest.raises(ValueError, match="negative is needed for a mean"):
            pipeline(**size, guidance_policy=Mean, embeddings=(torch.ones(1, 4, 64), torch.ones(1, 4, 32)))
    assert all(torch.equal(plain.latents[name], expected.latents[name]) for name in expected.latents)
    assert [output.stages[0].branches for output in (plain, mean, unguided)] == [2, 2, 1]
    assert not torch.equal(mean.latents["video"], unguided.latents["video"])
