"""Trains the video VAE on windows of clips: mean squared error first, small noise on the latents later."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.demo_model.configuration import plain
from tools.demo_model.judge import Clip, judge, scores
from tools.demo_model.muon import Muon
from tools.demo_model.training import Part, mixed_precision, seeded
from tools.demo_model.world import Scene, Window, draw_scene, render_video, track

# Frames of the demo: full size and length; half of it is what the first stage makes.
HEIGHT, WIDTH, FRAMES = 256, 384, 49


@torch.no_grad()
def start_plainly(vae: Any) -> None:
    """Weights of a VAE that averages going down and repeats going up, with a little of everything else.

    Residual blocks start as identities, and all filters of one pixel-shuffle group alike, so that the first picture has no
    checkerboard: the mean of a block gets through from the first step, where random weights need hundreds to find it.
    """
    for name, module in vae.named_modules():
        if name.endswith(".conv2"):
            module.conv.weight.zero_()
            module.conv.bias.zero_()
    decoder = vae.decoder
    groups = [(block.upsamplers[0].conv.conv, math.prod(block.upsamplers[0].stride)) for block in decoder.up_blocks]
    for convolution, count in (*groups, (decoder.conv_out.conv, decoder.patch_size**2)):
        for parameter in (convolution.weight, convolution.bias):
            parameter.copy_(parameter[::count].repeat_interleave(count, 0))
    for convolution, count in groups:
        convolution.weight.mul_(0.3)
        outputs = convolution.out_channels // count
        share = convolution.in_channels / outputs
        for source in range(convolution.in_channels):
            first = source % outputs * count
            convolution.weight[first : first + count, source, 1, 1, 1] += 1 / math.sqrt(share)


def draw_window(draws: Random, scene: Scene, size: tuple[int, int, int], window: tuple[int, int, int]) -> Window:
    """A part of a clip of a size (frames, height, width), mostly at the edge of a shape."""
    frames, height, width = size
    count, rows, columns = window
    start = draws.choice((0, draws.randrange(frames - count + 1)))
    shape = draws.choice(scene.shapes)
    time = torch.tensor([(start + draws.randrange(count)) / (frames - 1)])
    x, y, radius = (float(value[0]) for value in track(shape, time, width / height))
    angle, reach = draws.uniform(0, 2 * math.pi), draws.uniform(0.3, 1.3) * radius
    top = round((y + reach * math.sin(angle)) * height) - rows // 2
    left = round((x + reach * math.cos(angle)) * height) - columns // 2
    if draws.random() < 0.1:
        top, left = draws.randrange(height), draws.randrange(width)
    return Window(min(max(top, 0), height - rows), min(max(left, 0), width - columns), rows, columns, start, count)


def draw_batch(draws: Random, count: int, window: tuple[int, int, int]) -> Tensor:
    """Windows of scenes at both sizes, (N, 3, F, H, W) in [-1, 1]."""
    clips = []
    for _ in range(count):
        half = draws.random() < 0.5
        size = (FRAMES, HEIGHT // 2, WIDTH // 2) if half else (FRAMES, HEIGHT, WIDTH)
        scene = draw_scene(draws)
        part = draw_window(draws, scene, size, window)
        clips.append(render_video(scene, size[1], size[2], size[0], part).transpose(0, 1))
    return torch.stack(clips)


def encode(vae: Any, clips: Tensor) -> Tensor:
    """Means of the latents, not normalised, (N, C, F', H', W')."""
    return vae.encoder(clips, causal=True)[:, : vae.config.latent_channels]


def decode(vae: Any, latents: Tensor) -> Tensor:
    return vae.decoder(latents, causal=False)


def decibels(error: float) -> float:
    """PSNR of pictures in [-1, 1] from their mean squared error."""
    return 10 * math.log10(4 / max(error, 1e-12))


class Course(NamedTuple):
    """Batches up to a share of the steps: how many windows a worker takes at once, and their frames, rows and columns."""

    until: float
    batch: int
    window: tuple[int, int, int]


class VideoVAE(Part):
    """Both halves, on windows at the edges of shapes: many small ones first, since each brings only two colours."""

    name = "video_vae"
    steps = 10000
    evaluate_steps = 1000
    decay_share = 0.4
    noise = 0.1
    noise_from = 0.2  # of the steps
    courses = (Course(0.5, 6, (9, 64, 64)), Course(1, 2, (17, 96, 96)))

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        vae = plain("video_vae")
        start_plainly(vae)
        self.vae: Any = vae
        self.modules = {"video_vae": vae}
        self.optimiser = Muon(self.parameters().items(), 1e-3, vector_lr=1e-3)
        draws = Random(seeded(self.name, "evaluation"))
        self.scenes = [draw_scene(draws, held_out=True, shapes=1) for _ in range(12)]

    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        course = next(course for course in self.courses if step < self.at(course.until))
        clips = draw_batch(draws, course.batch, course.window)
        with mixed_precision():
            latents = encode(self.vae, clips)
            if step >= self.at(self.noise_from):
                spread = latents.detach().float().std((0, 2, 3, 4), keepdim=True)
                latents = latents + self.noise * spread * torch.randn_like(latents)
            pictures = decode(self.vae, latents)
        return {"error": (pictures.float() - clips).square().mean()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        figures = {}
        for name, height, width in (("half", HEIGHT // 2, WIDTH // 2), ("full", HEIGHT, WIDTH)):
            errors, right = [], []
            for scene in self.scenes:
                clip = render_video(scene, height, width, FRAMES, Window(0, 0, height, width, 0, 25))
                with mixed_precision():
                    latents = encode(self.vae, clip.transpose(0, 1)[None])
                    picture = decode(self.vae, latents)[0].transpose(0, 1).float()
                errors.append(float((picture - clip).square().mean()))
                seen = Clip(((picture + 1) / 2).clamp(0, 1), None, 0)
                right.append(judge(seen, scene))
            shares = scores(right)
            figures[f"decibels_{name}"] = decibels(sum(errors) / len(errors))
            figures |= {f"{question}_{name}": shares[question] for question in ("shape", "colour", "background")}
        return figures
