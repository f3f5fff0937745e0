"""Encodes scenes once for the parts that learn from latents: both sizes and the sound, in files of some scenes each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ltxkern.whole_files import replacing
from tools.demo_model.audio import AudioVAE, encode_audio, log_mel, sound_of
from tools.demo_model.configuration import plain
from tools.demo_model.training import load_modules, mixed_precision, seeded, shared_out
from tools.demo_model.video_vae import FRAMES, HEIGHT, WIDTH, VideoVAE, encode
from tools.demo_model.world import Scene, draw_scene, render_video

FILES, SCENES = 160, 50
# One file in eight holds the full size too, whose encoding takes most of the time; file 0 is for evaluation.
FULL_EVERY = 8
FEWEST_FILES = FULL_EVERY + 1
# Of normalised latents. At 1 the second stage's first sigma, 0.91, leaves nothing of what the first one made.
SPREAD = 2.5


class Latents(NamedTuple):
    """Latents as the encoders make them: video (N, C, F, H, W) of half and of full size, audio (N, C, T, M)."""

    scenes: list[Scene]
    half: Tensor
    full: Tensor | None
    audio: Tensor


def scenes_of(number: int) -> list[Scene]:
    draws = Random(seeded("latents", number))
    return [draw_scene(draws, held_out=number == 0) for _ in range(SCENES)]


def _path(folder: Path, number: int) -> Path:
    return folder / "latents" / f"{number:04}.safetensors"


def stored(folder: Path) -> list[int]:
    """Numbers of the files that are there."""
    return sorted(int(path.stem) for path in (folder / "latents").glob("[0-9]*.safetensors"))


def load(folder: Path, number: int) -> Latents:
    tensors = load_file(_path(folder, number))
    return Latents(scenes_of(number), tensors["half"], tensors.get("full"), tensors["audio"])


def prepare(folder: Path, numbers: Iterable[int], workers: int) -> None:
    """Writes those files that are missing; the workers share them out."""
    (folder / "latents").mkdir(parents=True, exist_ok=True)
    # Those that take longest first, so that each worker gets as many of them.
    missing = sorted(set(numbers) - set(stored(folder)), key=lambda number: (number % FULL_EVERY, number))
    shared_out(_write, (folder,), missing, workers)
    if not _statistics_path(folder).is_file():
        keep_statistics(folder, _measure(folder))


@torch.no_grad()
def _write(folder: Path, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    video, audio = plain("video_vae"), plain("audio_vae")
    load_modules(folder, VideoVAE.name, {"video_vae": video})
    load_modules(folder, AudioVAE.name, {"audio_vae": audio})
    for number in tqdm(numbers, desc=f"latents from {numbers[0]}" if numbers else "latents", mininterval=30):
        scenes = scenes_of(number)
        tensors = {"half": encode_video(video, scenes, HEIGHT // 2, WIDTH // 2)}
        if number % FULL_EVERY == 0:
            tensors["full"] = encode_video(video, scenes, HEIGHT, WIDTH)
        mels = torch.stack([log_mel(sound_of(scene)) for scene in scenes])
        tensors["audio"] = encode_audio(audio, mels).bfloat16()
        with replacing(_path(folder, number)) as path:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def encode_video(vae: Any, scenes: list[Scene], height: int, width: int) -> Tensor:
    """Latents of scenes as the world draws them, not normalised."""
    with mixed_precision():
        made = [encode(vae, render_video(scene, height, width, FRAMES).transpose(0, 1)[None]) for scene in scenes]
    return torch.cat(made).bfloat16()


class Statistics(NamedTuple):
    """Mean and divisor of each channel: of video latents (C), of audio ones in the order of packed tokens (C * M)."""

    video_mean: Tensor
    video_std: Tensor
    audio_mean: Tensor
    audio_std: Tensor

    def video(self, latents: Tensor) -> Tensor:
        """Normalised video latents."""
        shape = (1, -1, 1, 1, 1)
        return (latents.float() - self.video_mean.view(shape)) / self.video_std.view(shape)

    def raw_video(self, latents: Tensor) -> Tensor:
        """Video latents as the VAE has them, from normalised ones."""
        shape = (1, -1, 1, 1, 1)
        return latents * self.video_std.view(shape) + self.video_mean.view(shape)

    def audio(self, tokens: Tensor) -> Tensor:
        """Normalised packed audio latents (N, T, C * M)."""
        return (tokens.float() - self.audio_mean) / self.audio_std


def _statistics_path(folder: Path) -> Path:
    return folder / "statistics.safetensors"


def statistics(folder: Path) -> Statistics:
    """Of the latents in a folder, as `prepare` left them."""
    return Statistics(**load_file(_statistics_path(folder)))


def keep_statistics(folder: Path, values: Statistics) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(_statistics_path(folder)) as path:
        save_file({name: tensor.contiguous() for name, tensor in values._asdict().items()}, path)


def _measure(folder: Path) -> Statistics:
    """Of the first files; normalised latents have a standard deviation of `SPREAD` in every channel."""
    some = [load(folder, number) for number in stored(folder)[1:13]]
    half = torch.cat([latents.half for latents in some]).float().transpose(0, 1).flatten(1)
    audio = torch.cat([latents.audio for latents in some]).float().transpose(1, 2).flatten(2).flatten(0, 1)
    return Statistics(half.mean(1), half.std(1) / SPREAD, audio.mean(0), audio.std(0) / SPREAD)
