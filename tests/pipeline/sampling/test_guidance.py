"""Guidance policies: which branches run, how they combine, skipped steps, and what is refused."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.pipeline.sampling.guidance import (
    COND,
    HQ_GUIDANCE,
    MODALITY,
    NEG,
    PERTURBED,
    TWO_STAGE_GUIDANCE,
    CFGBranch,
    CFGPolicy,
    GuidanceRequest,
    GuidanceScales,
    GuidedDenoiser,
    MultiModalPolicy,
    PlainCFGPolicy,
    SingleBranchPolicy,
)
from ltxkern.pipeline.sampling.res2s import res2s_sample
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS, ltx2_sigmas
from tests.pipeline.run.test_branches import Mean

POSITIVE = {"video_context": "vp", "audio_context": "ap"}
NEGATIVE = {"video_context": "vn", "audio_context": "an"}
LATENTS = {"video": torch.zeros(1, 6, 4), "audio": torch.zeros(1, 3, 4)}


def names(policy: CFGPolicy) -> list[str]:
    return [branch.name for branch in policy.branches]


def build(video: GuidanceScales | None, audio: GuidanceScales | None) -> MultiModalPolicy:
    return MultiModalPolicy.build(GuidanceRequest(video, audio), POSITIVE, NEGATIVE)


class Recorder:
    """A forward whose prediction depends on the branch, recording the branches it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []

    def __call__(self, latents: Mapping[str, Tensor], sigma: float, branch: CFGBranch) -> dict[str, Tensor]:
        self.calls.append((branch.name, sigma))
        factor = {COND: 0.5, NEG: 0.3, PERTURBED: 0.4, MODALITY: 0.45}[branch.name]
        return {name: factor * torch.tanh(latent) + 0.1 * sigma for name, latent in latents.items()}


def test_hq_runs_three_branches() -> None:
    policy = MultiModalPolicy.build(HQ_GUIDANCE, POSITIVE, NEGATIVE)
    assert names(policy) == [COND, NEG, MODALITY]
    cond, neg, modality = policy.branches
    assert dict(cond.kwargs) == POSITIVE
    assert cond.is_conditional
    assert dict(neg.kwargs) == NEGATIVE
    assert not neg.is_conditional
    assert dict(modality.kwargs) == {**POSITIVE, "disable_a2v_cross_attn": True, "disable_v2a_cross_attn": True}


def test_two_stage_runs_four_branches() -> None:
    policy = MultiModalPolicy.build(TWO_STAGE_GUIDANCE, POSITIVE, NEGATIVE)
    assert names(policy) == [COND, NEG, PERTURBED, MODALITY]
    assert dict(policy.branches[2].kwargs) == {
        **POSITIVE,
        "skip_video_self_attn_blocks": (28,),
        "skip_audio_self_attn_blocks": (28,),
    }


def test_perturbed_branch_names_only_the_modality_that_wants_it() -> None:
    policy = build(GuidanceScales(stg=1.0, stg_blocks=(3, 5)), GuidanceScales())
    assert names(policy) == [COND, PERTURBED]
    assert dict(policy.branches[1].kwargs) == {**POSITIVE, "skip_video_self_attn_blocks": (3, 5)}


@pytest.mark.parametrize(
    ("video", "audio", "expected"),
    [
        (GuidanceScales(), GuidanceScales(), [COND]),
        (GuidanceScales(cfg=2.0), GuidanceScales(), [COND, NEG]),
        (GuidanceScales(), GuidanceScales(cfg=2.0), [COND, NEG]),
        (GuidanceScales(cfg=0.0), None, [COND, NEG]),
        (GuidanceScales(), GuidanceScales(modality=2.0), [COND, MODALITY]),
        (GuidanceScales(modality=2.0), None, [COND]),
        (None, GuidanceScales(cfg=2.0, modality=2.0), [COND, NEG]),
        (GuidanceScales(rescale=0.7), GuidanceScales(), [COND]),
    ],
)
def test_a_branch_runs_only_where_its_scale_matters(
    video: GuidanceScales | None, audio: GuidanceScales | None, expected: list[str]
) -> None:
    assert names(build(video, audio)) == expected


