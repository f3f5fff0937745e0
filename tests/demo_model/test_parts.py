"""The parts of the demo's training: each takes a step that its checkpoint can hold, and the files load as the real model's."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from ltxkern.pipeline.files.checkpoint import load_component
from ltxkern.pipeline.files.hub import DEMO_FOLDER
from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.model.components import BUILDABLE
from ltxkern.pipeline.result import HQOutput
from tools.demo_model import (
    audio,
    drafts,
    export,
    faults,
    gallery,
    judge,
    latents,
    lora,
    measure,
    options,
    runs,
    text,
    transformer,
    upsampler,
    video_vae,
)
from tools.demo_model.__main__ import AFTER_LATENTS, BEFORE_LATENTS
from tools.demo_model.training import Part, checkpoint
from tools.demo_model.world import COLOURS, HORIZONTAL, MOTIONS, Scene, Shape, Window, draw_scene, render_video, track

FILES = 3
TIME = torch.linspace(0, 1, 25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of noise in place of encoded scenes, and the checkpoints that parts leave to each other."""
    place = tmp_path_factory.mktemp("demo_model")
    (place / "latents").mkdir()
    for number in range(FILES):
        draws = torch.Generator().manual_seed(number)
        half = 2 * torch.randn(latents.SCENES, 32, 7, 4, 6, generator=draws) + 1
        sound = torch.randn(latents.SCENES, 1, audio.LATENTS, 16, generator=draws)
        tensors = {"half": half, "audio": sound}
        if number != 2:
            tensors["full"] = interpolate(half, size=(7, 8, 12))
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(tensors, place / "latents" / f"{number:04}.safetensors")
    latents.prepare(place, range(FILES), workers=1)  # nothing is missing but the statistics
    (place / "drafts").mkdir()
    video, sound = torch.randn(3, 32, 7, 8, 12), torch.randn(3, 1, audio.LATENTS, 16)
    drafted = {"start": video, "clean": 0.9 * video, "audio": sound, "places": torch.tensor([0, 4, 7])}
    save_file(drafted, place / "drafts" / "0000.safetensors")
    return place


def step(part: Part, number: int = 0) -> dict[str, float]:
    torch.manual_seed(0)
    losses = part.losses(Random(number), number)
    torch.stack(list(losses.values())).sum().backward()
    before = [parameter.detach().clone() for parameter in part.parameters().values()]
    part.optimiser.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, part.parameters().values(), strict=True))
    torch.save({"modules": {k: m.state_dict() for k, m in part.modules.items()}}, checkpoint(part.folder, part.name))
    return {name: float(loss.detach()) for name, loss in losses.items()}


def test_three_colours_are_hard_to_hear_where_they_change_sides() -> None:
    """Their pitches are multiples of the distance of two bins."""
    hard = {
        (colour, motion)
        for colour in COLOURS
        for motion in MOTIONS
        if audio.hard_to_hear(Scene("black", (Shape("ring", colour, motion),)))
    }
    assert hard == {(colour, motion) for colour in ("yellow", "blue", "pink") for motion in ("left", "right")}


def test_audio_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (audio.AudioVAE, audio.Vocoder):
        monkeypatch.setattr(part, "batch", 1)
    first = audio.AudioVAE(folder)
    # It starts from what training may hear.
    assert float(first.vae.decoder.conv_out.conv.bias.detach()[0]) != pytest.approx(float(first.mels.mean()))
    first.mels = first.mels[:1]
    assert step(first)["error"] > 0
    assert first.evaluate()["log_mel"] > 0
    encoder = audio.AudioEncoder(folder)
    assert {name.split(".")[1] for name in encoder.parameters()} == {"encoder"}
    assert step(encoder)["error"] > 0
    vocoder = audio.Vocoder(folder)
    vocoder.scenes = vocoder.scenes[:1]
    assert step(vocoder, vocoder.at(vocoder.decoded_from))["error"] > 0
    assert set(vocoder.evaluate()) == {"decibels", "pitch", "side"}


def test_video_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_vae.VideoVAE, "courses", (video_vae.Course(1, 1, (9, 64, 64)),))
    part = video_vae.VideoVAE(folder)
    assert step(part, 0)["error"] < 2


