"""Measurements that decide something, on a GPU: `python bench/deciding.py group-norm-kernels|pieces|attention|block|vae-tile`.

Whether channels-last GroupNorm is quicker in one launch or in two passes, what longer pieces of memory bring Triton's norms, which
attention serves which number of queries, where the time of a block goes, and in which layout the video decoder is quicker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import bench_dit
import bench_group_norm_silu
import bench_pixel_norm_silu
import ltxkern
from cases import DTYPES, Case, Suite, clone_args, count_bytes
from command_line import measured, parser, relaunch_warm, start_run
from harness import Run
from ltxkern.compiled import group_norm_silu as group_norm
from report import Record
from timing import CallTimer, interleave, summarise, synchronize

# Queries, keys, heads and width of a head: video on itself at both stages, sound on the video, sound on itself.
ATTENTIONS = ((8160, 8160, 32, 128), (32640, 32640, 32, 128), (126, 32640, 32, 64), (126, 126, 32, 64))
ATTENTIONS_ON_CPU = ((126, 126, 4, 16),)
# Latent frames, height and width of a tile of the official size.
TILE, TILE_ON_CPU = (8, 14, 24), (2, 2, 2)


def dtype_of(run: Run) -> str:
    """The model's; fp32 on a CPU."""
    return "bf16" if run.device.type == "cuda" else "fp32"


def timed(run: Run, op: str, case: str, shape: Sequence[int], calls: dict[str, Callable[[], Any]], **more: Any) -> None:
    """Rows of several ways to do one thing, each in turn; one that torch refuses is left out with its words."""
    timers: dict[str, CallTimer] = {}
    for name, call in calls.items():
        try:
            timers[name] = CallTimer(call, [()], run.device, run.settings)
        except RuntimeError as error:
            run.skip(op, case, name, str(error).splitlines()[0])
    samples = interleave(timers, run.settings.rounds, run.note_clocks)
    for name, values in samples.items():
        statistics = summarise(values).fields()
        run.records.append(
            Record(op, case, list(shape), dtype_of(run), name, **statistics, timer=timers[name].kind, **more)
        )
        run.keep()


def attention(run: Run) -> None:
    """The backends of torch's attention, and flash-attn where it is installed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = DTYPES[dtype_of(run)]
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    kinds |= {"memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    for queries, keys, heads, width in ATTENTIONS if run.device.type == "cuda" else ATTENTIONS_ON_CPU:
        q = torch.randn(1, heads, queries, width, device=run.device, dtype=dtype)
        k, v = torch.randn(2, 1, heads, keys, width, device=run.device, dtype=dtype).unbind()

        def by(kind: Any, q: Any = q, k: Any = k, v: Any = v) -> Any:
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        # The plain composition holds all scores.
        fits = heads * queries * keys * 6 < 4 << 30
        calls = {name: functools.partial(by, kind) for name, kind in kinds.items() if name != "math" or fits}
        try:
            from flash_attn import flash_attn_func

            calls["flash-attn"] = functools.partial(flash_attn_func, *(t.transpose(1, 2) for t in (q, k, v)))
        except ImportError as error:
            run.skip("attention", f"{queries}x{keys}", "flash-attn", str(error))
        flops, moved = 4 * queries * keys * heads * width, count_bytes([q, k, v, q])
        timed(run, "attention", f"{queries}x{keys}", q.shape, calls, flops=flops, bytes=moved)


@contextlib.contextmanager
def forced(**changed: Any) -> Iterator[None]:
    """group_norm_silu chooses its kernel by changed rules, and keeps nothing of it afterwards."""
    fresh = {name: functools.lru_cache(inspect.unwrap(getattr(group_norm, name))) for name in ("_chosen", "program")}
    with mock.patch.multiple(group_norm, **changed, **fresh):
        yield


# What of the choice is changed, so that it falls on each kernel.
KERNELS: dict[str, dict[str, Any]] = {"one launch": {}, "two passes": {"waits_on_chip": lambda case: False}}


def forms(
    run: Run,
    suite: Suite,
    case: Case,
    tier: str,
    rules: dict[str, Callable[[], contextlib.AbstractContextManager[None]]],
) -> None:
    """Rows of one call of a tier under each rule; a result that differs from that of the tier's own choice is a failure."""
    call = suite.prepare(case, DTYPES["bf16"], run.device, torch.Generator(run.device).manual_seed(0))
    with ltxkern.use_backend(tier):
        wanted = call.op(*clone_args(call.args))
        moved = count_bytes(call.args) + count_bytes([wanted])
        for name, rule in rules.items():
            with rule():
                try:
                    same = torch.allclose(call.op(*call.args).float(), wanted.float(), rtol=2e-2, atol=2e-2)
                except RuntimeError as error:
                    run.skip(suite.op, case.name, name, str(error).splitlines()[0])
                    continue
                if not same:
                    run.fail(suite.op, case.name, f"{name}: another result")
                    continue
                timed(run, suite.op, case.name, case.shape, {name: functools.partial(call.op, *call.args)}, bytes=moved)


