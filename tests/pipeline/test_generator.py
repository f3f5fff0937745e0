"""The whole generator with the demo model: one call in two forms, repeatability, dtypes, presets, modes, LoRAs, files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline import generator
from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.memory.streams import HostClock
from ltxkern.pipeline.results.probe import probe_mp4
from ltxkern.pipeline.run.request import PRESETS, GenerationRequest
from ltxkern.pipeline.sampling.schedule import DISTILLED_SIGMAS, STAGE_2_SIGMAS
from tests.official_files import write_diffusers_demo, write_official_demo
from tests.pipeline.demo_runs import SMALL, count_forwards, latents, make, same


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_request_and_its_keywords_are_one_call(pipeline: HQTwoStagePipeline) -> None:
    changes = {"seed": 11, "eta": 0.25, "substep_eta": 0.125, "distilled_strengths": (0.25, 1.0)}
    request = GenerationRequest(prompt="a kite", **changes, **SMALL)
    output = pipeline.generate(request, output_type="latents")
    by_request = output.latents
    assert output.backends["attention"] == ["flash"]
    assert same(by_request, latents(pipeline, **changes))
    for name in changes:
        others = {key: value for key, value in changes.items() if key != name}
        assert not torch.equal(by_request["video"], latents(pipeline, **others)["video"]), name


def test_a_request_for_another_preset_is_refused(pipeline: HQTwoStagePipeline) -> None:
    request = GenerationRequest(prompt="a kite", preset=PRESETS["one-stage"], **SMALL)
    with pytest.raises(ValueError, match=r"preset: the request is for pipeline one-stage, .* opened as hq: use "):
        pipeline.generate(request)


def test_other_seed_and_other_prompt_give_another_result(pipeline: HQTwoStagePipeline) -> None:
    base = latents(pipeline)
    for changes in ({"seed": 11}, {"prompt": "a boat in fog"}, {"negative_prompt": "rain"}):
        assert not torch.allclose(base["video"], latents(pipeline, **changes)["video"], atol=1e-3)
        assert not torch.allclose(base["stage1_audio"], latents(pipeline, **changes)["stage1_audio"], atol=1e-3)


@pytest.mark.usefixtures("threads")
def test_thread_count_changes_rounding_only(pipeline: HQTwoStagePipeline) -> None:
    results = []
    noises = []
    for count in (1, 2):
        torch.set_num_threads(count)
        noises.append(torch.randn(1, 96, 16, generator=torch.Generator().manual_seed(10)))
        results.append(latents(pipeline))
    assert torch.equal(*noises)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-5, rtol=1e-5)


def test_bf16_runs_and_stays_near_fp32(pipeline: HQTwoStagePipeline) -> None:
    with make(dtype=torch.bfloat16) as rounded:
        got = latents(rounded)
    base = latents(pipeline)
    assert got["video"].dtype == torch.bfloat16
    error = (got["stage1_video"].float() - base["stage1_video"]).std() / base["stage1_video"].std()
    assert 0 < error < 0.5


@pytest.mark.parametrize("preset", ["two-stage", "one-stage"])
def test_other_presets(preset: str, tmp_path: Path) -> None:
    with make(preset) as pipe:
        counts = count_forwards(pipe, steps=3)
        assert counts == ({"stage 1": 3 * 4, "stage 2": 3} if preset == "two-stage" else {"stage 1": 3 * 4})
        output = pipe("a kite", **SMALL)
    assert probe_mp4(output.save(tmp_path / "out.mp4")).frames == 9


@pytest.mark.parametrize("preset", ["distilled", "one-stage-distilled"])
def test_distilled_presets(preset: str) -> None:
    """The published numbers of evaluations, one forward each, no negative prompt, and the published stage's audio."""
    with make(preset) as pipe:
        counts = count_forwards(pipe, steps=None)
        assert counts == ({"stage 1": 8, "stage 2": 3} if preset == "distilled" else {"stage 1": 8})
        base = latents(pipe, steps=None)
        assert same(base, latents(pipe, steps=8, negative_prompt="rain", substep_eta=0.0))
        assert torch.equal(base["audio"], base.get("stage2_audio", base["stage1_audio"]))
        assert not torch.equal(base["video"], latents(pipe, steps=None, eta=0.0)["video"])
        assert not torch.equal(base["stage1_video"], latents(pipe, steps=None, seed=11)["stage1_video"])


def test_the_distilled_stages_by_hand() -> None:
    """Stage 1 ancestral with noise of seed + 10000, stage 2 plain: the run equals its samplers with the noise drawn here."""
    with make("distilled") as pipe:
        first, second = GenerationRequest(prompt="a", preset=pipe.preset, **{**SMALL, "steps": None}).stages(
            pipe.geometry
        )
        assert (first.sampler, second.sampler) == ("euler-ancestral", "euler")
        assert (first.sigmas, second.sigmas) == (DISTILLED_SIGMAS, STAGE_2_SIGMAS)
        generator = torch.Generator().manual_seed(10_010)
        noise: dict[str, list[torch.Tensor]] = {"video": [], "audio": []}
        for _ in range(7):
            for name, tokens, width in (("video", first.video.tokens, 16), ("audio", first.audio.tokens, 32)):
                noise[name].append(torch.randn(1, tokens, width, generator=generator))
        replayed = latents(pipe, steps=None, sde_noise=[noise, {}])
        assert same(replayed, latents(pipe, steps=None))


