"""The whole generator with the demo model: counts, repeatability, dtypes, pictures, LoRAs, outputs and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.results.media import probe_mp4
from ltxkern.pipeline.run.request import DEFAULT_NEGATIVE_PROMPT, GenerationRequest
from ltxkern.pipeline.sampling.finite import NonFiniteError
from ltxkern.pipeline.sampling.guidance import GuidanceScales
from tests.official_files import write_diffusers_demo, write_official_demo

SMALL: dict[str, Any] = {"height": 64, "width": 128, "num_frames": 9, "steps": 2}


def make(preset: str = "hq", dtype: torch.dtype = torch.float32, **settings: Any) -> HQTwoStagePipeline:
    return HQTwoStagePipeline.from_pretrained("demo", device="cpu", dtype=dtype, preset=preset, **settings)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[HQTwoStagePipeline]:
    with make() as opened:
        yield opened


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def latents(pipe: HQTwoStagePipeline, prompt: Any = "a kite", **changes: Any) -> dict[str, torch.Tensor]:
    return pipe(prompt, **{**SMALL, "output_type": "latents", **changes}).latents


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def count_forwards(pipe: HQTwoStagePipeline, **changes: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    stage = "stage 1"

    def count(*_: Any) -> None:
        counts[stage] = counts.get(stage, 0) + 1

    def follow(name: str, *_: Any) -> None:
        nonlocal stage
        if name.startswith("stage"):
            stage = name

    handle = pipe.components.transformer.register_forward_pre_hook(count)
    try:
        latents(pipe, progress=follow, **changes)
    finally:
        handle.remove()
    return counts


def test_evaluation_counts_at_defaults(pipeline: HQTwoStagePipeline) -> None:
    assert count_forwards(pipeline, steps=None) == {"stage 1": 31 * 3, "stage 2": 7}


def test_plan_tells_the_forwards_that_run(pipeline: HQTwoStagePipeline) -> None:
    counts = count_forwards(pipeline, steps=3)
    request = GenerationRequest(prompt="a", **{**SMALL, "steps": 3})
    assert list(counts.values()) == [plan.forwards for plan in request.stages(pipeline.geometry)]


def test_void_scales_skip_their_forwards(pipeline: HQTwoStagePipeline) -> None:
    void = GuidanceScales()
    assert count_forwards(pipeline, video_guidance=void, audio_guidance=void)["stage 1"] == 5
    one = replace(void, cfg=2.0)
    assert count_forwards(pipeline, video_guidance=one, audio_guidance=void)["stage 1"] == 10
    perturbed = GuidanceScales(cfg=2.0, stg=1.0, modality=2.0, stg_blocks=(1,))
    assert count_forwards(pipeline, video_guidance=perturbed, audio_guidance=void)["stage 1"] == 20


def test_skip_step_skips_forwards(pipeline: HQTwoStagePipeline) -> None:
    skipping = GuidanceScales(cfg=2.0, skip_step=1)
    counted = count_forwards(pipeline, steps=4, video_guidance=skipping, audio_guidance=skipping)
    # Steps 1 and 3 reuse the prediction of the evaluation before; midpoints and the final evaluation (step 4) run.
    assert counted["stage 1"] == (9 - 2) * 2


def test_same_seed_same_bytes(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    files = []
    for name in ("first.mp4", "second.mp4"):
        output = pipeline("a kite", **SMALL)
        files.append((output.latents, output.save(tmp_path / name).read_bytes()))
    assert same(files[0][0], files[1][0])
    assert files[0][1] == files[1][1]


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


def test_output_shapes_and_waveform_length(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    output = pipeline("a kite", height=64, width=128, num_frames=17, steps=2, frame_rate=25.0)
    assert output.video.shape == (17, 64, 128, 3)
    assert 0 <= float(output.video.min()) <= float(output.video.max()) <= 1
    assert output.audio.shape == (2, 480 * (4 * round(25 * 17 / 25.0) - 3))
    assert output.latents["video"].shape == (1, 16, 3, 2, 4)
    info = probe_mp4(output.save(tmp_path / "out.mp4"))
    assert (info.frames, info.height, info.width, float(info.fps)) == (17, 64, 128, 25.0)
    assert (info.audio_rate, info.channels) == (48000, 2)


def test_stream_equals_video(pipeline: HQTwoStagePipeline) -> None:
    whole = pipeline("a kite", **SMALL)
    streamed = pipeline("a kite", **SMALL, output_type="stream")
    assert torch.equal(torch.cat(list(streamed.video)), whole.video)


def test_latents_and_frames_on_disk(pipeline: HQTwoStagePipeline, tmp_path: Path) -> None:
    output = pipeline("a kite", **SMALL)
    stored = load_file(output.save(tmp_path / "out.safetensors"))
    assert torch.equal(stored["video"], output.latents["video"])
    assert torch.equal(stored["audio"], output.latents["stage1_audio"])
    assert set(stored) == {"video", "audio"}
    folder = output.save(tmp_path / "frames")
    assert len(list(folder.glob("*.png"))) == 9
    assert len(list(folder.glob("*.wav"))) == 1


def test_audio_source(pipeline: HQTwoStagePipeline) -> None:
    first, second = (pipeline("a kite", **SMALL, audio_source=source) for source in ("stage1", "stage2"))
    assert torch.equal(first.latents["video"], second.latents["video"])
    assert torch.equal(first.latents["audio"], first.latents["stage1_audio"])
    assert torch.equal(second.latents["audio"], second.latents["stage2_audio"])
    assert first.audio.shape == second.audio.shape
    assert not torch.equal(first.audio, second.audio)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 150, 3), dtype=np.uint8)
    path = tmp_path / "first:frame.png"
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_at_any_frame(pipeline: HQTwoStagePipeline, picture: Path) -> None:
    base = latents(pipeline)
    seen = [latents(pipeline, images=[f"{picture}{suffix}"]) for suffix in ("", ":8", ":8:0.5", ":0:0.5")]
    for index, result in enumerate(seen):
        assert result["video"].shape == base["video"].shape
        assert not torch.allclose(result["video"], base["video"], atol=1e-3)
        for other in seen[:index]:
            assert not torch.equal(result["video"], other["video"])


def test_a_held_first_frame_is_the_picture(pipeline: HQTwoStagePipeline, picture: Path) -> None:
    from ltxkern.pipeline.model.conditioning import ImageCondition, encode_conditions

    held = latents(pipeline, images=[picture])["video"][:, :, :1]
    wanted = encode_conditions(pipeline.components.video_vae, [ImageCondition(picture)], 64, 128)[0]
    torch.testing.assert_close(held, wanted, atol=1e-5, rtol=1e-5)


def test_replay_of_noise_and_embeddings(pipeline: HQTwoStagePipeline) -> None:
    """A run given everything that it would draw or compute equals the run that drew and computed it."""
    drawn: list[torch.Tensor] = []
    plans = GenerationRequest(prompt="a kite", **SMALL).stages(pipeline.geometry)
    generator = torch.Generator().manual_seed(10)
    for plan in plans:
        for shape in ((1, plan.video.tokens, 16), (1, plan.audio.tokens, 32)):
            drawn.append(torch.randn(shape, generator=generator))
    sde = []
    for plan in plans:
        step, sub = (torch.Generator().manual_seed(seed) for seed in (-1, 9999))
        noise: dict[str, list[torch.Tensor]] = {"video": [], "audio": []}
        for _ in plan.sigmas[:-1]:
            for source in (sub, step):
                for name, tokens, width in (("video", plan.video.tokens, 16), ("audio", plan.audio.tokens, 32)):
                    raw = torch.randn(1, tokens, width, generator=source, dtype=torch.float64)
                    noise[name].append((raw - raw.mean()) / raw.std())
        sde.append(noise)
    encoded = pipeline.prompts.encode(["a kite", DEFAULT_NEGATIVE_PROMPT])
    replayed = latents(
        pipeline,
        prompt="",
        embeddings=encoded[0],
        negative_embeddings=(encoded[1].video, encoded[1].audio),
        initial_noise=drawn,
        sde_noise=sde,
    )
    for name, tensor in latents(pipeline).items():
        torch.testing.assert_close(replayed[name], tensor, atol=1e-5, rtol=1e-5)


def test_several_prompts_are_several_videos(pipeline: HQTwoStagePipeline) -> None:
    both = latents(pipeline, ["a kite", "a boat"])
    assert both["video"].shape[0] == 2
    assert not torch.allclose(both["video"][0], both["video"][1], atol=1e-3)


@pytest.mark.parametrize("preset", ["two-stage", "one-stage"])
def test_other_presets(preset: str, tmp_path: Path) -> None:
    with make(preset) as pipe:
        counts = count_forwards(pipe, steps=3)
        assert counts == ({"stage 1": 3 * 4, "stage 2": 3} if preset == "two-stage" else {"stage 1": 3 * 4})
        output = pipe("a kite", **SMALL)
    assert probe_mp4(output.save(tmp_path / "out.mp4")).frames == 9


@pytest.mark.parametrize("mode", ["resident", "snapshot", "inplace", "original"])
def test_device_modes_agree(pipeline: HQTwoStagePipeline, mode: str) -> None:
    with make(device_mode=mode) as pipe:
        # Twice: the second run starts from the phase that the first one ended in.
        assert same(latents(pipe), latents(pipeline))
        assert same(latents(pipe), latents(pipeline))


def test_max_batch_size(pipeline: HQTwoStagePipeline) -> None:
    base = latents(pipeline)
    for size in (2, 3):
        for name, tensor in latents(pipeline, max_batch_size=size).items():
            torch.testing.assert_close(tensor, base[name], atol=1e-4, rtol=1e-4)


def test_distilled_strengths_matter_and_merge_from_clean_weights(pipeline: HQTwoStagePipeline) -> None:
    base = latents(pipeline)
    stronger = latents(pipeline, distilled_strengths=(0.25, 1.0))
    assert torch.equal(stronger["stage1_video"], base["stage1_video"])
    assert not torch.allclose(stronger["video"], base["video"], atol=1e-3)
    assert same(latents(pipeline), base)


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


def test_non_finite_weights_name_the_stage() -> None:
    components = build_demo()
    with torch.no_grad():
        components.upsampler.final_conv.weight.fill_(float("nan"))
    pipe = HQTwoStagePipeline(components)
    with pytest.raises(NonFiniteError, match="upsampling"):
        latents(pipe)


REFUSED = [
    ({"height": 1080}, "height 1080 is not a multiple of 64: use 1088 or 1024"),
    ({"width": 100}, "width 100 is not a multiple of 64: use 128 or 64"),
    ({"height": 0}, "height 0 is not a positive multiple of 64: use 64"),
    ({"num_frames": 120}, "num_frames 120 is not 8k\\+1: use 113 or 121"),
    ({"frame_rate": float("nan")}, "frame_rate must be a positive number"),
    ({"steps": 1}, "steps must be at least 2"),
    ({"seed": 2**64}, "seed must be between"),
    ({"audio_source": "both"}, "audio_source must be"),
    ({"images": ["/nowhere/at/all.png"]}, "/nowhere/at/all.png"),
    ({"output_type": "gif"}, "output_type must be one of"),
    ({"distilled_strengths": (0.25, -1.0)}, "strength must be a finite number of at least 0"),
    ({"stage2_sigmas": [0.5, 0.7, 0.0]}, "strictly falling"),
    ({"video_guidance": GuidanceScales(stg=1.0, stg_blocks=(48,))}, "stg_blocks must be between 0 and 1"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text, or one per prompt"),
    ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_refusals_come_before_any_forward(
    pipeline: HQTwoStagePipeline, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the request was refused")

    monkeypatch.setattr(pipeline.prompts, "encode", never)
    with pytest.raises((ValueError, TypeError), match=sentence):
        pipeline("a kite", **{**SMALL, **changes})


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


def test_a_two_stage_model_without_its_lora_is_refused(tmp_path: Path) -> None:
    official = write_official_demo(tmp_path, build_demo())
    with pytest.raises(ValueError, match="needs the distilled LoRA: give distilled_lora=PATH"):
        HQTwoStagePipeline.from_pretrained(official["checkpoint"], device="cpu")


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
