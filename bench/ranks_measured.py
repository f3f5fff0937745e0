"""What several ranks exchange and gain, measured: `torchrun --nproc-per-node N bench/ranks_measured.py [--exchange]`.

Without --exchange: an evaluation of stage 1 with its branches shared out, and one of stage 2 with its tokens shared out, each
against the same rank doing all of it (demo model). On one rank (no torchrun needed) it compares `run_cfg_parallel` on a group of
one with the plain denoiser: the overhead of degree 1.

With --exchange: the collectives of one transformer block at the published model's stage 2 (32640 tokens, 32 heads of 128 and of 64,
126 audio tokens), with an attention that does nothing; bytes counted where they enter and leave the collectives.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from cfg_scaling import contexts, options, states
from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.parallel.by_branch import CFGParallel, run_cfg_parallel
from ltxkern.pipeline.parallel.by_token import SequenceParallel, TokenShards, even_parts
from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.pipeline.run.stage import BranchForward
from ltxkern.pipeline.sampling.guidance import HQ_GUIDANCE, GuidedDenoiser, MultiModalPolicy, SingleBranchPolicy
from machine import best_device
from timing import timed

TOKENS, AUDIO_TOKENS, HEADS, WIDTH, AUDIO_WIDTH, BLOCKS, CHANNELS = 32640, 126, 32, 128, 64, 48, 128
FORWARDS = 7


def join_ranks(device: str) -> None:
    """The process group: torchrun's, or one rank alone."""
    backend = "nccl" if device == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def say(text: str) -> None:
    """Rank 0 prints."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def medians(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each work over `rounds`, in turn; every rank starts a call together."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 2):
        for name, work in works.items():
            dist.barrier()
            seconds = timed(work, best_device())
            if index >= 2:
                taken[name].append(seconds)
    return {name: median(seconds) for name, seconds in taken.items()}


def evaluations(given: argparse.Namespace) -> None:
    """Seconds of an evaluation of each stage, shared out and not."""
    geometry = FoundModel.of("demo-random").geometry
    request = GenerationRequest("x", height=given.height, width=given.width, num_frames=given.num_frames)
    stages = request.stages(geometry)
    transformer = build_demo(device=given.device).transformer
    guided = MultiModalPolicy.build(HQ_GUIDANCE, contexts(0, given.device), contexts(1, given.device))
    alone = SingleBranchPolicy(guided.branches[:1])
    first, second = (states(stage, given.device) for stage in stages)
    forwards = [BranchForward(transformer, each, False) for each in (first, second)]
    share = CFGParallel()
    sequence = SequenceParallel()
    plain = GuidedDenoiser(guided, forwards[0])
    shared = run_cfg_parallel(guided, forwards[0], parallel=share)
    latents = [{name: state.latent for name, state in each.items()} for each in (first, second)]
    works: dict[str, Callable[[], object]] = {
        "stage 1 undivided": lambda: plain(latents[0], 0.7, step=0, substep=False),
        "stage 1 by branches": lambda: shared(latents[0], 0.7, step=0, substep=False),
    }
    if dist.get_world_size() > 1:
        by_tokens = sequence.forward(forwards[1])
        works["stage 2 undivided"] = lambda: forwards[1](latents[1], 0.7, alone.branches[0])
        works["stage 2 by tokens"] = lambda: by_tokens(latents[1], 0.7, alone.branches[0])
    found = medians(works, given.rounds)
    say(f"{dist.get_world_size()} ranks, {stages[0].video.tokens} and {stages[1].video.tokens} video tokens")
    for name, seconds in found.items():
        base = found[name[:8] + "undivided"]
        say(f"| {name} | {seconds * 1e3:.3f} ms | {base / seconds:.3f} |")
    say(f"stage 1: {share.traffic}\nstage 2: {sequence.traffic}")


def exchange(given: argparse.Namespace) -> None:
    """Bytes and seconds of one block's collectives at the published shapes, and of a forward and a stage from them."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    sequence = SequenceParallel()
    shards = TokenShards(sequence, even_parts(TOKENS, ranks))
    own = shards.tokens[rank]

    def empty(tokens: int, width: int) -> Tensor:
        return torch.zeros((1, tokens, HEADS, width), dtype=torch.bfloat16, device=given.device)

    video, cross, sound = empty(own, WIDTH), empty(own, AUDIO_WIDTH), empty(AUDIO_TOKENS, AUDIO_WIDTH)
    parts: dict[str, Callable[[], object]] = {
        "video self-attention": lambda: shards.self_attention(video, video, video, lambda q, k, v: v),
        "video to audio": lambda: shards.attention_from_outside(sound, cross, cross, lambda q, k, v: q),
        "velocity": lambda: shards.join(video[:, :, 0, :CHANNELS]),
    }
    total = 0
    for name, part in parts.items():
        before = replace(sequence.traffic)
        seconds = timed(part, best_device())
        sent, received = sequence.traffic.sent - before.sent, sequence.traffic.received - before.received
        times = 1 if name == "velocity" else BLOCKS
        total += times * received
        say(
            f"| {ranks} | {name} | {sent} | {received} | {times * received / 1e9:.3f} GB a forward | "
            f"{seconds * 1e3:.1f} ms with a cold start |"
        )
    say(
        f"| {ranks} | {total / 1e9:.2f} GB received per forward and rank | {FORWARDS * total / 1e9:.1f} GB in stage 2 |"
    )


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--exchange", action="store_true", help="the collectives alone, at the published shapes")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    join_ranks(given.device)
    try:
        with torch.no_grad():
            (exchange if given.exchange else evaluations)(given)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
