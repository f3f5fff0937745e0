"""How a command shows a run at work: bars, JSON lines, and pictures of its latents."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltxkern.pipeline.generator import HQTwoStagePipeline
    from ltxkern.pipeline.results.preview import Previews
    from ltxkern.pipeline.run.progress import ProgressEvent
    from ltxkern.pipeline.run.request import GenerationRequest

WAYS = ("bars", "json")
# What changes no result.
OPTIONS = ("quiet", "progress", "preview", "preview_every")


def add_progress_options(parser: argparse.ArgumentParser) -> None:
    """What is shown while a run is at work."""
    group = parser.add_argument_group("while it runs")
    group.add_argument(
        "--progress",
        default="bars",
        metavar="HOW",
        help="bars (default) on standard error, or json: standard output is a JSON object a line and nothing else",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--preview", metavar="DIR", help="a small PNG picture there after steps")
    group.add_argument(
        "--preview-every", type=int, default=1, metavar="N", help="steps from one to the next (default 1)"
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be shown.

    Raises:
        ValueError: one sentence.
    """
    if arguments.progress not in WAYS:
        raise ValueError(f"progress must be one of {', '.join(WAYS)}, got {arguments.progress!r}")
    if arguments.preview_every < 1:
        raise ValueError(f"preview-every must be at least 1, got {arguments.preview_every}: use 1")


def check_preview(arguments: argparse.Namespace) -> None:
    """Refuse a place for pictures that cannot be written.

    Raises:
        ValueError: one sentence.
    """
    if arguments.preview is not None:
        place = Path(os.path.expanduser(arguments.preview)).absolute()
        there = next(parent for parent in (place, *place.parents) if os.path.lexists(parent))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "is no folder" if not there.is_dir() else "cannot be written"
            raise ValueError(f"preview {arguments.preview!r}: {str(there)!r} {why}: name another folder")


def previews(
    arguments: argparse.Namespace, pipeline: HQTwoStagePipeline, request: GenerationRequest
) -> Previews | None:
    """The pictures that --preview asks for."""
    if arguments.preview is None:
        return None
    from ltxkern.pipeline.results.preview import Previews

    return Previews.of(pipeline, request, arguments.preview, arguments.preview_every)


class Shown:
    """What a command tells of its run: `shown(event)` while it is at work, `shown.result` at its end.

    Args:
        arguments: of the command.
        leads: whether this rank tells anything.
    """

    def __init__(self, arguments: argparse.Namespace, leads: bool = True) -> None:
        self._json = arguments.progress == "json"
        self._silent = not leads or (arguments.quiet and not self._json)
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, event: ProgressEvent) -> None:
        """Show that something advanced."""
        if self._silent:
            return
        if self._json:
            _line(asdict(event))
            return
        if event.stage != self._stage or self._bar is None:
            from tqdm import tqdm

            self._close()
            self._stage = event.stage
            named = f"{event.stage:<22}"
            self._bar = tqdm(total=event.total, desc=named, unit="step", file=sys.stderr, dynamic_ncols=True)
        self._bar.update(event.done - self._bar.n)
        if event.done >= event.total:
            self._close()

    def frames(self, total: int) -> Callable[[int], None]:
        """A callback that counts frames as they are written."""
        from ltxkern.pipeline.run.progress import ProgressClock

        clock = ProgressClock(self)
        return lambda done: clock("writing", done, total)

    def result(self, path: str, text: str) -> None:
        """The end: what was written where, and what it is."""
        if self._json:
            _line({"output": path})
        else:
            print(text)


def _line(content: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise BrokenPipeError(error.errno, "nobody reads the progress on standard output any more") from error
