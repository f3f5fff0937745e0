"""Trains the demo model, part by part, and goes on where it was stopped: python -m tools.demo_model --folder PLACE."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.demo_model import drafts, latents
from tools.demo_model.audio import AudioEncoder, AudioVAE, Vocoder
from tools.demo_model.export import Trained
from tools.demo_model.lora import DistilledLora
from tools.demo_model.training import WORKERS, Part, checkpoint, progress_of, train
from tools.demo_model.transformer import Transformer
from tools.demo_model.upsampler import Upsampler
from tools.demo_model.video_vae import VideoVAE

# In the order of their need: each may read what stands before it. Between them all scenes are encoded; the LoRA comes last.
BEFORE_LATENTS: tuple[type[Part], ...] = (VideoVAE, AudioVAE, Vocoder)
AFTER_LATENTS: tuple[type[Part], ...] = (Upsampler, Transformer)


def _train(parts: tuple[type[Part], ...], folder: Path, share: float, workers: int) -> None:
    for part in parts:
        steps = max(2, round(part.steps * share))
        if progress_of(folder, part.name) < steps:
            train(part, folder, steps, workers=workers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="checkpoints and logs; default build/demo_model, of a rehearsal one of its own"
    )
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes of one thread; they change the result")
    parser.add_argument("--share", type=float, default=1.0, help="of steps and scenes; a small one is a rehearsal")
    parser.add_argument(
        "--from-files", type=Path, metavar="FOLDER", help="take all but the LoRA from the model's files"
    )
    arguments = parser.parse_args()
    workers, share = arguments.workers, arguments.share
    folder = arguments.folder or Path("build/demo_model" if share == 1 else "build/demo_model_rehearsal")
    before_latents = BEFORE_LATENTS
    if arguments.from_files is not None:
        before_latents = (AudioEncoder,)
        if not checkpoint(folder, Transformer.name).is_file():
            Trained.read(arguments.from_files).keep_checkpoints(folder)
    _train(before_latents, folder, share, workers)
    files = max(latents.FEWEST_FILES, round(latents.FILES * share))
    # The LoRA learns from scenes of both sizes; half as many of the small one do besides.
    every = 1 if arguments.from_files is None else latents.FULL_EVERY // 2
    latents.prepare(folder, range(0, files, every), workers)
    _train(AFTER_LATENTS, folder, share, workers)
    # The LoRA learns from what the model makes without one.
    Trained.load(folder, lora=False).write(folder / "files")
    drafts.prepare(folder, folder / "files", range(max(1, round(drafts.FILES * share))), workers)
    _train((DistilledLora,), folder, share, workers)
    Trained.load(folder).write(folder / "files")
    print(f"written to {folder / 'files'}; copied to ltxkern/demo they are the package's demo model")


if __name__ == "__main__":
    main()
