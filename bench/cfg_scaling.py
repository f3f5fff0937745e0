"""Times one evaluation's parts with the demo model and simulates CFG parallel on 1 to 4 ranks from them.

`python bench/cfg_scaling.py [--height H --width W --num-frames F] [--link GB/s] [--picture FILE]`. The forwards of the branches run
alone, one after the other, so that no two disturb each other; the collective is counted in bytes and divided by --link.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.parallel.by_branch import dispatch_branches
from ltxkern.pipeline.run.request import GenerationRequest, Stage, find_preset, scale_blocks
from ltxkern.pipeline.run.stage import BranchForward
from ltxkern.pipeline.sampling.guidance import (
    HQ_GUIDANCE,
    TWO_STAGE_GUIDANCE,
    CFGPolicy,
    MultiModalPolicy,
    SingleBranchPolicy,
)
from ltxkern.pipeline.sampling.latents import LatentState
from machine import best_device
from timing import timed

RANKS = (1, 2, 3, 4)
HEADER = 512


@dataclass(frozen=True)
class Costs:
    """Seconds of one evaluation's parts: each branch's forward, the combination, packing and unpacking; bytes of a prediction."""

    names: list[str]
    branches: list[float]
    combine: float
    exchange: float
    prediction: int


@dataclass(frozen=True)
class Row:
    """One degree: seconds of an evaluation, of stage 1 and of both stages, and bytes that each rank receives an evaluation."""

    ranks: int
    evaluation: float
    stage1: float
    total: float
    received: int


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Fastest of `repeats` calls after two warm ones: other work on the machine only adds."""
    return min([timed(work, best_device()) for _ in range(2 + repeats)][2:])


def options(description: str | None) -> argparse.ArgumentParser:
    """What a run's size and device are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num-frames", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def states(stage: Stage, device: str) -> dict[str, LatentState]:
    """Noised states of a stage."""
    generator = torch.Generator(device).manual_seed(0)
    place = {"fps": 24.0, "dtype": torch.float32, "device": device}
    both = {"video": LatentState.create(stage.video, **place), "audio": LatentState.create(stage.audio, **place)}
    return {name: state.noise(1.0, generator=generator) for name, state in both.items()}


def contexts(seed: int, device: str) -> dict[str, Tensor]:
    """Text of 256 rows in the demo's widths."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = {"video_context": (1, 256, 64), "audio_context": (1, 256, 32)}
    return {name: torch.randn(size, generator=generator, device=device) for name, size in sizes.items()}