def test_negative_is_needed_only_by_its_branch() -> None:
    assert names(MultiModalPolicy.build(GuidanceRequest(), POSITIVE)) == [COND]
    with pytest.raises(ValueError, match=r"negative is needed for video cfg 3.0, audio cfg 7.0: give it, or use cfg 1"):
        MultiModalPolicy.build(HQ_GUIDANCE, POSITIVE)


def test_negative_falls_back_to_the_positive_of_what_it_lacks() -> None:
    policy = MultiModalPolicy.build(HQ_GUIDANCE, POSITIVE, {"video_context": "vn"})
    assert dict(policy.branches[1].kwargs) == {"video_context": "vn", "audio_context": "ap"}


def test_policies_are_read_only() -> None:
    policy = MultiModalPolicy.build(HQ_GUIDANCE, POSITIVE, NEGATIVE)
    with pytest.raises(AttributeError):
        policy.branches = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        policy.branches[0].kwargs["video_context"] = "other"  # type: ignore[index]


def test_a_policy_keeps_no_hold_on_the_given_mapping() -> None:
    given: dict[str, Any] = dict(POSITIVE)
    policy = SingleBranchPolicy.build(positive=given)
    given["video_context"] = "other"
    assert policy.branches[0].kwargs["video_context"] == "vp"


def predictions(generator: torch.Generator, branches: list[str]) -> dict[str, dict[str, Tensor]]:
    return {
        branch: {name: torch.randn(latent.shape, generator=generator) for name, latent in LATENTS.items()}
        for branch in branches
    }


def test_multi_modal_combination_in_fp64() -> None:
    policy = MultiModalPolicy.build(TWO_STAGE_GUIDANCE, POSITIVE, NEGATIVE)
    given = predictions(torch.Generator().manual_seed(0), names(policy))
    combined = policy.combine(given)
    assert set(combined) == {"video", "audio"}
    for name, scales in TWO_STAGE_GUIDANCE.present.items():
        cond, neg, perturbed, modality = (given[branch][name].double() for branch in names(policy))
        pred = cond + (scales.cfg - 1) * (cond - neg) + scales.stg * (cond - perturbed)
        pred = pred + (scales.modality - 1) * (cond - modality)
        pred = pred * (scales.rescale * cond.std() / pred.std() + 1 - scales.rescale)
        torch.testing.assert_close(combined[name].double(), pred, atol=3e-6, rtol=3e-6)


def test_plain_guidance_in_fp64() -> None:
    request = GuidanceRequest(GuidanceScales(cfg=4.5, modality=3.0), GuidanceScales(cfg=1.0, stg=1.0, stg_blocks=(1,)))
    policy = PlainCFGPolicy.build(request, POSITIVE, NEGATIVE)
    assert names(policy) == [COND, NEG]
    given = predictions(torch.Generator().manual_seed(1), names(policy))
    combined = policy.combine(given)
    video, neg = given[COND]["video"].double(), given[NEG]["video"].double()
    torch.testing.assert_close(combined["video"].double(), neg + 4.5 * (video - neg), atol=3e-6, rtol=3e-6)
    assert torch.equal(combined["audio"], given[COND]["audio"])


def test_plain_guidance_without_scale_is_one_branch() -> None:
    assert names(PlainCFGPolicy.build(GuidanceRequest(), POSITIVE)) == [COND]


def test_single_branch_hands_its_prediction_through() -> None:
    denoiser = GuidedDenoiser(SingleBranchPolicy.build(None, POSITIVE), Recorder())
    out = denoiser(LATENTS, 0.5, step=0, substep=False)
    torch.testing.assert_close(out["video"], torch.full((1, 6, 4), 0.05))
    assert (denoiser.evaluations, denoiser.forwards) == (1, 1)


def test_branches_run_in_order_with_one_state() -> None:
    forward = Recorder()
    policy = MultiModalPolicy.build(TWO_STAGE_GUIDANCE, POSITIVE, NEGATIVE)
    GuidedDenoiser(policy, forward)(LATENTS, 0.75, step=3, substep=True)
    assert forward.calls == [(name, 0.75) for name in (COND, NEG, PERTURBED, MODALITY)]


