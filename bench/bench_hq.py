"""Seconds per stage of whole HQ runs: `python bench/bench_hq.py --model demo-random|PATH|random-full`.

`random-full` builds the production shapes with random weights and skips the text encoder (random contexts), so that a GPU can be
measured without a download; its pictures are noise, its times are not. The first run warms up and is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import machine
from bench_lora_switch import random_lora
from cases import DTYPES
from command_line import measured, parser, relaunch_warm, start_run
from harness import Run
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS, build, component_dtype
from ltxkern.pipeline.planning.plan import CUDA_OVERHEAD, plan
from ltxkern.pipeline.run.request import GenerationRequest
from report import Record
from report import size as text_size
from timing import summarise

DEMO_SIZE, FULL_SIZE = (64, 64, 9), (1088, 1920, 121)
# One bf16 copy of the weights (40 GB), the widest activations of stage 2 and a decoded tile.
RANDOM_FULL_BYTES = 60_000_000_000


class StageClock:
    """Attributes the time between two progress reports to the stage that reported last."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A progress callback: what passed since the last report belongs to this stage, or lies before it where it begins."""
        if 0 < done < total:
            return
        now = self._now()
        name = stage if done else "between stages"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def close(self) -> dict[str, float]:
        """Seconds per stage, with the rest and the sum."""
        now = self._now()
        self.seconds["between stages"] = self.seconds.get("between stages", 0.0) + now - self._last
        return {**self.seconds, "total": sum(self.seconds.values())}


def random_full(device: torch.device, **settings: Any) -> HQTwoStagePipeline:
    """The production transformer, upsampler, VAEs and vocoder with random weights, and a random LoRA of rank 384."""
    modules = {}
    for name in ("transformer", "upsampler", "video_vae", "audio_vae", "vocoder"):
        module = build(name, PRODUCTION_CONFIGS[name])
        dtype = component_dtype(name, torch.bfloat16)
        modules[name] = torch.nn.Module.to(module, dtype=dtype).to_empty(device=device)
        fill(modules[name], torch.Generator(device).manual_seed(0))
    lora = random_lora(modules["transformer"], rank=384)
    return HQTwoStagePipeline.from_components(**modules, device=device, distilled_lora=lora, **settings)


def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of a size that keeps activations finite: matrices by their fan-in, scales one, offsets and means zero."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if tensor.dim() > 1:
            tensor.data.normal_(0.0, 0.5 * tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.data.fill_(1.0 if name.endswith(("weight", "std")) else 0.0)


def random_contexts(device: torch.device) -> tuple[Tensor, Tensor]:
    """Text contexts of the production sizes for both modalities."""
    return tuple(torch.randn(1, 1024, width, device=device, dtype=torch.bfloat16) for width in (4096, 2048))


def rows_of(times: list[dict[str, float]], model: str, shape: tuple[int, ...], dtype: str, load: float) -> list[Record]:
    """One row per stage over all counted runs."""
    rows = []
    for stage in times[0]:
        summary = summarise([run[stage] for run in times])
        rows.append(Record("hq", f"{model} {stage}", list(shape), dtype, "ltxkern", **summary.fields(), load=load))
    return rows


def measure(run: Run, pipeline: HQTwoStagePipeline, model: str, size: tuple[int, int, int], steps: int | None) -> None:
    """One warm-up run, then --rounds counted ones."""
    height, width, frames = size
    request: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "steps": steps}
    if model == "random-full":
        request |= {"embeddings": random_contexts(run.device), "negative_embeddings": random_contexts(run.device)}
    kind = next(pipeline.components.transformer.parameters()).dtype
    name = next(name for name, dtype in DTYPES.items() if dtype == kind)
    times = []
    for index in range(1 + run.settings.rounds):
        clock = StageClock(run.device)
        pipeline("a red kite over a winter beach", progress=clock, **request)
        run.note_clocks()
        if index:
            times.append(clock.close())
            run.records = rows_of(times, model, size, name, machine.load_average())
            run.keep()
    if run.device.type == "cuda":
        # The planner's contract is 10 %; CUDA_OVERHEAD is what the allocator does not count.
        mode = pipeline.manager.mode or "original"
        asked = GenerationRequest(height=height, width=width, num_frames=frames)
        planned = plan(pipeline.components, asked, device=run.device, mode=mode).peak_bytes() - CUDA_OVERHEAD
        peak = torch.cuda.max_memory_allocated(run.device)
        run.facts |= {"peak_bytes": peak, "planned_peak_bytes": planned, "mode": mode}


def size_of(text: str) -> tuple[int, int, int]:
    """Height, width and frames of `--size`."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTHxFRAMES, e.g. 512x768x25, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of whole runs."""
    options = parser("Seconds per stage of a whole run.")
    options.add_argument("--model", default="demo-random", help="demo-random, random-full, or a path")
    options.add_argument("--distilled-lora", help="with a path: the distilled LoRA file")
    options.add_argument("--upsampler", help="with a path: the upsampler file")
    options.add_argument("--text-encoder", help="with a path: the text encoder folder")
    options.add_argument("--device-mode", default="auto")
    options.add_argument("--steps", type=int, help="of stage 1 (default: the preset's 15)")
    default = "height, width, frames (default: 64x64x9 for the demo, 1088x1920x121 otherwise)"
    options.add_argument("--size", type=size_of, metavar="HxWxF", help=default)
    parsed = options.parse_args(arguments)
    size = parsed.size or (DEMO_SIZE if parsed.model == "demo-random" else FULL_SIZE)
    relaunch_warm(parsed)
    run = start_run(parsed)
    if parsed.model == "random-full":
        if machine.free_bytes(run.device) < RANDOM_FULL_BYTES:
            print(f"random-full wants {text_size(RANDOM_FULL_BYTES)} ({RANDOM_FULL_BYTES} bytes) free on {run.device}")
            return 2
        pipeline = random_full(run.device, device_mode=parsed.device_mode)
    else:
        pipeline = HQTwoStagePipeline.from_pretrained(
            parsed.model,
            device=run.device,
            device_mode=parsed.device_mode,
            distilled_lora=parsed.distilled_lora,
            upsampler=parsed.upsampler,
            text_encoder=parsed.text_encoder,
        )
    name = Path(parsed.model).name
    return measured(run, parsed, lambda: measure(run, pipeline, name, size, parsed.steps))


if __name__ == "__main__":
    sys.exit(main())
