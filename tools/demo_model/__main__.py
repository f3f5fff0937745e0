"""Trains the demo model, part by part, and goes on where it was stopped: python -m tools.demo_model --folder PLACE."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ltxkern.whole_files import replacing
from tools.demo_model import drafts, latents
from tools.demo_model.audio import AudioEncoder, AudioVAE, Vocoder
from tools.demo_model.export import MODEL, UPSCALER, Trained
from tools.demo_model.lora import DistilledLora
from tools.demo_model.measure import checksum, count, model_folder
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


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Keeps in the folder what its training was begun with.

    Raises:
        ValueError: the folder holds a training that was begun with other settings.
    """
    path = folder / "begun_with.json"
    if path.is_file():
        begun = json.loads(path.read_text())
        if others := [name for name, value in settings.items() if begun.get(name) != value]:
            raise ValueError(
                f"{folder} was begun with another {' and '.join(others)} ({path} has it): go on with that, "
                "or choose another --folder"
            )
    elif any(folder.glob("*.pt")):
        raise ValueError(
            f"{folder} holds checkpoints, but no {path.name} says of what training: choose another --folder"
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}: expected a number above 0")
    return share


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file: expected a folder")
    return path


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument(
        "--folder",
        type=_folder,
        help="checkpoints and logs; default build/demo_model, of a rehearsal and of --from-files one of its own",
    )
    parser.add_argument(
        "--workers", type=count, default=WORKERS, help="processes of one thread; they change the result"
    )
    parser.add_argument("--share", type=_share, default=1.0, help="of steps and scenes; a small one is a rehearsal")
    parser.add_argument(
        "--from-files", type=model_folder, metavar="FOLDER", help="take all but the LoRA from the model's files"
    )
    arguments = parser.parse_args(given)
    files, workers, share = arguments.from_files, arguments.workers, arguments.share
    name = "demo_model" + ("" if files is None else "_lora") + ("" if share == 1 else "_rehearsal")
    folder = arguments.folder or Path("build") / name
    sources = None if files is None else {name: checksum(files / name) for name in (MODEL, UPSCALER)}
    try:
        trained = None if files is None else Trained.read(files)
        begin(folder, {"--share": share, "--workers": workers, "--from-files": sources})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if trained is not None and not checkpoint(folder, Transformer.name).is_file():
        trained.keep_checkpoints(folder)
    before, after = (BEFORE_LATENTS, AFTER_LATENTS) if files is None else ((AudioEncoder,), ())
    _train(before, folder, share, workers)
    scenes = max(latents.FEWEST_FILES, round(latents.FILES * share))
    # The LoRA learns from scenes of both sizes; half as many of the small one do besides.
    latents.prepare(folder, range(0, scenes, 1 if files is None else latents.FULL_EVERY // 2), workers)
    _train(after, folder, share, workers)
    # The LoRA learns from what the model makes without one.
    Trained.load(folder, lora=False).write(folder / "files")
    drafts.prepare(folder, folder / "files", range(max(1, round(drafts.FILES * share))), workers)
    _train((DistilledLora,), folder, share, workers)
    Trained.load(folder).write(folder / "files")
    print(f"written to {folder / 'files'}; copied to ltxkern/demo they are the package's demo model")


if __name__ == "__main__":
    main()
