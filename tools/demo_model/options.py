"""What every option that can change results costs and keeps, on the demo's model: python -m tools.demo_model.options.

Rows are written into build/demo_model/options.json as they are done, with --keep into the one beside the files. --only measures
some rows anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltxkern.pipeline.files.hub import DEMO_FOLDER
from ltxkern.pipeline.model.tiling import VideoTiling
from ltxkern.pipeline.sampling.guidance import HQ_AUDIO, HQ_VIDEO, PlainCFGPolicy
from tools.demo_model.judge import read_clip
from tools.demo_model.measure import PROMPTS, RESULTS, count, keep, known_rows, model_folder
from tools.demo_model.runs import Setting, row, run, tasks, workers
from tools.demo_model.video_vae import decibels

FEWER = 8
REFERENCE, PICTURE = "defaults, fp32", "--image"
BF16, ROUNDED_ONCE = "--dtype bf16", "--dtype bf16, LoRA rounded once"
VIDEOS = RESULTS / "options"


def _guided(**scales: Any) -> Setting:
    """The published scales of stage 1 but for these, in picture and sound."""
    return Setting(call={"video_guidance": replace(HQ_VIDEO, **scales), "audio_guidance": replace(HQ_AUDIO, **scales)})


def _strengths(first: float, second: float) -> Setting:
    return Setting({"distilled_strengths": (first, second)})


# Without fp16: where a processor has no products in it, a video takes thirty times as long.
MAIN = {
    REFERENCE: Setting(),
    BF16: Setting({"dtype": torch.bfloat16}),
    "--backend torch": Setting(backend="torch"),
    "--policy exact": Setting({"policy": "exact"}),
    "guidance: plain CFG": Setting(call={"guidance_policy": PlainCFGPolicy}),
    "tiles of 128 x 192": Setting(call={"tiling": VideoTiling(128, 192, spatial_overlap=32)}),
    "--steps 8": Setting(call={"steps": 8}),
    "--steps 30": Setting(call={"steps": 30}),
    "--pipeline distilled, strengths 1": Setting({"preset": "distilled", "distilled_strengths": (1.0, 1.0)}),
    "--eta 0": Setting(call={"eta": 0.0}),
    "skip steps 1": _guided(skip_step=1),
    ROUNDED_ONCE: Setting({"dtype": torch.bfloat16}, rounding="single"),
    "fp8 file": Setting(fp8=True),
}
# Measured on fewer prompts.
MORE = {
    "--attention math": Setting({"attention": "math"}),
    "--substep-eta 0": Setting(call={"substep_eta": 0.0}),
    "CFG scales 1": _guided(cfg=1.0),
    "modality scales 1": _guided(modality=1.0),
    "rescale scales 0": _guided(rescale=0.0),
    "STG scales 1, block 1": _guided(stg=1.0, stg_blocks=(1,)),
    "--audio-source stage2": Setting(call={"audio_source": "stage2"}),
    "--distilled-strength-stage-1 0": _strengths(0.0, 0.5),
    "--distilled-strength-stage-2 0.25": _strengths(0.25, 0.25),
    "--distilled-strength-stage-2 1": _strengths(0.25, 1.0),
    "--pipeline two-stage": Setting({"preset": "two-stage"}),
    "--pipeline one-stage": Setting({"preset": "one-stage"}),
    PICTURE: Setting(first_frame=True),
    "--image, --image-crf 0": Setting(first_frame=True, image_crf=0),
}
OPTIONS = MAIN | MORE
# What a row's videos are compared with, if not the first row's.
AGAINST = {ROUNDED_ONCE: BF16, PICTURE: None, "--image, --image-crf 0": PICTURE}


def likeness(folder: Path, reference: Path, count: int) -> float | None:
    """PSNR in dB between the decoded videos of two folders, over all of them; None where they are equal."""
    errors = [
        (read_clip(folder / f"{index:03}.mp4").frames - read_clip(reference / f"{index:03}.mp4").frames).square().mean()
        for index in range(count)
    ]
    error = float(torch.stack(errors).mean())
    return round(decibels(4 * error), 1) if error else None


def place(name: str) -> Path:
    """Where the videos of a row go."""
    return VIDEOS / name.replace(" ", "-")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.options", description=__doc__)
    parser.add_argument(
        "--files", type=model_folder, default=DEMO_FOLDER, help="folder of the model; default the package's"
    )
    parser.add_argument("--prompts", type=count, default=PROMPTS)
    parser.add_argument("--fewer-prompts", type=count, default=FEWER, help="of the lower rows")
    parser.add_argument("--only", action="append", choices=list(OPTIONS), help="this row alone; repeatable")
    parser.add_argument(
        "--keep", action="store_true", help="write the rows beside the files: those of the package are shipped"
    )
    arguments = parser.parse_args(given)
    # Those of these files that lie in build/ have their videos there.
    made = RESULTS / "options.json"
    paths = [made, *([arguments.files / made.name] if arguments.keep else [])]
    names = [name for name in OPTIONS if name in (arguments.only or OPTIONS)]
    counts = {name: arguments.prompts if name in MAIN else arguments.fewer_prompts for name in OPTIONS}
    known = known_rows(made, arguments.files)
    for name in names:
        reference = AGAINST.get(name, REFERENCE)
        if reference is None or reference in names or known.get(reference, {}).get("videos", 0) >= counts[name]:
            continue
        parser.error(
            f"{name!r} is compared with {reference!r}, which {made} lacks of as many prompts: add --only {reference!r}"
        )
    with workers() as pool:
        for name in names:
            chosen = tasks(counts[name])
            found: dict[str, float | None] = {**row(run(OPTIONS[name], arguments.files, chosen, place(name), pool))}
            reference = AGAINST.get(name, REFERENCE)
            if reference is not None:
                found["decibels"] = likeness(place(name), place(reference), len(chosen))
            for path in paths:
                keep(path, arguments.files, name, found, list(OPTIONS))
            print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
