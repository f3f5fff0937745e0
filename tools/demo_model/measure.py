"""Measures how well a demo model does what prompts of new scenes say: python -m tools.demo_model.measure --files PLACE."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.result import HQOutput
from ltxkern.pipeline.results.media import write_mp4
from tools.demo_model.export import LORA, MODEL, TEXT, UPSCALER
from tools.demo_model.judge import Verdict, judge, read_clip, scores
from tools.demo_model.prompts import write_prompt
from tools.demo_model.training import seeded
from tools.demo_model.video_vae import FRAMES, HEIGHT, WIDTH
from tools.demo_model.world import Scene, draw_scene

PROMPTS, PAIRS = 64, 16


class Task(NamedTuple):
    """A scene that training never sees, and one of its sentences."""

    scene: Scene
    prompt: str


def tasks(count: int, *, shapes: int = 1) -> list[Task]:
    """The same tasks in every run."""
    draws = Random(seeded("measure", shapes))
    scenes = [draw_scene(draws, held_out=True, shapes=shapes) for _ in range(count)]
    return [Task(scene, write_prompt(scene, draws)) for scene in scenes]


def open_model(files: Path, **settings: Any) -> HQTwoStagePipeline:
    """A pipeline on exported files, in fp32 on the CPU unless told otherwise."""
    return HQTwoStagePipeline.from_pretrained(
        files / MODEL,
        upsampler=files / UPSCALER,
        text_encoder=files / TEXT,
        distilled_lora=files / LORA,
        embedding_cache=False,
        **{"device": "cpu", "dtype": torch.float32} | settings,
    )


def follow(pipeline: Callable[..., HQOutput], chosen: Iterable[Task], folder: Path, **options: Any) -> list[Verdict]:
    """Generates the task's videos into a folder and judges what is decoded from them.

    Args:
        pipeline: an open model, or its call with a fault in it.
        chosen: what to generate.
        folder: where each mp4 stays, in order.
        options: of the call, in place of the demo's sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = []
    for index, task in enumerate(tqdm(list(chosen), desc=folder.name, mininterval=30)):
        settings = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES} | options
        output = pipeline(task.prompt, **settings)
        path = folder / f"{index:03}.mp4"
        write_mp4(path, [output.video], output.audio, output.frame_rate)
        verdicts.append(judge(read_clip(path), task.scene))
    return verdicts


def percent(verdicts: list[Verdict]) -> dict[str, int]:
    """Right answers of each question in percent; questions that nobody was asked are left out."""
    return {name: round(100 * share) for name, share in scores(verdicts).items() if not math.isnan(share)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.measure", description=__doc__)
    parser.add_argument("--files", type=Path, default=Path("build/demo_model/files"), help="exported files")
    parser.add_argument("--videos", type=Path, help="where the videos go; default beside the files")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="with one shape")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="with two shapes")
    arguments = parser.parse_args()
    pipeline = open_model(arguments.files)
    videos = arguments.videos or arguments.files.parent / "videos"
    results = {}
    for name, chosen in (("one", tasks(arguments.prompts)), ("two", tasks(arguments.pairs, shapes=2))):
        results[name] = percent(follow(pipeline, chosen, videos / name))
        print(f"{name} shape, {len(chosen)} prompts:", json.dumps(results[name]))
    (arguments.files.parent / "measured.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
