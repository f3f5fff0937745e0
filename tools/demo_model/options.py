"""What every option that can change results costs and keeps, on the demo's model: python -m tools.demo_model.options."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ltxkern.dispatch import use_backend
from ltxkern.pipeline.model.tiling import VideoTiling
from ltxkern.pipeline.sampling.guidance import HQ_AUDIO, HQ_VIDEO, PlainCFGPolicy
from tools.demo_model.export import LORA, MODEL, TEXT, UPSCALER
from tools.demo_model.judge import read_clip
from tools.demo_model.measure import PROMPTS, Task, follow, open_model, percent, tasks

REFERENCE = "defaults, fp32"


@dataclass(frozen=True)
class Option:
    """One row: how the model is opened, what a call is given, the backend that serves it, and whether weights are in fp8."""

    opened: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None
    fp8: bool = False


_SKIPPING = {
    "video_guidance": replace(HQ_VIDEO, skip_step=1),
    "audio_guidance": replace(HQ_AUDIO, skip_step=1),
}
OPTIONS = {
    REFERENCE: Option(),
    "--dtype bf16": Option({"dtype": torch.bfloat16}),
    "--dtype fp16": Option({"dtype": torch.float16}),
    "--backend torch": Option(backend="torch"),
    "guidance: plain CFG": Option(call={"guidance_policy": PlainCFGPolicy}),
    "one tile": Option(call={"tiling": None}),
    "tiles of 128 x 192": Option(call={"tiling": VideoTiling(128, 192, spatial_overlap=32)}),
    "--steps 8": Option(call={"steps": 8}),
    "--steps 30": Option(call={"steps": 30}),
    "--pipeline distilled": Option({"preset": "distilled", "distilled_strengths": (1.0, 1.0)}),
    "--eta 0": Option(call={"eta": 0.0}),
    "--skip-step 1": Option(call=_SKIPPING),
    "LoRA rounded as published, bf16": Option({"dtype": torch.bfloat16, "device_mode": "original"}),
    "fp8 file": Option(fp8=True),
}


def write_fp8(source: Path, target: Path) -> None:
    """A copy of a model's file with the transformer's matrices in fp8 (e4m3), cast without scales."""
    with safe_open(source / MODEL, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if ".transformer_blocks." in name and tensor.ndim == 2 and name.endswith(".weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
    copytree(source / TEXT, target / TEXT)
    for name in (UPSCALER, LORA):
        copyfile(source / name, target / name)
    save_file(tensors, target / MODEL, metadata)


def run(option: Option, files: Path, chosen: list[Task], folder: Path, **sizes: Any) -> dict[str, float]:
    """Prompt-following in percent and seconds a video of one row; the videos stay in the folder."""
    if option.fp8:
        write_fp8(files, folder / "files")
        files = folder / "files"
    pipeline = open_model(files, **option.opened)
    began = time.perf_counter()
    with use_backend(option.backend) if option.backend else nullcontext():
        verdicts = follow(pipeline, chosen, folder, **sizes, **option.call)
    return percent(verdicts) | {"seconds": round((time.perf_counter() - began) / len(chosen), 2)}


def likeness(folder: Path, reference: Path, count: int) -> float:
    """PSNR in dB between the decoded videos of two folders, over all of them; infinite where they are equal."""
    errors = [
        (read_clip(folder / f"{index:03}.mp4").frames - read_clip(reference / f"{index:03}.mp4").frames).square().mean()
        for index in range(count)
    ]
    error = float(torch.stack(errors).mean())
    return math.inf if error == 0 else round(10 * math.log10(1 / error), 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.options", description=__doc__)
    parser.add_argument("--files", type=Path, default=Path("build/demo_model/files"), help="exported files")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    arguments = parser.parse_args()
    place, chosen = arguments.files.parent / "options", tasks(arguments.prompts)
    rows: dict[str, dict[str, float]] = {}
    for number, (name, option) in enumerate(OPTIONS.items()):
        rows[name] = run(option, arguments.files, chosen, place / f"{number:02}")
        rows[name]["decibels"] = likeness(place / f"{number:02}", place / "00", len(chosen))
        print(name, json.dumps(rows[name]), flush=True)
    (arguments.files.parent / "options.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