def test_hq_counts_over_both_stages() -> None:
    """31 evaluations of three forwards, then 7 of one."""
    forward = Recorder()
    stage1 = GuidedDenoiser(MultiModalPolicy.build(HQ_GUIDANCE, POSITIVE, NEGATIVE), forward)
    latents = {name: torch.ones_like(latent) for name, latent in LATENTS.items()}
    latents = res2s_sample(stage1, latents, ltx2_sigmas(15, 8160))
    stage2 = GuidedDenoiser(SingleBranchPolicy.build(HQ_GUIDANCE, POSITIVE), forward)
    res2s_sample(stage2, latents, STAGE_2_SIGMAS)
    assert (stage1.evaluations, stage1.forwards) == (31, 93)
    assert (stage2.evaluations, stage2.forwards) == (7, 7)
    assert len(forward.calls) == 100


def skipping(video: int, audio: int) -> tuple[GuidedDenoiser, Recorder]:
    forward = Recorder()
    policy = build(GuidanceScales(cfg=2.0, skip_step=video), GuidanceScales(cfg=2.0, skip_step=audio))
    return GuidedDenoiser(policy, forward), forward


def test_skipped_steps_run_no_forward() -> None:
    denoiser, forward = skipping(2, 2)
    results = [denoiser(LATENTS, 1.0 - 0.1 * step, step=step, substep=False) for step in range(7)]
    assert [sigma for name, sigma in forward.calls if name == COND] == pytest.approx([1.0, 0.7, 0.4])
    assert (denoiser.evaluations, denoiser.forwards) == (7, 6)
    for step in (1, 2):
        assert torch.equal(results[step]["video"], results[0]["video"])
    assert not torch.equal(results[3]["video"], results[0]["video"])


def test_midpoints_never_skip_and_are_what_the_next_step_reuses() -> None:
    denoiser, forward = skipping(1, 1)
    denoiser(LATENTS, 1.0, step=0, substep=False)
    denoiser(LATENTS, 0.9, step=0, substep=True)
    reused = denoiser(LATENTS, 0.8, step=1, substep=False)
    middle = denoiser(LATENTS, 0.7, step=1, substep=True)
    assert [sigma for name, sigma in forward.calls if name == COND] == [1.0, 0.9, 0.7]
    assert float(reused["video"][0, 0, 0]) == pytest.approx(0.09)
    assert float(middle["video"][0, 0, 0]) == pytest.approx(0.07)


def test_one_skipping_modality_keeps_its_prediction() -> None:
    denoiser, forward = skipping(1, 0)
    first = denoiser(LATENTS, 1.0, step=0, substep=False)
    second = denoiser(LATENTS, 0.5, step=1, substep=False)
    assert len(forward.calls) == 4
    assert torch.equal(second["video"], first["video"])
    assert float(second["audio"][0, 0, 0]) == pytest.approx(0.05)


def test_a_run_of_one_modality_skips_on_its_own_scales() -> None:
    denoiser, forward = skipping(1, 0)
    latents = {"video": LATENTS["video"]}
    for step in range(4):
        denoiser(latents, 1.0, step=step, substep=False)
    assert len(forward.calls) == 4


def test_a_skip_without_an_earlier_prediction_evaluates() -> None:
    denoiser, forward = skipping(3, 3)
    denoiser(LATENTS, 0.5, step=1, substep=False)
    assert len(forward.calls) == 2


def test_changing_a_result_does_not_change_what_is_reused() -> None:
    denoiser, _ = skipping(1, 1)
    first = denoiser(LATENTS, 1.0, step=0, substep=False)
    first.clear()
    assert set(denoiser(LATENTS, 0.5, step=1, substep=False)) == {"video", "audio"}


