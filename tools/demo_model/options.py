"""What every option that can change results costs and keeps, on the demo's model: python -m tools.demo_model.options.

Rows are written into options.json beside the files as they are done; --only measures some rows anew.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from ltxkern.pipeline.files.hub import DEMO_FOLDER
from ltxkern.pipeline.model.tiling import VideoTiling
from ltxkern.pipeline.sampling.guidance import HQ_AUDIO, HQ_VIDEO, PlainCFGPolicy
from tools.demo_model.judge import read_clip
from tools.demo_model.measure import PROMPTS, keep
from tools.demo_model.runs import Setting, row, run, tasks, workers
from tools.demo_model.video_vae import decibels

REFERENCE = "defaults, fp32"
VIDEOS = Path("build/demo_model/options")
_SKIPPING = {
    "video_guidance": replace(HQ_VIDEO, skip_step=1),
    "audio_guidance": replace(HQ_AUDIO, skip_step=1),
}
# Without fp16: where a processor has no products in it, a video takes thirty times as long.
OPTIONS = {
    REFERENCE: Setting(),
    "--dtype bf16": Setting({"dtype": torch.bfloat16}),
    "--backend torch": Setting(backend="torch"),
    "--policy exact": Setting({"policy": "exact"}),
    "guidance: plain CFG": Setting(call={"guidance_policy": PlainCFGPolicy}),
    "one tile": Setting(call={"tiling": None}),
    "tiles of 128 x 192": Setting(call={"tiling": VideoTiling(128, 192, spatial_overlap=32)}),
    "--steps 8": Setting(call={"steps": 8}),
    "--steps 30": Setting(call={"steps": 30}),
    "--pipeline distilled": Setting({"preset": "distilled", "distilled_strengths": (1.0, 1.0)}),
    "--eta 0": Setting(call={"eta": 0.0}),
    "--skip-step 1": Setting(call=_SKIPPING),
    "LoRA rounded as published, bf16": Setting({"dtype": torch.bfloat16, "device_mode": "original"}),
    "fp8 file": Setting(fp8=True),
}


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
    return VIDEOS / f"{list(OPTIONS).index(name):02}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.options", description=__doc__)
    parser.add_argument("--files", type=Path, default=DEMO_FOLDER, help="folder of the model; default the package's")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--only", action="append", choices=list(OPTIONS), help="this row alone; repeatable")
    arguments = parser.parse_args()
    chosen = tasks(arguments.prompts)
    with workers() as pool:
        for name in arguments.only or OPTIONS:
            found: dict[str, float | None] = {**row(run(OPTIONS[name], arguments.files, chosen, place(name), pool))}
            found["decibels"] = likeness(place(name), place(REFERENCE), len(chosen))
            keep(arguments.files / "options.json", arguments.files, name, found, list(OPTIONS))
            print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
