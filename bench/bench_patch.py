"""diffusers' LTX-2 pipelines, stock and patched: one transformer block of production width, everything else tiny, random weights.

`python bench/bench_patch.py --cases wide --dtypes fp32,bf16`: whole calls of text-to-video and image-to-video to latents, the two
in turn on the same weights. The first has a timestep a sample, the second one a token, most of which are equal; as LTX-2.0 wants
it (`use_cross_timestep=False`), those of the attention between picture and sound too.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image
from torch import Tensor, nn

import ltxkern
from bench_dit import check_distance, distance
from cases import DTYPES, Case
from command_line import measured, parser, relaunch_warm, start_run
from harness import Run, with_ratios
from ltxkern.pipeline.files.demo import DEMO_CONFIGS, build_demo
from providers import EAGER, WrongResultError
from report import Record
from timing import summarise, timed

# With what their calls have beside the defaults.
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text to video": (LTX2Pipeline, {}),
    "image to video": (LTX2ImageToVideoPipeline, {}),
    "image to video, own timesteps": (LTX2ImageToVideoPipeline, {"use_cross_timestep": False}),
}
PATCHED = "ltxkern patch"
WIDE = {
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
}
CASES = (
    Case("small", (9, 64, 64), "small", {"transformer": {}, "steps": 2}),
    Case("wide", (25, 256, 256), "named", {"transformer": WIDE, "steps": 2}),
)
UNGUIDED = {
    f"{of}{name}_scale": float(name != "stg") for of in ("", "audio_") for name in ("guidance", "stg", "modality")
}
TOKENS = 128


def _connectors(config: dict[str, Any]) -> nn.Module:
    """Projections of the text to the transformer's widths, without layers of their own."""
    sizes: dict[str, int] = {}
    for ours, theirs in (("video", ""), ("audio", "audio_")):
        heads, depth = config[f"{theirs}num_attention_heads"], config[f"{theirs}attention_head_dim"]
        sizes |= {f"{ours}_connector_num_attention_heads": heads, f"{ours}_connector_attention_head_dim": depth}
        sizes |= {f"{ours}_hidden_dim": heads * depth, f"{ours}_connector_num_layers": 0}
    return LTX2TextConnectors(**{**DEMO_CONFIGS["connectors"], **sizes})


def components(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What the pipelines are made of; prompts come embedded."""
    demo = build_demo(dtype=dtype, device=device)
    config = {**DEMO_CONFIGS["transformer"], **case.options["transformer"], "num_layers": 1}
    made = {}
    generator = torch.Generator(device).manual_seed(0)
    for name, build in (("transformer", LTX2VideoTransformer3DModel), ("connectors", lambda **_: _connectors(config))):
        with device:
            made[name] = nn.Module.to(build(**config), dtype=dtype).eval().requires_grad_(False)
        for weight in made[name].parameters():
            weight.normal_(0.0, 0.02, generator=generator)
    shift = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    return {
        **made,
        "scheduler": FlowMatchEulerDiscreteScheduler(**shift),
        **{"vae": demo.video_vae, "audio_vae": demo.audio_vae, "vocoder": demo.vocoder},
        **{"text_encoder": None, "tokenizer": None},
    }


def on_the_same_weights(parts: dict[str, Any]) -> dict[str, Any]:
    """Copies of all modules that share their tensors."""
    tensors = {
        id(tensor): tensor
        for part in parts.values()
        if isinstance(part, nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
    }
    return copy.deepcopy(parts, dict(tensors))


def latents_of(kind: str, parts: dict[str, Any], case: Case, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """A whole call of a pipeline: latents of picture and sound, the same in each call."""
    build, options = PIPELINES[kind]
    pipeline = build(**parts)
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = case.shape
    device = parts["transformer"].device
    widths = (1, TOKENS, parts["connectors"].config.caption_channels * parts["connectors"].config.text_proj_in_factor)
    text = torch.randn(widths, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    picture = (
        {"image": Image.linear_gradient("L").resize((width, height)).convert("RGB")}
        if build is LTX2ImageToVideoPipeline
        else {}
    )
    arguments = {
        **picture,
        **{"prompt_embeds": text, "prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.long, device=device)},
        **{"num_frames": frames, "height": height, "width": width, "frame_rate": 24.0},
        **{"num_inference_steps": case.options["steps"], "output_type": "latent", "return_dict": False},
        **UNGUIDED,
        **options,
    }

    def call() -> tuple[Tensor, ...]:
        return pipeline(generator=torch.Generator().manual_seed(2), **arguments)

    return call


@torch.no_grad()
def measure(run: Run, case: Case, dtype_name: str) -> None:
    """Both pipelines of one case; rows go to the run."""
    dtype = DTYPES[dtype_name]
    stock = components(case, dtype, run.device)
    patched = on_the_same_weights(stock)
    report = ltxkern.patch(nn.ModuleDict({name: part for name, part in patched.items() if isinstance(part, nn.Module)}))
    steps = case.options["steps"]
    for kind in PIPELINES:
        calls = {EAGER: latents_of(kind, stock, case, dtype), PATCHED: latents_of(kind, patched, case, dtype)}
        off = distance(calls[PATCHED](), calls[EAGER]())
        check_distance(PATCHED, off, dtype, steps)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(run.settings.rounds):
            run.note_clocks()
            for name, call in calls.items():
                samples[name].append(timed(call, run.device))
        title = f"{kind} {case.name} 1 block {steps} steps"
        note = f"relative RMS distance from stock {off:.1e}; {len(report.sites)} sites"
        row = functools.partial(Record, "patch", title, list(case.shape), dtype_name)
        rows = [
            row(name, **summarise(values).fields(), note=note if name == PATCHED else "")
            for name, values in samples.items()
        ]
        run.records += with_ratios(rows)
        run.keep()


def measure_all(run: Run, picked: Sequence[Case]) -> None:
    """The cases in turn."""
    for case in picked:
        for dtype in run.dtypes or ("fp32",):
            try:
                measure(run, case, dtype)
            except WrongResultError as error:
                run.fail("patch", f"{case.name} {dtype}", str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser("The stock LTX-2 pipelines of diffusers, as they are and patched.")
    options.set_defaults(rounds=5)
    parsed = options.parse_args(arguments)
    picked = [case for case in CASES if case.name in parsed.cases.split(",")]
    if not picked:
        options.error(f"--cases: none of {', '.join(case.name for case in CASES)} in {parsed.cases!r}")
    relaunch_warm(parsed)
    run = start_run(parsed)
    return measured(run, parsed, lambda: measure_all(run, picked))


if __name__ == "__main__":
    sys.exit(main())
