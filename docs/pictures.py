"""Draws the pictures of the generator in this folder: `python docs/pictures.py`. Shapes and sigmas come from the code."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ltxkern.pipeline.run.request import GenerationRequest, Stage

FOLDER = Path(__file__).parent
BLUE, GREEN, GREY, ORANGE = "#dbe9f6", "#dff0d8", "#eeeeee", "#fde8cf"


def box(axes: plt.Axes, x: float, y: float, text: str, colour: str, width: float = 2.3, height: float = 0.95) -> None:
    axes.add_patch(
        plt.Rectangle(
            (x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor="#555555", linewidth=0.8
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=6.3)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#333333", "linewidth": 0.9})
    if text:
        axes.text(
            (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1, text, fontsize=6.5, ha="center", color="#333333"
        )


def stage_text(stage: Stage, sampler: str, note: str) -> str:
    return (
        f"{stage.name}: {stage.width}x{stage.height}\n{stage.video.tokens} video + {stage.audio.tokens} audio tokens\n"
        f"{sampler}, {stage.evaluations} evaluations\nx {stage.branches} = {stage.forwards} forwards\n{note}"
    )


def draw_flow(request: GenerationRequest) -> None:
    """The two stages at the published working point."""
    first, second = request.stages()
    figure, axes = plt.subplots(figsize=(12.5, 4.1))
    box(axes, 0.2, 2.0, "prompt and\nnegative prompt", GREY, 1.7)
    box(axes, 0.2, 0.4, "pictures\n(any frame, strength)", GREY, 1.7)
    box(axes, 2.5, 2.0, "Gemma 3, 49 hidden states\nprojections, connectors", BLUE, 2.2)
    box(axes, 2.5, 0.4, "H.264 re-compression\nVAE encoder", BLUE, 2.2)
    box(axes, 5.4, 1.2, stage_text(first, "res2s", "distilled LoRA 0.25"), GREEN, 2.7, 1.7)
    box(axes, 8.3, 1.2, "latent upsampler x2", BLUE, 1.9)
    box(axes, 11.1, 1.2, stage_text(second, "res2s", "distilled LoRA 0.5"), GREEN, 2.7, 1.7)
    box(axes, 13.9, 1.2, "video VAE\n(tiles)", BLUE, 1.7)
    box(axes, 11.1, -0.8, "audio VAE, vocoder,\nbandwidth extension (fp32)", BLUE, 2.5)
    box(axes, 13.9, -0.8, "mp4: H.264 + AAC\n48 kHz stereo", ORANGE, 1.9)
    for start, end in (
        ((1.05, 2.0), (1.4, 2.0)), ((1.05, 0.4), (1.4, 0.4)), ((3.6, 2.0), (4.05, 1.6)), ((3.6, 0.4), (4.05, 0.8)),
        ((6.75, 1.2), (7.35, 1.2)), ((9.25, 1.2), (9.75, 1.2)), ((12.45, 1.2), (13.05, 1.2)), ((13.9, 0.72), (13.9, -0.32)),
        ((12.35, -0.8), (12.95, -0.8)),
    ):  # fmt: skip
        arrow(axes, start, end)
    axes.plot([5.4, 5.4], [0.35, -0.8], color="#333333", linewidth=0.9)
    arrow(axes, (5.4, -0.8), (9.85, -0.8), "audio latent of stage 1")
    axes.set_xlim(-0.8, 15.0)
    axes.set_ylim(-1.5, 2.8)
    axes.axis("off")
    axes.set_title(
        f"HQ two-stage generation, {request.width}x{request.height}, {request.num_frames} frames at {request.frame_rate:g} fps",
        fontsize=9,
    )
    figure.savefig(FOLDER / "two_stage.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_schedule(request: GenerationRequest) -> None:
    """Noise levels of both stages, with every evaluation that the sampler makes."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, gridspec_kw={"width_ratios": [3, 1.3]})
    for axes, stage in zip(panels, request.stages(), strict=True):
        sigmas = [*stage.sigmas[:-1], 0.0011]
        middles = [(a * b) ** 0.5 for a, b in pairwise(sigmas)]
        axes.plot(range(len(sigmas)), sigmas, "o-", color="#2b6ca3", markersize=4, linewidth=1, label="step")
        axes.plot(
            [i + 0.5 for i in range(len(middles))], middles, "s", color="#d07c1f", markersize=3.5, label="midpoint"
        )
        axes.set_title(f"{stage.name}: {stage.evaluations} evaluations", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("sigma", fontsize=8)
    panels[0].legend(fontsize=7, loc="lower left")
    figure.savefig(FOLDER / "schedule.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


# A room may import rooms of lower bands. Within a band imports go to the right, if at all: memory and results know nothing of one
# another, nor do compiled and triton. Group and colour of each band, and its rooms with what they hold.
BANDS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "",
        GREY,
        [("commands", "generate, batch, serve,\nplan, doctor, compare"), ("service", "queue, worker,\nHTTP, page")],
    ),
    ("pipeline", GREEN, [("generator", "HQTwoStagePipeline")]),
    ("pipeline", GREEN, [("planning", "memory and time\nbefore loading"), ("run", "request, prompts,\nstages")]),
    ("pipeline", GREEN, [("work", "what a run has done,\nkept to go on")]),
    (
        "pipeline",
        GREEN,
        [
            ("memory", "LoRA phases,\nwhere weights live"),
            ("results", "mp4, PNG,\nlatents"),
            ("files", "checkpoints, LoRAs,\nhub, demo"),
            ("model", "transformer, text,\ndecoders"),
            ("parallel", "ranks by branch\nand by token"),
        ],
    ),
    ("pipeline", GREEN, [("sampling", "schedule, res2s, Euler,\nguidance, latent shapes")]),
    (
        "",
        BLUE,
        [("patch, nn", "fused ops in modules\nof other stacks"), ("ops", "public function, checks,\ntorch reference")],
    ),
    ("", BLUE, [("dispatch", "which backend serves")]),
    ("", BLUE, [("compiled", "launches as data,\nprograms, NVRTC"), ("triton", "Triton kernels\nand launchers")]),
    ("", ORANGE, [("csrc", "CUDA kernels, C++ CPU kernels,\nthe extension module")]),
]