def test_a_rehearsal_goes_through_all_phases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a whole training changes where it did when its weights were made."""
    windows, noise = [], []

    def draw_batch(draws: Random, count: int, window: tuple[int, int, int]) -> torch.Tensor:
        windows.append(window)
        return torch.zeros(1, 3, 9, 64, 64)

    def randn_like(tensor: torch.Tensor) -> torch.Tensor:
        noise.append(len(windows))
        return torch.zeros_like(tensor)

    video, sound = video_vae.VideoVAE(folder), audio.AudioVAE(folder)
    starts = [video.at(course.until) for course in video.courses] + [video.at(video.noise_from)]
    assert starts == [5000, 10000, 2000]
    assert [sound.at(sound.noise_from), audio.Vocoder.at(audio.Vocoder, audio.Vocoder.decoded_from)] == [500, 1600]
    monkeypatch.setattr(video_vae, "draw_batch", draw_batch)
    monkeypatch.setattr(torch, "randn_like", randn_like)
    for steps, numbers in ((5, range(5)), (15000, [14999])):
        video.steps = steps
        for number in numbers:
            video.losses(Random(0), number)
    first, second = (course.window for course in video.courses)
    assert windows == [first, first, second, second, second, second]
    assert noise == [2, 3, 4, 5, 6]


def test_parts_on_latents(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, name in (
        (upsampler.Upsampler, "batch"),
        (transformer.Transformer, "batch"),
        (lora.DistilledLora, "half_batch"),
    ):
        monkeypatch.setattr(part, name, 2)
    assert step(upsampler.Upsampler(folder))["error"] > 0
    model = transformer.Transformer(folder)
    for number in (0, model.full_every - 1):
        assert set(step(model, number)) == {"half" if number == 0 else "full", "audio"}
    distilled = lora.DistilledLora(folder)
    for number in range(2):
        assert set(step(distilled, number)) == {"full"}
    assert set(distilled.losses(Random(2), distilled.half_every - 1)) == {"half", "audio"}


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_draft_s_scene_is_found(motion: str) -> None:
    shape = Shape("ring", "red", motion, "medium", "middle" if motion in HORIZONTAL else "left", 1.06, 0.03, -0.05)
    scene = Scene("navy", (shape,))
    outlines = judge.see_outlines((render_video(scene, 128, 192, 25) + 1) / 2)
    assert outlines is not None
    asked = replace(scene, shapes=(replace(shape, scale=0.95, x=-0.01, y=0.02),))
    found = drafts.fitted(asked, outlines, 1.5)
    assert found is not None
    for drawn, seen in zip(track(shape, TIME, 1.5), track(found.shapes[0], TIME, 1.5), strict=True):
        assert (drawn - seen).abs().max() < 0.012
    others = {"left": "right", "right": "left"}
    other = replace(asked, shapes=(replace(shape, motion=others.get(motion, "right")),))
    assert drafts.fitted(other, outlines, 1.5) is None


def test_the_lora_can_be_trained_anew_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other parts are read from the model's files, and are written as they were."""
    read = export.Trained.read(DEMO_FOLDER)
    read.keep_checkpoints(tmp_path)
    assert all(checkpoint(tmp_path, part.name).is_file() for part in (*BEFORE_LATENTS, *AFTER_LATENTS))
    export.Trained.load(tmp_path, lora=False).write(tmp_path / "files")
    for name in (export.MODEL, export.UPSCALER):
        written, shipped = (load_file(place / name) for place in (tmp_path / "files", DEMO_FOLDER))
        assert all(torch.equal(written.pop(key), tensor) for key, tensor in shipped.items()), name
        assert not written
    monkeypatch.setattr(drafts, "SCENES", 1)
    monkeypatch.setattr(drafts, "shared_out", lambda work, settings, numbers, workers: work(*settings, numbers))
    drafts.prepare(tmp_path, tmp_path / "files", [0], workers=1)
    made = drafts.load(tmp_path)
    assert len(made.scenes) == len(made.audio) == 1
    near, far = ((made.start - other).square().mean().sqrt() for other in (made.clean, -made.clean))
    assert near < 0.3 * far
    tensors = load_file(DEMO_FOLDER / export.MODEL)
    tensors.popitem()
    save_file(tensors, tmp_path / export.MODEL)
    with pytest.raises(ValueError, match="lacks weights of"):
        export.Trained.read(tmp_path)


