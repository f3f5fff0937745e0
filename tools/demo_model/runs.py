"""Videos of scenes that training never sees, made under a setting, judged as they are seen and heard, shared out over processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from shutil import copyfile, copytree
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ltxkern.dispatch import use_backend
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.files.hub import DEMO, DEMO_NAMES, demo_files
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.model.conditioning import DEFAULT_CRF, ImageCondition
from ltxkern.pipeline.result import HQOutput
from ltxkern.pipeline.results.media import write_mp4
from ltxkern.pipeline.run.decoding import decode
from tools.demo_model.faults import planted
from tools.demo_model.judge import Verdict, edge_width, judge, outline_fit, read_clip, scores
from tools.demo_model.prompts import write_prompt
from tools.demo_model.training import WORKERS, seeded
from tools.demo_model.video_vae import FRAMES, HEIGHT, WIDTH, decibels
from tools.demo_model.world import MOTIONS, Scene, Window, draw_scene, render_video

Call = Callable[..., HQOutput]


class Task(NamedTuple):
    """A scene that training never sees, and one of its sentences."""

    scene: Scene
    prompt: str


def tasks(count: int, *, shapes: int = 1) -> list[Task]:
    """The same tasks in every run: each motion in turn, and no combination of words twice."""
    draws, seen, made = Random(seeded("measure", shapes)), set[str](), list[Task]()
    while len(made) < count:
        scene = draw_scene(draws, held_out=True, shapes=shapes)
        combination, motion = scene.combinations[0], scene.shapes[0].motion
        in_turn = shapes > 1 or motion == MOTIONS[len(made) % len(MOTIONS)]
        if in_turn and combination not in seen:
            seen.add(combination)
            made.append(Task(scene, write_prompt(scene, draws)))
    return made


@dataclass(frozen=True)
class Setting:
    """How videos are made.

    Args:
        opened: how the model is opened, in place of fp32 on the CPU.
        call: what a call is given beside the prompt, in place of the demo's sizes.
        backend: that serves it, by name.
        fault: one of `FAULTS`.
        rounding: of LoRA merges, as `merge_lora_` has it.
        fp8: whether the transformer's matrices are read from a file in fp8.
        first_frame: whether the scene's first frame is given.
        image_crf: H.264 quality of its re-compression.
        enlarged: whether what stage 1 made is shown, as the upsampler enlarges it.
    """

    opened: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None
    fault: str | None = None
    rounding: str = "reference"
    fp8: bool = False
    first_frame: bool = False
    image_crf: int = DEFAULT_CRF
    enlarged: bool = False


class Made(NamedTuple):
    """What one video shows: the verdict, pixels across an edge, fit of the outline, seconds of the processor, first frame's PSNR.

    The fit of two shapes is NaN.
    """

    verdict: Verdict
    edge: float
    fit: float
    seconds: float
    first_frame: float | None


def open_model(files: Path, **settings: Any) -> HQTwoStagePipeline:
    """A pipeline on exported files, in fp32 on the CPU unless told otherwise."""
    settings = dict[str, Any](device="cpu", dtype=torch.float32) | settings
    return HQTwoStagePipeline.from_pretrained(FoundModel(DEMO, demo_files(files)), **settings)


@contextmanager
def calls(setting: Setting, files: Path) -> Iterator[Call]:
    """What makes videos under a setting."""
    with ExitStack() as stack:
        if setting.fp8:
            scratch = Path(stack.enter_context(TemporaryDirectory()))
            write_fp8(files, scratch)
            files = scratch
        if setting.backend is not None:
            stack.enter_context(use_backend(setting.backend))
        pipeline = stack.enter_context(open_model(files, **setting.opened))
        pipeline.manager.rounding = setting.rounding
        call: Call = pipeline if setting.fault is None else stack.enter_context(planted(pipeline, setting.fault))
        if setting.enlarged:
            yield lambda prompt, **options: enlarged(pipeline, call(prompt, output_type="latents", **options))
        else:
            yield call


@torch.no_grad()
def enlarged(pipeline: HQTwoStagePipeline, output: HQOutput) -> HQOutput:
    """What stage 1 made: its latents through the upsampler, decoded at full size."""
    latents = output.latents | {"video": output.latents["upsampled_video"]}
    videos, sounds = decode(pipeline.components, pipeline.manager, latents, "auto", None, streamed=False)
    return replace(output, video=videos[0], audio=sounds[0])


def write_fp8(source: Path, target: Path) -> None:
    """A copy of a model's files with the transformer's matrices in fp8 (e4m3), cast without scales."""
    with safe_open(source / DEMO_NAMES.checkpoint, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if ".transformer_blocks." in name and tensor.ndim == 2 and name.endswith(".weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
    copytree(source / DEMO_NAMES.text_encoder, target / DEMO_NAMES.text_encoder)
    for name in (DEMO_NAMES.upsampler, DEMO_NAMES.distilled_lora):
        copyfile(source / name, target / name)
    save_file(tensors, target / DEMO_NAMES.checkpoint, metadata)


def first_frame(scene: Scene, height: int, width: int, frames: int) -> Tensor:
    """The first frame of a scene, (3, H, W) in [0, 1]."""
    return (render_video(scene, height, width, frames, Window(0, 0, height, width, 0, 1))[0] + 1) / 2


def save_picture(pixels: Tensor, path: Path) -> str:
    """Writes a picture (3, H, W) in [0, 1]; its path, as a request takes it."""
    Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    return str(path)


def make(
    call: Call, task: Task, path: Path, *, given: bool = False, image_crf: int = DEFAULT_CRF, **options: Any
) -> Made:
    """Generates a task's video into an mp4, and judges what is decoded from it.

    Args:
        call: an open model, or what `calls` gives.
        task: what to generate.
        path: of the mp4.
        given: whether the scene's first frame is given.
        image_crf: of a frame that is given, as `Setting` has it.
        options: of the call, in place of the demo's sizes.
    """
    options = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES} | options
    start = first_frame(task.scene, options["height"], options["width"], options["num_frames"])
    if given:
        picture = save_picture(start, path.with_suffix(".png"))
        options["images"] = [ImageCondition(picture, crf=image_crf)]
    began = time.process_time()
    output = call(task.prompt, **options)
    seconds = time.process_time() - began
    write_mp4(path, [output.video], output.audio, output.frame_rate)
    clip = read_clip(path)
    likeness = decibels(4 * float((clip.frames[0] - start).square().mean())) if given else None
    shapes = task.scene.shapes
    fit = outline_fit(clip.frames, shapes[0].kind) if len(shapes) == 1 else math.nan
    return Made(judge(clip, task.scene), edge_width(clip.frames), fit, seconds, likeness)


def run(
    setting: Setting, files: Path, chosen: Sequence[Task], folder: Path, pool: Executor | None = None, **sizes: Any
) -> list[Made]:
    """Videos of tasks under a setting, numbered in a folder; in two processes of one thread each where there is a pool."""
    numbered = list(enumerate(chosen))
    if pool is None:
        return _make_all(setting, files, numbered, folder, sizes)
    shares = [
        pool.submit(_make_all, setting, files, numbered[rank::WORKERS], folder, sizes)
        for rank in range(min(WORKERS, len(numbered)))
    ]
    made = [share.result() for share in shares]
    return [made[number % WORKERS][number // WORKERS] for number, _ in numbered]


def _make_all(
    setting: Setting, files: Path, numbered: Sequence[tuple[int, Task]], folder: Path, sizes: Mapping[str, Any]
) -> list[Made]:
    folder.mkdir(parents=True, exist_ok=True)
    options = {**sizes, **setting.call}
    with calls(setting, files) as call:
        return [
            make(
                call,
                task,
                folder / f"{number:03}.mp4",
                given=setting.first_frame,
                image_crf=setting.image_crf,
                **options,
            )
            for number, task in tqdm(numbered, desc=folder.name, mininterval=30)
        ]


def workers() -> Executor:
    """Processes for `run`: threads that wait for each other would lose most on a busy machine."""
    return ProcessPoolExecutor(
        WORKERS, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )


def is_right(verdict: Verdict) -> bool:
    """Whether a clip shows all that was asked."""
    return all(answer is not False for answer in vars(verdict).values())


def row(made: Sequence[Made]) -> dict[str, float]:
    """Of many videos: right answers of each question and of all in percent, means of the rest, the least PSNR of first frames."""
    verdicts = [one.verdict for one in made]
    found: dict[str, float] = {
        name: round(100 * share) for name, share in scores(verdicts).items() if not math.isnan(share)
    }
    found["all"] = round(100 * fmean(map(is_right, verdicts)))
    if edges := [one.edge for one in made if math.isfinite(one.edge)]:
        found["edge"] = round(fmean(edges), 2)
    if fits := [one.fit for one in made if math.isfinite(one.fit)]:
        found["fit"] = round(100 * fmean(fits), 1)
    found["seconds"] = round(fmean(one.seconds for one in made), 1)
    if pictures := [one.first_frame for one in made if one.first_frame is not None]:
        found["first_frame"] = round(min(pictures), 1)
    return found | {"videos": len(made)}