@pytest.mark.parametrize("preset", PRESETS)
def test_videos_of_one_call_are_those_of_calls_one_by_one(preset: str) -> None:
    """Prompts and seeds of their own, in one call: nothing of one video reaches another, up to rounding of the GEMMs."""
    steps = None if PRESETS[preset].for_distilled else 2
    prompts = ["a kite", "a red boat in fog", "a kite"]
    with make(preset) as pipe:
        one = cache(lambda prompt, seed: latents(pipe, prompt, seed=seed, steps=steps))
        for seed in (10, [10, 11, 12]):
            together = latents(pipe, prompts, seed=seed, steps=steps)
            for index, prompt in enumerate(prompts):
                own = seed if isinstance(seed, int) else seed[index]
                for name, alone in one(prompt, own).items():
                    torch.testing.assert_close(together[name][index : index + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["resident", "snapshot", "inplace", "original"])
def test_device_modes_agree(pipeline: HQTwoStagePipeline, mode: str) -> None:
    with make(device_mode=mode) as pipe:
        # Twice: the second run starts from the phase that the first one ended in.
        assert same(latents(pipe), latents(pipeline))
        assert same(latents(pipe), latents(pipeline))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_audio_stream_reaches_the_blocks(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Opened as on a GPU, computing here: each block takes its sound there twice, before and behind the cross-attention."""
    here, beside = torch.device("cpu"), []

    class Clock(HostClock):
        def side(self) -> contextlib.AbstractContextManager[None]:
            beside.append(1)
            return super().side()

    manager, prompts = generator.TwoStageDeviceManager, generator.PromptEncoder
    monkeypatch.setattr(generator, "find_device", torch.device)
    monkeypatch.setattr(generator, "clock_for", lambda device: Clock())
    monkeypatch.setattr(generator, "TwoStageDeviceManager", lambda mode, device: manager(mode, device=here))
    monkeypatch.setattr(generator, "PromptEncoder", lambda parts, lent, _, *kept: prompts(parts, lent, here, *kept))
    with make(device="cuda", attention="torch", audio_stream=wanted) as pipe:
        pipe.device = here
        forwards = sum(count_forwards(pipe).values())
        assert len(beside) == wanted * 2 * forwards * len(pipe.components.transformer.transformer_blocks)


def test_user_lora(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    path = tmp_path / "user.safetensors"
    save_file(demo_lora(seed=5), path)
    base = latents(pipeline)
    with make(loras=[(path, 0.5)]) as pipe:
        assert not torch.allclose(latents(pipe)["video"], base["video"], atol=1e-3)
    with make(loras=[(path, 0.0)]) as pipe:
        assert same(latents(pipe), base)


def test_close_gives_pristine_weights_back() -> None:
    before = {name: tensor.clone() for name, tensor in build_demo().transformer.state_dict().items()}
    pipe = make()
    latents(pipe)
    pipe.close()
    for name, tensor in pipe.components.transformer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_missing_components_are_named() -> None:
    parts = build_demo()
    pipe = HQTwoStagePipeline.from_components(transformer=parts.transformer, upsampler=parts.upsampler)
    with pytest.raises(ValueError, match="tokenizer, text_encoder, connectors"):
        pipe("a kite", **SMALL, output_type="latents")
    with pytest.raises(ValueError, match="video_vae"):
        pipe("a kite", **SMALL, embeddings=(torch.zeros(1, 8, 64), torch.zeros(1, 8, 32)))


def test_official_and_diffusers_files_give_the_same_video(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    """The same weights through the official single file and through a diffusers folder."""
    demo = build_demo()
    base = latents(pipeline)
    lora = tmp_path / "distilled.safetensors"
    save_file(demo_lora(), lora)
    official = write_official_demo(tmp_path, demo)
    folder = write_diffusers_demo(tmp_path / "folder", demo)
    sources = [
        (official["checkpoint"], {"upsampler": official["upsampler"], "text_encoder": official["text_encoder"]}),
        (folder, {}),
    ]
    for path, parts in sources:
        opened = HQTwoStagePipeline.from_pretrained(
            path, device="cpu", dtype=torch.float32, distilled_lora=lora, **parts
        )
        with opened as pipe:
            assert pipe.geometry == pipeline.geometry
            for name, tensor in latents(pipe).items():
                torch.testing.assert_close(tensor, base[name], atol=1e-4, rtol=1e-4)


def test_a_distilled_checkpoint_needs_no_lora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    official = write_official_demo(tmp_path, build_demo())
    parts = {"upsampler": official["upsampler"], "text_encoder": official["text_encoder"]}
    named = tmp_path / "ltx-2.3-distilled.safetensors"
    official["checkpoint"].rename(named)
    with HQTwoStagePipeline.from_pretrained(
        named, device="cpu", dtype=torch.float32, preset="distilled", embedding_cache=False, **parts
    ) as pipe:
        video = latents(pipe, steps=None)["video"]
    assert not caplog.messages
    with make("distilled") as pipe:
        torch.testing.assert_close(video, latents(pipe, steps=None)["video"], atol=1e-4, rtol=1e-4)
    HQTwoStagePipeline.from_pretrained(named, device="cpu", preset="one-stage", embedding_cache=False, **parts)
    assert len(caplog.messages) == 1
    assert "use pipeline distilled or one-stage-distilled" in caplog.text


def test_a_two_stage_model_without_its_lora_is_refused(tmp_path: Path) -> None:
    official = write_official_demo(tmp_path, build_demo())
    with pytest.raises(ValueError, match="needs the distilled LoRA: give distilled_lora=PATH"):
        HQTwoStagePipeline.from_pretrained(official["checkpoint"], device="cpu")
