"""What stage 1 makes of prompts, enlarged, beside the scene that it shows as the world draws it: what the LoRA learns from.

A sampled clip has outlines that no guess from a noised scene has. It moves as its prompt says, but its size and the shift of its
way are its own: they are measured, and the scene is drawn anew with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ltxkern.whole_files import replacing
from tools.demo_model.configuration import plain
from tools.demo_model.judge import Outlines, see_outlines
from tools.demo_model.latents import encode_video, statistics
from tools.demo_model.prompts import write_prompt
from tools.demo_model.runs import open_model
from tools.demo_model.training import load_modules, mixed_precision, seeded, shared_out
from tools.demo_model.video_vae import FRAMES, HEIGHT, WIDTH, VideoVAE, decode
from tools.demo_model.world import SIZES, Scene, draw_scene, track

FILES, SCENES = 10, 50
# Stage 1 with fewer steps than by default: clips as good for half of the time.
_STEPS = 8
# A clip whose shape stands further from the fitted way than this, in heights, shows another scene.
_FURTHEST = 0.05
_SHIFTS, _SCALES = torch.linspace(-0.15, 0.15, 61), (0.75, 1.3)


class Drafts(NamedTuple):
    """Scenes with normalised latents: video where stage 2 starts, and where it shall end (N, C, F, H, W), sound (N, C, T, M)."""

    scenes: list[Scene]
    start: Tensor
    clean: Tensor
    audio: Tensor


def _path(folder: Path, number: int) -> Path:
    return folder / "drafts" / f"{number:04}.safetensors"


def _scenes_of(number: int) -> list[Scene]:
    draws = Random(seeded("drafts", number))
    return [draw_scene(draws, shapes=1) for _ in range(SCENES)]


def load(folder: Path) -> Drafts:
    """All that were prepared."""
    scenes: list[Scene] = []
    parts: dict[str, list[Tensor]] = {"start": [], "clean": [], "audio": []}
    for path in sorted((folder / "drafts").glob("[0-9]*.safetensors")):
        tensors = load_file(path)
        known = _scenes_of(int(path.stem))
        scenes += [known[place] for place in tensors["places"].tolist()]
        for name, kept in parts.items():
            kept.append(tensors[name])
    return Drafts(scenes, **{name: torch.cat(kept) for name, kept in parts.items()})


def prepare(folder: Path, files: Path, numbers: Iterable[int], workers: int) -> None:
    """Writes those files of drafts that are missing, made by the model in `files` without its LoRA."""
    (folder / "drafts").mkdir(parents=True, exist_ok=True)
    missing = [number for number in numbers if not _path(folder, number).is_file()]
    shared_out(_write, (folder, files), missing, workers)


def fitted(scene: Scene, seen: Outlines, aspect: float) -> Scene | None:
    """The scene with the size and the shift of its way that a clip shows; None where the clip shows no such way.

    Args:
        scene: of one shape, as the prompt has it.
        seen: what stands out in the clip.
        aspect: of the frame.
    """
    (shape,) = scene.shapes
    time = torch.linspace(0, 1, len(seen.x))
    plainly = replace(shape, scale=1.0, x=0.0, y=0.0)
    radius = seen.radius(shape.kind)
    if float(radius.min()) < 0.25 * SIZES[shape.size]:
        return None
    scale = float((radius / track(plainly, time, aspect).radius).median())
    if not _SCALES[0] <= scale <= _SCALES[1]:
        return None
    shape = replace(shape, scale=scale)
    ways = [track(replace(shape, x=shift, y=shift), time, aspect) for shift in _SHIFTS.tolist()]
    across = torch.stack([(way.x - seen.x).abs().mean() for way in ways])
    down = torch.stack([(way.y - seen.y).abs().mean() for way in ways])
    if max(float(across.min()), float(down.min())) > _FURTHEST:
        return None
    x, y = float(_SHIFTS[across.argmin()]), float(_SHIFTS[down.argmin()])
    return Scene(scene.background, (replace(shape, x=x, y=y),))


@torch.no_grad()
def _write(folder: Path, files: Path, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    vae, values = plain("video_vae"), statistics(folder)
    load_modules(folder, VideoVAE.name, {"video_vae": vae})
    sizes: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    # Of stage 2 nothing is used: one step of it.
    short: dict[str, Any] = {"steps": _STEPS, "stage2_sigmas": (0.1, 0.0), "output_type": "latents"}
    with open_model(files, distilled_strengths=(0.0, 0.0)) as pipeline:
        for number in tqdm(numbers, desc="drafts", mininterval=30):
            draws = Random(seeded("draft prompts", number))
            places, start, clean, audio = [], [], [], []
            for place, scene in enumerate(_scenes_of(number)):
                latents = pipeline(write_prompt(scene, draws), seed=number * SCENES + place, **sizes, **short).latents
                with mixed_precision():
                    clip = decode(vae, values.raw_video(latents["stage1_video"]))[0].transpose(0, 1).float()
                seen = see_outlines(((clip + 1) / 2).clamp(0, 1))
                found = None if seen is None else fitted(scene, seen, WIDTH / HEIGHT)
                if found is None:
                    continue
                places.append(place)
                start.append(latents["upsampled_video"])
                clean.append(values.video(encode_video(vae, [found], HEIGHT, WIDTH)))
                audio.append(latents["stage1_audio"])
            # A model of a rehearsal may show no scene: parts of none still have their shape.
            none, silent = latents["upsampled_video"][:0], latents["stage1_audio"][:0]
            parts = {"start": [none, *start], "clean": [none, *clean], "audio": [silent, *audio]}
            tensors = {name: torch.cat(kept).bfloat16().contiguous() for name, kept in parts.items()}
            with replacing(_path(folder, number)) as path:
                save_file(tensors | {"places": torch.tensor(places, dtype=torch.int64)}, path)
