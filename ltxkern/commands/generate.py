"""`ltxkern generate`: a prompt becomes an mp4 (or latents, or PNG frames and a wav)."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxkern.commands import admission, options, parallel, progress, work_dir

if TYPE_CHECKING:
    from ltxkern.pipeline.parallel.by_branch import CFGParallel
    from ltxkern.pipeline.run.request import GenerationRequest
    from ltxkern.pipeline.sampling.latents import Geometry
    from ltxkern.pipeline.work.folder import WorkFolder

DEMO_NOTES = {
    "demo": "The demo model knows coloured shapes that move and sound, on a plain background "
    f"({Path(__file__).parents[1] / 'demo/MODEL_CARD.md'}). It runs the very code of the real model, at a tiny size.",
    "demo-random": "This demo model has random weights: its pictures are coloured noise and its sound is hiss.",
}


ON_NAN = ("stop", "retry-fp32")


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
    work_dir.add_work_options(parser)
    progress.add_progress_options(parser)
    parser.add_argument(
        "-o", "--output", default="out.mp4", metavar="PATH", help=".mp4, .safetensors or a folder (default out.mp4)"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, tokens, evaluations and sigmas, then stop"
    )
    parser.add_argument(
        "--on-nan",
        default="stop",
        metavar="HOW",
        help="where a stage gives NaN or infinity: stop (default), or retry-fp32, which runs it again in fp32",
    )
    parser.add_argument("--no-plan", action="store_true", help="do not check beforehand that the run fits into memory")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, load, generate, write, verify what was written; on every rank where several were started."""
    with parallel.job(arguments) as job:
        return generate(arguments, job)


def generate(arguments: argparse.Namespace, job: parallel.Job) -> int:
    """The command on one rank of a job; only the lead prints and writes."""
    import torch

    from ltxkern.pipeline.results.atomic import output_kind, writable_output
    from ltxkern.pipeline.run.checks import require_all
    from ltxkern.pipeline.sampling.finite import NonFiniteError

    chosen, request = admission.read_options(
        arguments,
        lambda: _check_options(arguments),
        lambda: progress.check_options(arguments),
        lambda: progress.check_preview(arguments),
        lambda: work_dir.check_options(arguments, 1 if job.ranks is None else job.size),
    )
    if arguments.dry_run:
        if job.leads:
            print(describe(request, chosen.model.geometry))
        return 0
    size = result_bytes(request, chosen.model.geometry, arguments.output)
    checks: list[Callable[[], object]] = [lambda: writable_output(arguments.output, size)]
    if chosen.model.path is not None and not arguments.no_plan:
        checks.append(lambda: chosen.plan(request).check())
    require_all(*checks)
    if chosen.model.is_demo and job.leads:
        print(DEMO_NOTES[chosen.model.name], file=sys.stderr)
    with work_dir.kept(arguments, job) as work, progress.Shown(arguments, job.leads) as shown:
        try:
            shared = _generate(arguments, job, chosen, request, shown, work)
        except NonFiniteError as error:
            if arguments.on_nan == "stop" or chosen.dtype == torch.float32 or job.ranks or not error.finite_weights:
                raise
            print(f"ltxkern: {error}: trying again from {error.stage} on", file=sys.stderr)
            chosen = replace(chosen, dtype=torch.float32)
            if chosen.model.path is not None and not arguments.no_plan:
                chosen.plan(request).check()
            if work is not None:
                work.start_over(error.stage, dtype="fp32")
            shared = _generate(arguments, job, chosen, request, shown, work)
    job.finish()
    if job.leads:
        if not arguments.quiet:
            parallel.report_traffic(shared)
        shown.result(arguments.output, finished(Path(arguments.output), output_kind(arguments.output)))
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.on_nan not in ON_NAN:
        raise ValueError(f"on-nan must be one of {', '.join(ON_NAN)}, got {arguments.on_nan!r}")
    if not arguments.prompt or not arguments.prompt.strip():
        raise ValueError('prompt is missing: add --prompt "what the video shows"')


def _generate(
    arguments: argparse.Namespace,
    job: parallel.Job,
    chosen: options.ModelOptions,
    request: GenerationRequest,
    shown: progress.Shown,
    work: WorkFolder | None,
) -> CFGParallel | None:
    """Open the model, run the request and write the result; what the ranks exchanged."""
    from ltxkern.pipeline.results.atomic import output_kind

    how = "latents" if output_kind(arguments.output) == "latents" else "stream"
    with chosen.open() as pipeline:
        shared = job.share(pipeline, request, arguments.cfg_parallel_size, arguments.stage2_parallel)
        if shared is not None or job.leads:
            seen = progress.previews(arguments, pipeline, request) if job.leads else None
            output = pipeline.generate(request, output_type=how, callback=seen, progress=shown, work_dir=work)
        if job.leads:
            output.save(arguments.output, progress=shown.frames(request.num_frames))
    return shared


def result_bytes(request: GenerationRequest, geometry: Geometry, output: str) -> int:
    """About what the result takes on disk: latents exactly, PNG frames of noise at worst, an mp4 at a tenth of that."""
    from ltxkern.pipeline.results.atomic import output_kind

    last = request.stages(geometry)[-1]
    if output_kind(output) == "latents":
        return 4 * (math.prod(last.video.dims()) + math.prod(last.audio.dims()))
    frames = 3 * request.num_frames * request.height * request.width
    return frames if output_kind(output) == "frames" else frames // 10


def describe(request: GenerationRequest, geometry: Geometry) -> str:
    """The stages of a request and its guidance, as text."""
    guidance = request.guidance(geometry)
    lines = [
        f"pipeline {request.preset.name}, seed {request.seed}, {request.num_frames} frames at {request.frame_rate:g} fps"
    ]
    for image in request.images:
        lines.append(f"image {image.path} at frame {image.frame}, strength {image.strength:g}, crf {image.crf}")
    for stage in request.stages(geometry):
        lines += [
            f"{stage.name}: {stage.height}x{stage.width}, {stage.sampler}, {len(stage.sigmas) - 1} steps",
            f"  video latent {stage.video.dims()}, {stage.video.tokens} tokens",
            f"  audio latent {stage.audio.dims()}, {stage.audio.tokens} tokens",
            f"  {stage.evaluations} evaluations x {stage.branches} branches = {stage.forwards} forwards",
            "  sigmas " + " ".join(f"{sigma:.6g}" for sigma in stage.sigmas),
        ]
    lines.append(f"guidance video {guidance.video}")
    lines.append(f"guidance audio {guidance.audio}")
    return "\n".join(lines)


def finished(path: Path, kind: str) -> str:
    """The last line of a run: what was written, read back from the file."""
    if kind != "mp4":
        return str(path)
    from ltxkern.pipeline.results.probe import probe_mp4

    info = probe_mp4(path)
    sound = f"{info.audio_rate} Hz, {info.channels} channels" if info.audio_rate else "no sound"
    return f"{info.frames} frames, {info.width}x{info.height}, {float(info.fps):g} fps, {sound}\n{path}"