def missing(run: Run, op: str, tier: str) -> bool:
    """Whether a tier is not there, which the run then says."""
    if tier in ltxkern.backends():
        return False
    run.skip(op, "all cases", "", str(ltxkern.capabilities()[op][tier]))
    return True


def group_norm_kernels(run: Run) -> None:
    """Both forms of a channels-last call, at each such production shape; contiguous ones have two passes alone."""
    suite = bench_group_norm_silu.SUITE
    if missing(run, suite.op, "cuda"):
        return
    rules = {name: functools.partial(forced, **rule) for name, rule in KERNELS.items()}
    for case in suite.cases:
        if case.options.get("channels_last"):
            forms(run, suite, case, "cuda", rules)


# Of Triton's norms that were measured further from their prediction than others, by op: the cases, and limits under which a program
# takes longer pieces of memory.
PIECES: dict[str, tuple[tuple[str, ...], dict[str, dict[str, int]]]] = {
    "group_norm_silu": (
        ("ltx2_upsampler_post_720p_channels_last",),
        {
            "256 bytes of a position": {},
            "512 bytes of a position": {"columns": 256, "partials": 512},
            "1024 bytes of a position": {"columns": 512, "partials": 1024},
        },
    ),
    "pixel_norm_silu": (
        ("vae_frame_128", "vae_frame_256"),
        {"16 KiB a program": {}, "32 KiB a program": {"tile": 16384}, "64 KiB a program": {"tile": 32768}},
    ),
}


@contextlib.contextmanager
def limited(op: str, **changed: int) -> Iterator[None]:
    """Triton's launches of an op have other limits."""
    of_triton = importlib.import_module(f"ltxkern.triton.{op}")
    with mock.patch.object(of_triton, "LIMITS", dataclasses.replace(of_triton.LIMITS, **changed)):
        yield


def pieces(run: Run) -> None:
    """Triton's norms by the length of the pieces of memory that a program takes."""
    for suite in (bench_group_norm_silu.SUITE, bench_pixel_norm_silu.SUITE):
        if missing(run, suite.op, "triton"):
            continue
        names, limits = PIECES[suite.op]
        rules = {name: functools.partial(limited, suite.op, **changed) for name, changed in limits.items()}
        for case in suite.cases:
            if case.name in names:
                forms(run, suite, case, "triton", rules)


@torch.no_grad()
def block(run: Run) -> None:
    """One block of the transformer under the profiler: a row a kernel, the longest first."""
    on_gpu = run.device.type == "cuda"
    case = next(case for case in bench_dit.CASES if case.name == ("stage2" if on_gpu else "small"))
    dtype = dtype_of(run)
    model, _ = bench_dit.build(case, 1, DTYPES[dtype], run.device)
    inputs = bench_dit.inputs_of(case, model, DTYPES[dtype], run.device)

    def forward() -> Any:
        return bench_dit.predict_velocity(model, inputs.video, inputs.audio)

    timed(run, "block", case.name, case.shape, {"one block": forward})
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        forward()
        synchronize(run.device)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda event: -getattr(event, own))
    common = {"op": "block", "case": case.name, "shape": list(case.shape), "dtype": dtype}
    for event in rows[:60]:
        if total := float(getattr(event, own)):
            times = dict.fromkeys(("median_us", "min_us", "p20_us", "p80_us"), total)
            facts = {"samples": 1, "timer": "profiler", "note": f"{event.count} calls"}
            run.records.append(Record(**common, provider=event.key[:160], **times, **facts))


@torch.no_grad()
def vae_tile(run: Run) -> None:
    """One tile of the video decoder with its activations contiguous, and channels-last."""
    from ltxkern.pipeline.files.demo import DEMO_CONFIGS
    from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS, build

    on_gpu = run.device.type == "cuda"
    config = (PRODUCTION_CONFIGS if on_gpu else DEMO_CONFIGS)["video_vae"]
    dtype, tile = DTYPES[dtype_of(run)], TILE if on_gpu else TILE_ON_CPU
    vae = build("video_vae", config, parts=("decoder",), device=run.device).to(dtype)
    latent = torch.randn(1, config["latent_channels"], *tile, device=run.device, dtype=dtype)
    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last_3d}
    # Weights in one layout at a time; so these do not take turns.
    for name, layout in layouts.items():
        decoder, x = vae.decoder.to(memory_format=layout), latent.contiguous(memory_format=layout)
        timed(run, "vae_tile", "x".join(map(str, tile)), latent.shape, {name: functools.partial(decoder, x)})


PARTS: dict[str, Callable[[Run], None]] = {
    "group-norm-kernels": group_norm_kernels,
    "pieces": pieces,
    "attention": attention,
    "block": block,
    "vae-tile": vae_tile,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser("Measurements that decide something.")
    options.add_argument("part", choices=PARTS)
    parsed = options.parse_args(arguments)
    relaunch_warm(parsed)
    run = start_run(parsed)

    def measure() -> None:
        try:
            PARTS[parsed.part](run)
        except torch.OutOfMemoryError as error:
            run.skip(parsed.part, "", "", f"out of memory: {str(error).splitlines()[0]}")

    return measured(run, parsed, measure)


if __name__ == "__main__":
    sys.exit(main())