def test_a_runner_takes_the_place_of_the_serial_one() -> None:
    def backwards(branches: Any, forward: Any, latents: Any, sigma: float) -> dict[str, Any]:
        return {branch.name: forward(latents, sigma, branch) for branch in reversed(branches)}

    policy = MultiModalPolicy.build(HQ_GUIDANCE, POSITIVE, NEGATIVE)
    latents = {name: torch.arange(latent.numel()).reshape(latent.shape) / 10 for name, latent in LATENTS.items()}
    forward = Recorder()
    ours = GuidedDenoiser(policy, forward, runner=backwards)(latents, 0.5, step=0, substep=False)
    assert [name for name, _ in forward.calls] == [MODALITY, NEG, COND]
    serial = GuidedDenoiser(policy, Recorder())(latents, 0.5, step=0, substep=False)
    assert all(torch.equal(ours[name], serial[name]) for name in serial)


def test_a_policy_of_ones_own() -> None:
    denoiser = GuidedDenoiser(Mean.build(None, POSITIVE, NEGATIVE), Recorder())
    out = denoiser({"video": torch.ones(1, 2, 2)}, 0.0, step=0, substep=False)
    torch.testing.assert_close(out["video"], 0.4 * torch.tanh(torch.ones(1, 2, 2)))


@pytest.mark.parametrize("name", ["cfg", "stg", "modality", "rescale"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (math.nan, ValueError, "must be finite, got nan"),
        (math.inf, ValueError, "must be finite, got inf"),
        (-1.0, ValueError, "must be at least 0, got -1.0: use 0"),
        ("3", TypeError, "must be a number, got str"),
        (True, TypeError, "must be a number, got bool"),
    ],
)
def test_scales_that_are_none(name: str, value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"guidance {name} {words}"):
        GuidanceScales(**{name: value})


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"skip_step": -1}, ValueError, "skip_step must be at least 0, got -1"),
        ({"skip_step": 1.5}, TypeError, "skip_step must hold integers, got 1.5"),
        ({"stg_blocks": (-2,)}, ValueError, r"stg_blocks must be at least 0, got \(-2,\)"),
        ({"stg": 1.0}, ValueError, "stg is 1.0 but stg_blocks is empty"),
    ],
)
def test_other_scales_that_are_none(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        GuidanceScales(**given)


def test_requests_that_are_none() -> None:
    with pytest.raises(ValueError, match="at least one modality"):
        GuidanceRequest(None, None)
    with pytest.raises(TypeError, match="video must be GuidanceScales or None, got float"):
        GuidanceRequest(video=3.0)  # type: ignore[arg-type]


def test_branches_need_distinct_names() -> None:
    twice = SingleBranchPolicy((CFGBranch(COND, True), CFGBranch(COND, True)))
    with pytest.raises(ValueError, match="distinct names"):
        GuidedDenoiser(twice, Recorder())


def test_the_combination_is_the_op() -> None:
    given = predictions(torch.Generator().manual_seed(2), [COND, NEG, MODALITY])
    combined = MultiModalPolicy.build(HQ_GUIDANCE, POSITIVE, NEGATIVE).combine(given)
    expected = ltxkern.combine_guidance(
        given[COND]["audio"],
        given[NEG]["audio"],
        isolated=given[MODALITY]["audio"],
        cfg_scale=7.0,
        modality_scale=3.0,
        rescale_scale=1.0,
    )
    assert torch.equal(combined["audio"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("request_", [HQ_GUIDANCE, TWO_STAGE_GUIDANCE, GuidanceRequest(GuidanceScales(rescale=0.7))])
def test_videos_of_a_batch_are_rescaled_apart(request_: GuidanceRequest, dtype: torch.dtype) -> None:
    policy = MultiModalPolicy.build(request_, POSITIVE, NEGATIVE)
    generator = torch.Generator().manual_seed(5)
    alone = [predictions(generator, names(policy)) for _ in range(3)]
    # Spreads far apart: one deviation over all of them would move each.
    scaled = [
        {branch: {name: (10.0**index * x).to(dtype) for name, x in given.items()} for branch, given in each.items()}
        for index, each in enumerate(alone)
    ]
    together = {
        branch: {name: torch.cat([each[branch][name] for each in scaled]) for name in LATENTS}
        for branch in names(policy)
    }
    combined = policy.combine(together)
    for index, each in enumerate(scaled):
        for name, expected in policy.combine(each).items():
            assert torch.equal(combined[name][index : index + 1], expected)