def measure(stage: Stage, policy: CFGPolicy, device: str, repeats: int) -> Costs:
    """The parts of one evaluation of a stage."""
    given = states(stage, device)
    forward = BranchForward(build_demo(device=device).transformer, given, False)
    latents = {name: state.latent for name, state in given.items()}
    times = [seconds(lambda branch=branch: forward(latents, 0.7, branch), repeats) for branch in policy.branches]
    predictions = {branch.name: forward(latents, 0.7, branch) for branch in policy.branches}
    size = sum(-(-tensor.nbytes // 256) * 256 for tensor in latents.values())
    buffer = torch.empty(HEADER + size, dtype=torch.uint8, device=device)

    def pack() -> None:
        for prediction in predictions.values():
            for tensor in prediction.values():
                buffer[HEADER : HEADER + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        buffer[:HEADER].cpu()

    combine = seconds(lambda: policy.combine(predictions), repeats)
    return Costs([branch.name for branch in policy.branches], times, combine, seconds(pack, repeats), size)


def simulate(first: Costs, second: Costs, stages: list[Stage], link: float) -> list[Row]:
    """One row per degree: the slowest rank's forwards, the collective, the serial combination; stage 2 on rank 0."""
    rows = []
    for ranks in RANKS:
        placed = dispatch_branches(len(first.branches), ranks, first.branches)
        slowest = max(sum(first.branches[index] for index in indices) for indices in placed)
        slots = max(len(indices) for indices in placed)
        received = (ranks - 1) * (HEADER + slots * first.prediction)
        exchange = 0.0 if ranks == 1 else first.exchange + received / (link * 1e9)
        evaluation = slowest + first.combine + exchange
        stage1 = stages[0].evaluations * evaluation
        stage2 = stages[1].evaluations * (second.branches[0] + second.combine) if len(stages) > 1 else 0.0
        rows.append(Row(ranks, evaluation, stage1, stage1 + stage2, received))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| ranks | evaluation | stage 1 | speed-up of stage 1 | both stages | speed-up | received per rank and evaluation |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.ranks} | {row.evaluation * 1e3:.1f} ms | {row.stage1:.2f} s | {rows[0].stage1 / row.stage1:.2f} | "
            f"{row.total:.2f} s | {rows[0].total / row.total:.2f} | {row.received / 1e3:.1f} kB |"
        )
    return "\n".join(lines)


def draw(path: str, results: dict[str, tuple[Costs, list[Row]]], machine: str) -> None:
    """Who runs which branch: one bar a rank, for each degree."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"cond": "#4c78a8", "neg": "#f58518", "perturbed": "#b279a2", "modality": "#54a24b"}
    figure, every = plt.subplots(1, len(results), figsize=(10, 3.6), sharey=True)
    for axes, (name, (costs, rows)) in zip(every, results.items(), strict=True):
        y, labels = 0.0, []
        for row in rows:
            placed = dispatch_branches(len(costs.branches), row.ranks, costs.branches)
            for rank, indices in enumerate(placed):
                left = 0.0
                for index in indices:
                    width, colour = costs.branches[index] * 1e3, colours[costs.names[index]]
                    axes.barh(y, width, left=left, color=colour, edgecolor="white", height=0.8)
                    left += width
                labels.append((y, f"{rank} of {row.ranks}"))
                y += 1
            axes.plot([row.evaluation * 1e3] * 2, [y - len(placed) - 0.5, y - 0.5], color="black", linewidth=1)
            y += 0.6
        axes.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=7)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("ms of one evaluation; black line: its end", fontsize=8)
        axes.invert_yaxis()
    every[0].set_ylabel("rank")
    boxes = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(boxes, list(colours), ncol=4, fontsize=8, loc="lower center")
    figure.suptitle(f"Branches on ranks, simulated from forwards measured on {machine}", fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, simulate, print."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--link", type=float, default=10.0, help="GB/s that a rank receives (default 10)")
    parser.add_argument("--machine", default="this machine", help="named in the picture")
    parser.add_argument("--picture")
    given = parser.parse_args()
    geometry = FoundModel.of("demo-random").geometry
    results = {}
    for preset, guidance in (("hq", HQ_GUIDANCE), ("two-stage", TWO_STAGE_GUIDANCE)):
        moved = type(guidance)(*(scale_blocks(scales, geometry.blocks) for scales in (guidance.video, guidance.audio)))
        policy = MultiModalPolicy.build(moved, contexts(0, given.device), contexts(1, given.device))
        size = {"height": given.height, "width": given.width, "num_frames": given.num_frames}
        stages = GenerationRequest("x", preset=find_preset(preset), **size).stages(geometry)
        first = measure(stages[0], policy, given.device, given.repeats)
        alone = SingleBranchPolicy(policy.branches[:1])
        second = measure(stages[1], alone, given.device, given.repeats)
        rows = simulate(first, second, stages, given.link)
        times = ", ".join(f"{n} {cost * 1e3:.1f}" for n, cost in zip(first.names, first.branches, strict=True))
        print(
            f"{preset}: {stages[0].video.tokens} and {stages[1].video.tokens} video tokens, forwards in ms: {times}; "
            f"stage 2 {second.branches[0] * 1e3:.1f}; combine {first.combine * 1e3:.2f}, exchange {first.exchange * 1e3:.3f}"
        )
        print(table(rows))
        results[f"{preset}, {len(policy.branches)} branches"] = (first, rows)
    if given.picture:
        draw(given.picture, results, given.machine)


if __name__ == "__main__":
    main()
