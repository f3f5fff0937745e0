"""Trains the demo model, part by part, and goes on where it was stopped: python -m tools.demo_model --folder PLACE."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tools.demo_model import latents
from tools.demo_model.audio import AudioVAE, Vocoder
from tools.demo_model.export import Trained
from tools.demo_model.lora import DistilledLora
from tools.demo_model.training import WORKERS, Part, progress_of, train
from tools.demo_model.transformer import Transformer
from tools.demo_model.upsampler import Upsampler
from tools.demo_model.video_vae import VideoVAE

# In the order of their need: each may read what stands before it. After the audio parts all scenes are encoded.
BEFORE_LATENTS: tuple[type[Part], ...] = (VideoVAE, AudioVAE, Vocoder)
AFTER_LATENTS: tuple[type[Part], ...] = (Upsampler, Transformer, DistilledLora)


def _train(parts: tuple[type[Part], ...], folder: Path, share: float, workers: int) -> None:
    for part in parts:
        steps = max(2, round(part.steps * share))
        if progress_of(folder, part.name) < steps and not train(part, folder, steps, workers=workers):
            sys.exit(f"stopped; the same command goes on with {part.name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/demo_model"), help="checkpoints and logs")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes of one thread; they change the result")
    parser.add_argument("--share", type=float, default=1.0, help="of steps and scenes; a small one is a rehearsal")
    arguments = parser.parse_args()
    folder, workers, share = arguments.folder, arguments.workers, arguments.share
    # The usual way out, so that workers are ended as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    _train(BEFORE_LATENTS, folder, share, workers)
    latents.prepare(folder, max(latents.FEWEST_FILES, round(latents.FILES * share)), workers)
    _train(AFTER_LATENTS, folder, share, workers)
    Trained.load(folder).write(folder / "files")
    print(f"written to {folder / 'files'}; copied to ltxkern/demo they are the package's demo model")


if __name__ == "__main__":
    main()
