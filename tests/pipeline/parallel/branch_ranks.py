"""Runs the CFG-parallel cases: one process for the reference, then 2, 3 and 5 ranks, forked from one that has everything loaded.

`python -m tests.pipeline.parallel.branch_ranks FOLDER` writes one .safetensors per case for the reference, and results.json.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files.demo import build_demo, demo_distilled_lora
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.parallel.by_branch import CFGParallel
from ltxkern.pipeline.parallel.ranks import Ranks
from ltxkern.pipeline.sampling.guidance import GuidanceScales

DEGREES = (2, 3, 5)
SIZE = {"height": 64, "width": 128, "num_frames": 9, "steps": 2, "output_type": "latents"}
STG = GuidanceScales(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(1,))
PAIR = GuidanceScales(cfg=4.0)


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Name to the arguments of a call; "dtype" apart."""
    picture = folder / "picture.png"
    if not picture.exists():
        ramp = torch.arange(64 * 128 * 3, dtype=torch.int64).reshape(64, 128, 3) * 7 % 256
        Image.fromarray(ramp.to(torch.uint8).numpy()).save(picture)
    first = {"prompt": "a red kite", **SIZE}
    return {
        "t2v": first,
        "i2v": {**first, "images": [f"{picture}:0:0.8", f"{picture}:8:1.0"]},
        "stg": {**first, "video_guidance": STG, "audio_guidance": STG},
        "pair": {**first, "video_guidance": PAIR, "audio_guidance": PAIR},
        "batch": {**first, "prompt": ["a red kite", "rain on a tin roof"]},
        "bf16": {**first, "dtype": torch.bfloat16},
    }


def generate(models: Mapping[torch.dtype, Components], arguments: Mapping[str, Any], share: Any = None) -> Any:
    """One call on a fresh pipeline."""
    given = dict(arguments)
    components = models[given.pop("dtype", torch.float32)]
    with HQTwoStagePipeline(components, distilled_lora=demo_distilled_lora()) as pipeline:
        if share is not None:
            pipeline.share_branches(share)
        return pipeline(**given)


def reference(models: Mapping[torch.dtype, Components], folder: Path) -> None:
    """Every case in this one process."""
    for name, arguments in cases(folder).items():
        latents = generate(models, arguments).latents
        save_file({key: value.clone() for key, value in latents.items()}, folder / f"{name}.safetensors")


@contextlib.contextmanager
def joined(folder: Path, port: int, rank: int, size: int) -> Iterator[tuple[Ranks, dict[str, Any]]]:
    """The ranks of a job, and the results of this one, which go into its file."""
    faulthandler.dump_traceback_later(90, exit=True)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    results: dict[str, Any] = {}
    with Ranks.join(store, rank, size, backend="gloo") as ranks:
        yield ranks, results
        (folder / f"{size}-{rank}.json").write_text(json.dumps(results))
        ranks.finish()
    dist.destroy_process_group()


def rank_main(models: Mapping[torch.dtype, Components], folder: Path, port: int, rank: int, size: int) -> None:
    """Every case on one of several ranks; rank 0 compares with the reference."""
    with joined(folder, port, rank, size) as (ranks, results):
        for name, arguments in cases(folder).items():
            share = CFGParallel(ranks=ranks)
            latents = generate(models, arguments, share).latents
            expected = load_file(folder / f"{name}.safetensors")
            results[name] = {
                "equal": {key: torch.equal(value, expected[key]) for key, value in latents.items()},
                "evaluations": share.traffic.evaluations,
                "collectives": share.traffic.collectives,
                "received": share.traffic.received,
            }


def forked(target: Callable[..., None], *arguments: Any, count: int = 1) -> list[int | None]:
    """Exit codes of `count` forks of `target(*arguments, rank, count)` (without the last two where count is 1)."""
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(count):
        extra = (rank, count) if count > 1 else ()
        processes.append(context.Process(target=target, args=(*arguments, *extra)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def host_store(sender: Any) -> None:
    """What a launcher does: keep the store alive in a process that is no rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sender.send(store.port)
    time.sleep(3600)


@contextlib.contextmanager
def launcher() -> Iterator[int]:
    """The port of a store. The parent itself must stay without threads, or its forks may inherit a held lock."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=host_store, args=(sender,), daemon=True)
    process.start()
    try:
        yield receiver.recv()
    finally:
        process.kill()
        process.join()


def main(folder: Path) -> None:
    """All degrees, one start of ranks each."""
    torch.set_num_threads(1)
    models = {dtype: build_demo(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = {}
    started = time.monotonic()
    codes: dict[str, list[int | None]] = {"1": forked(reference, models, folder)}
    seconds["1"] = time.monotonic() - started
    for degree in DEGREES:
        started = time.monotonic()
        with launcher() as port:
            codes[str(degree)] = forked(rank_main, models, folder, port, count=degree)
        seconds[str(degree)] = time.monotonic() - started
    (folder / "results.json").write_text(json.dumps({"exit_codes": codes, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
