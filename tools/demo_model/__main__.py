"""Trains the demo model, part by part, and goes on where it was stopped: python -m tools.demo_model --folder PLACE."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.demo_model.training import WORKERS, Part, progress_of, train
from tools.demo_model.video_vae import VideoDecoder, VideoVAE

# In the order of their need: each may read what stands before it.
PARTS: tuple[type[Part], ...] = (VideoVAE, VideoDecoder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/demo_model"), help="checkpoints and logs")
    parser.add_argument("--only", choices=[part.name for part in PARTS], help="this part alone")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes of one thread; they change the result")
    arguments = parser.parse_args()
    for part in PARTS:
        if arguments.only not in (None, part.name):
            continue
        done = progress_of(arguments.folder, part.name)
        if done < part.steps and not train(part, arguments.folder, workers=arguments.workers):
            print(f"stopped; the same command goes on with {part.name}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