def test_normalised_latents_have_the_spread(folder: Path) -> None:
    values = latents.statistics(folder)
    some = values.video(latents.load(folder, 1).half)
    assert abs(float(some.std()) - latents.SPREAD) < 0.1
    assert abs(float(some.mean())) < 0.1


def test_a_scene_of_a_batch_has_its_own_prompt_and_noise_level(folder: Path) -> None:
    model = transformer.Model()
    for projection in (model.transformer.proj_out, model.transformer.audio_proj_out):
        torch.nn.init.normal_(projection.weight)
    clean = transformer.LatentScenes(folder, test=True).batch([0, 1])
    hidden, mask = text.Encoder()(["a red circle moves left", "a blue ring grows on a white background"])
    sigma = torch.tensor([0.5, 0.9])
    with torch.no_grad():
        together = model((clean.video, clean.audio), sigma, clean.grid, model.contexts(hidden, mask))
        for index in range(2):
            own = slice(index, index + 1)
            tokens, grid = (clean.video[own], clean.audio[own]), replace(clean.grid, batch=1)
            alone = model(tokens, sigma[own], grid, model.contexts(hidden[own], mask[own]))
            for one, two in zip(together, alone, strict=True):
                torch.testing.assert_close(one[own], two, rtol=1e-4, atol=1e-4)


def test_a_first_frame_that_is_given_is_not_noise(folder: Path) -> None:
    model = transformer.Model()
    torch.nn.init.normal_(model.transformer.proj_out.weight)
    data = transformer.LatentScenes(folder, test=True)
    clean = data.batch([0, 1])
    contexts = model.contexts(*text.Encoder()(["a red circle", ""]))
    sigma = torch.tensor([0.5, 0.9])
    with torch.no_grad():
        plain, given = (
            model((clean.video, clean.audio), sigma, clean.grid, contexts, first_frame=flag)[0]
            for flag in (False, True)
        )
    assert not torch.allclose(plain[:, :24], given[:, :24])


def test_spectrograms_tell_pitch_and_time() -> None:
    time = torch.arange(32000) / audio.RATE
    mel = audio.log_mel(torch.sin(2 * torch.pi * 1000 * time)[None] * (time > 1))
    assert mel.shape == (1, 200, audio.MELS)
    assert mel[0, 50].max() < -11
    centre = float(2595 * torch.log10(torch.tensor(1 + 1000 / 700)) / 2840 * (audio.MELS + 1)) - 1
    assert abs(int(mel[0, 150].argmax()) - centre) <= 1


def test_windows_show_edges() -> None:
    draws, edges = Random(0), 0
    for _ in range(40):
        scene = draw_scene(draws)
        window = video_vae.draw_window(draws, scene, (49, 128, 192), (9, 64, 64))
        assert isinstance(window, Window)
        edges += render_video(scene, 128, 192, 49, window).std((0, 2, 3)).max() > 0.1
    assert edges >= 36