def draw_rooms() -> None:
    """The rooms of the package in bands; imports go down only."""
    figure, axes = plt.subplots(figsize=(9.2, 8.4))
    step, width = 1.25, 2.35
    inside = [row for row, (group, _, _) in enumerate(BANDS) if group == "pipeline"]
    top, bottom = -inside[0] * step + 0.58, -inside[-1] * step - 0.58
    axes.add_patch(
        plt.Rectangle((-6.6, bottom), 13.2, top - bottom, facecolor="#f7fbf5", edgecolor="#9ab88f", linewidth=0.8)
    )
    axes.text(-6.45, top - 0.12, "ltxkern/pipeline", fontsize=8, color="#557a48", va="top")
    for row, (_, colour, rooms) in enumerate(BANDS):
        for column, (name, content) in enumerate(rooms):
            x, y = (column - (len(rooms) - 1) / 2) * 2.6, -row * step
            wide = width if len(rooms) > 1 else 3.0
            box(axes, x, y, "", colour, wide, 0.85)
            axes.text(x, y + 0.24, name, ha="center", va="center", fontsize=8, fontweight="bold")
            axes.text(x, y - 0.13, content, ha="center", va="center", fontsize=6.5)
        if row:
            arrow(axes, (0, -(row - 1) * step - 0.44), (0, -row * step + 0.44))
    axes.text(
        6.6,
        -(len(BANDS) - 1) * step,
        "imports go down, and within a row\nto the right, if at all",
        ha="right",
        va="center",
        fontsize=7.5,
    )
    axes.set_xlim(-6.8, 6.8)
    axes.set_ylim(-(len(BANDS) - 1) * step - 0.6, 0.6)
    axes.axis("off")
    figure.savefig(FOLDER / "rooms.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw_rooms()
    published = GenerationRequest(prompt="a")
    draw_flow(published)
    draw_schedule(published)
