"""`ltxkern generate`: a prompt becomes an mp4 (or latents, or PNG frames and a wav)."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from ltxkern.commands import options, parallel

DEMO_NOTE = (
    "The demo model has random weights: its pictures are coloured noise and its sound is hiss. "
    "It runs the very code of the real model, at a tiny size."
)


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "generate",
        help="make a video with sound from a prompt",
        description="Make a video with sound from a prompt. The suffix of -o decides: .mp4, .safetensors (latents), or a folder.",
    )
    options.add_request_options(parser)
    options.add_model_options(parser)
    parallel.add_parallel_options(parser)
    parser.add_argument("-o", "--output", default="out.mp4", help=".mp4, .safetensors or a folder (default out.mp4)")
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, tokens, evaluations and sigmas, then stop"
    )
    parser.add_argument("--no-plan", action="store_true", help="do not check beforehand that the run fits into memory")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, load, generate, write, verify what was written; on every rank where several were started."""
    with parallel.job(arguments) as job:
        return generate(arguments, job)


def generate(arguments: argparse.Namespace, job: parallel.Job) -> int:
    """The command on one rank of a job; only the lead prints and writes."""
    from ltxkern.pipeline.results.atomic import writable_output

    if not arguments.prompt or not arguments.prompt.strip():
        raise ValueError('prompt is missing: add --prompt "what the video shows"')
    asked, request, geometry = options.checked_request(arguments)
    if arguments.dry_run:
        if job.leads:
            print(describe(request, geometry))
        return 0
    kind = writable_output(arguments.output, result_bytes(request, geometry, arguments.output))
    if arguments.model == "demo":
        if job.leads:
            print(DEMO_NOTE, file=sys.stderr)
    elif Path(arguments.model).expanduser().exists() and not arguments.no_plan:
        options.make_plan(arguments, request).check()
    quiet = arguments.quiet or not job.leads
    with options.backend_choice(arguments), Bars(quiet) as bars, options.open_pipeline(arguments) as pipeline:
        shared = job.share(pipeline, request, geometry, arguments.cfg_parallel_size, arguments.stage2_parallel)
        if shared is not None or job.leads:
            output = pipeline(**asked, output_type="latents" if kind == "latents" else "stream", progress=bars)
        if job.leads:
            output.save(arguments.output, progress=bars.frames(asked["num_frames"]))
    job.finish()
    if job.leads:
        if not arguments.quiet:
            parallel.report_traffic(shared)
        print(finished(Path(arguments.output), kind))
    return 0


def result_bytes(request: Any, geometry: Any, output: str) -> int:
    """About what the result takes on disk: latents exactly, PNG frames of noise at worst, an mp4 at a tenth of that."""
    from ltxkern.pipeline.results.atomic import output_kind

    last = request.plan(geometry)[-1]
    if output_kind(output) == "latents":
        return 4 * (math.prod(last.video.dims()) + math.prod(last.audio.dims()))
    frames = 3 * request.num_frames * request.height * request.width
    return frames if output_kind(output) == "frames" else frames // 10


def describe(request: Any, geometry: Any) -> str:
    """The resolved plan of a request, as text."""
    guidance = request.guidance(geometry)
    lines = [
        f"pipeline {request.preset.name}, seed {request.seed}, {request.num_frames} frames at {request.frame_rate:g} fps"
    ]
    for image in request.images:
        lines.append(f"image {image.path} at frame {image.frame}, strength {image.strength:g}, crf {image.crf}")
    for plan in request.plan(geometry):
        lines += [
            f"{plan.name}: {plan.height}x{plan.width}, {plan.sampler}, {len(plan.sigmas) - 1} steps",
            f"  video latent {plan.video.dims()}, {plan.video.tokens} tokens",
            f"  audio latent {plan.audio.dims()}, {plan.audio.tokens} tokens",
            f"  {plan.evaluations} evaluations x {plan.branches} branches = {plan.forwards} forwards",
            "  sigmas " + " ".join(f"{sigma:.6g}" for sigma in plan.sigmas),
        ]
    lines.append(f"guidance video {guidance.video}")
    lines.append(f"guidance audio {guidance.audio}")
    return "\n".join(lines)


def finished(path: Path, kind: str) -> str:
    """The last line of a run: what was written, read back from the file."""
    if kind != "mp4":
        return str(path)
    from ltxkern.pipeline.results.media import probe_mp4

    info = probe_mp4(path)
    sound = f"{info.audio_rate} Hz, {info.channels} channels" if info.audio_rate else "no sound"
    return f"{info.frames} frames, {info.width}x{info.height}, {float(info.fps):g} fps, {sound}\n{path}"


class Bars:
    """Progress bars, one per stage, with rate and time left."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a stage is through."""
        if self._quiet:
            return
        if stage != self._stage or self._bar is None:
            from tqdm import tqdm

            self._close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=f"{stage:<22}", unit="step", file=sys.stderr, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close()
            self._stage = ""

    def frames(self, total: int) -> Any:
        """A callback that counts encoded frames."""
        return lambda done: self("writing", done, total)