def test_words_and_filler() -> None:
    made = text.tokenizer()
    ids = made("A RED, circle... wibble")["input_ids"]
    assert made.convert_ids_to_tokens(ids) == ["<bos>", "a", "red", "circle", "<unk>"]
    assert len(made(text.with_filler("a red circle", Random(3)))["input_ids"]) >= 4
    first, second = (text.Encoder()(["a red circle"])[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_files_load_as_the_real_models(tmp_path: Path) -> None:
    trained = export.Trained()
    # What training starts at zero would hide what is lost on the way.
    for tensor in (
        *trained.factors.b,
        trained.model.transformer.proj_out.weight,
        trained.model.transformer.audio_proj_out.weight,
    ):
        torch.nn.init.normal_(tensor)
    trained.write(tmp_path)
    model, upscaler = tmp_path / export.MODEL, tmp_path / export.UPSCALER
    assert model.stat().st_size <= export.MOST_BYTES
    for component in BUILDABLE:
        module = load_component(upscaler if component == "upsampler" else model, component, dtype=torch.float32)
        own = {"transformer": trained.model.transformer, "connectors": trained.model.connectors}
        source = (own.get(component) or getattr(trained, component)).state_dict()
        assert all(torch.equal(source[name].bfloat16(), part.bfloat16()) for name, part in module.state_dict().items())
    shapes = {name: tuple(part.shape) for name, part in trained.model.transformer.state_dict().items()}
    assert len(LoRA.from_file(tmp_path / export.LORA, shapes).factors) == len(trained.factors.names)
    assert load_file(model).keys() >= {"model.diffusion_model.patchify_proj.weight", "vae.decoder.conv_in.conv.weight"}
    (task,) = runs.tasks(1)
    assert task.scene.held_out
    # At 64 x 64 the video encoder itself is not repeatable.
    # Three steps are the fewest with a sigma between the ends, which no shift moves.
    sizes = {"height": 64, "width": 128, "num_frames": 9, "steps": 3}
    made: list[HQOutput] = []
    with runs.calls(runs.Setting(), tmp_path) as call:

        def kept(prompt: str, **given: Any) -> HQOutput:
            made.append(call(prompt, **given))
            return made[-1]

        (tmp_path / "videos").mkdir()
        runs.make(kept, task, tmp_path / "videos" / "000.mp4", **sizes)
        again = call(task.prompt, **sizes)
        rows = gallery.from_pictures(call, gallery.GIVEN[:1], tmp_path, **sizes)
    (right,) = made
    assert torch.equal(again.video, right.video)
    assert torch.equal(again.audio, right.audio)
    page = gallery.sheet([(task.prompt, right.video), *rows], (32, 48))
    assert page.size == (6 * 52 - 4, 2 * (32 + 24 + 4))
    assert page.crop((0, 24, 48, 56)).tobytes() != page.crop((0, 84, 48, 116)).tobytes()
    others = {fault: runs.Setting(fault=fault) for fault in faults.FAULTS}
    others |= {name: measure.SETTINGS[name] for name in ("stage 1 enlarged", "stage 2 without the LoRA")}
    for name, setting in others.items():
        with runs.calls(setting, tmp_path) as call:
            wrong = call(task.prompt, **sizes)
        assert not (torch.equal(wrong.video, right.video) and torch.equal(wrong.audio, right.audio)), name
    found = {}
    for name in (options.REFERENCE, "fp8 file"):
        found[name] = runs.row(runs.run(options.OPTIONS[name], tmp_path, [task], tmp_path / name, **sizes))
    questions = {"colour", "background", "shape", "motion", "pitch", "side"}
    assert questions | {"all", "seconds", "videos"} <= found["fp8 file"].keys()
    assert options.likeness(tmp_path / options.REFERENCE, tmp_path / "videos", 1) is None
    assert options.likeness(tmp_path / "fp8 file", tmp_path / "videos", 1) < 60
    (given,) = runs.run(runs.Setting(first_frame=True), tmp_path, [task], tmp_path / "given", **sizes)
    assert given.first_frame is not None


def test_rows_stay_with_their_files(tmp_path: Path) -> None:
    for name in export.DEMO_NAMES[:3]:
        (tmp_path / name).write_text(name)
    told = tmp_path / "measured.json"
    for name, row in (("b", {"videos": 1}), ("a", {"videos": 2}), ("b", {"videos": 3})):
        measure.keep(told, tmp_path, name, row, ["a", "b"])
    assert list(json.loads(told.read_text())["rows"].items()) == [("a", {"videos": 2}), ("b", {"videos": 3})]
    (tmp_path / export.LORA).write_text("another")
    measure.keep(told, tmp_path, "a", {"videos": 4}, ["a", "b"])
    assert json.loads(told.read_text())["rows"] == {"a": {"videos": 4}}


def test_videos_are_shared_out_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "_make_all", lambda setting, files, numbered, folder, sizes: [n for n, _ in numbered])
    with ThreadPoolExecutor() as pool:
        for count in (1, 2, 5):
            assert runs.run(runs.Setting(), tmp_path, runs.tasks(count), tmp_path, pool) == list(range(count))
