"""Kills runs of the random demo model and resumes them: `python -m tools.kill_runs --kills 20 --seed 1`.

Each run is a process of its own that SIGKILL ends at a moment drawn within a stage; every stage has its turn. The resumed mp4 must
have the bytes of the run that nobody killed, no more than one step may be computed twice, and nothing half-written may be left.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ltxkern.cli import main as ltxkern
from ltxkern.commands.progress import Shown
from ltxkern.pipeline.run.progress import ProgressEvent

Event = tuple[str, int, int]

SMALL = ("--height", "64", "--width", "128", "--num-frames", "9", "--steps", "4")
PROMPT = ("--model", "demo-random", "--prompt", "a red kite over a winter beach", "--quiet", "--device", "cpu")
TIMEOUT = 300.0


@dataclass(frozen=True)
class Killed:
    """What became of one killed run."""

    stage: str
    after: int
    killed: bool
    same: bool
    twice: list[Event]
    left: list[str]

    @property
    def ok(self) -> bool:
        """Whether it lost nothing and left nothing half-written."""
        return self.same and len(self.twice) <= 1 and not self.left

    def __str__(self) -> str:
        how = (
            f"killed in {self.stage} after {self.after} steps"
            if self.killed
            else f"done before it was killed in {self.stage}"
        )
        bits = "same bytes" if self.same else "OTHER BYTES"
        left = f", LEFT BEHIND: {', '.join(self.left)}" if self.left else ""
        return f"{how}: {bits}, computed twice: {self.twice or 'nothing'}{left}"


def warm() -> None:
    """Import once what every run imports: the runs are forked from this process, which computes on one thread."""
    import av  # noqa: F401

    from ltxkern.pipeline import generator  # noqa: F401
    from ltxkern.pipeline.files.demo import build_demo

    torch.set_num_threads(1)
    build_demo()


def child(arguments: Sequence[str], report: Connection, said: int, hold: tuple[str, int] | None) -> None:
    """One run; tells each step through the pipe, and stands still where it is to be killed at a given step.

    What it says goes to the file `said`.
    """

    def tell(_: Shown, event: ProgressEvent) -> None:
        report.send((event.stage, event.done, event.total))
        if hold == (event.stage, event.done):
            signal.pause()

    Shown.__call__ = tell  # type: ignore[method-assign, assignment]
    os.dup2(said, 1)
    os.dup2(said, 2)
    os._exit(ltxkern([*arguments]))


def watched(
    arguments: Sequence[str], stage: str | None = None, at: int = 0, delay: float | None = None
) -> tuple[list[Event], bool, list[float]]:
    """The steps a run took, whether it was killed, and when its steps came.

    Args:
        stage, at: kill it once this stage tells this step.
        delay: seconds to wait before; None: the run stands still there.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    hold = (stage, at) if stage is not None and delay is None else None
    said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process that it is of
    process = context.Process(target=child, args=(arguments, theirs, said.fileno(), hold))
    process.start()
    theirs.close()
    events: list[Event] = []
    times: list[float] = []
    killed = False
    deadline = time.monotonic() + TIMEOUT
    try:
        while time.monotonic() < deadline:
            event = mine.recv()
            events.append(event)
            times.append(time.monotonic())
            if not killed and event[:2] == (stage, at):
                time.sleep(delay or 0.0)
                killed = process.is_alive()
                process.kill()
    except EOFError:
        process.join()
    if process.is_alive():
        process.kill()
        raise SystemExit(f"a run did not end within {TIMEOUT:g} s: {arguments}")
    if not killed and process.exitcode:
        said.seek(0)
        raise SystemExit(f"a run ended with status {process.exitcode}: {arguments}\n{said.read()}")
    return events, killed, times


def kill_and_resume(
    folder: Path, options: Sequence[str], whole: bytes, stage: str, at: int, delay: float | None = None
) -> Killed:
    """Kill one run and resume it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    output, work = folder / "out.mp4", folder / "work"
    first, killed, _ = watched(["generate", *options, "-o", str(output), "--work-dir", str(work)], stage, at, delay)
    second: list[Event] = []
    if killed:
        if not (work / "manifest.json").exists():
            second, _, _ = watched(["generate", *options, "-o", str(output), "--work-dir", str(work)])
        else:
            second, _, _ = watched(["resume", str(work), "--quiet"])
    steps = [event for event in first if event[0].startswith("stage") and event[1]]
    twice = [event for event in steps if event in second]
    left = sorted(path.name for path in folder.rglob(".*"))
    return Killed(stage, at, killed, output.read_bytes() == whole, twice, left)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill as many runs as asked; the status says whether all came out whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument(
        "--at", action="append", default=[], metavar="STAGE:STEP", help="kill at this very step instead"
    )
    parser.add_argument("--small", action="store_true", help="a smaller video")
    parser.add_argument("--image", metavar="FILE", help="a picture to pass through")
    arguments = parser.parse_args(argv)
    warm()
    options = [*PROMPT, *(SMALL if arguments.small else ())]
    options += [] if arguments.image is None else ["--image", arguments.image]
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        os.environ["LTXKERN_CACHE"] = str(folder / "cache")
        output = folder / "whole.mp4"
        events, _, times = watched(["generate", *options, "-o", str(output), "--no-work-dir"])
        stages = list(dict.fromkeys(stage for stage, _, _ in events))
        print(f"a whole run: {len(events)} steps told in {', '.join(stages)}", flush=True)
        whole = output.read_bytes()
        results = []
        if arguments.at:
            for text in arguments.at:
                stage, _, step = text.rpartition(":")
                results.append(kill_and_resume(folder / "run", options, whole, stage, int(step)))
                print(results[-1], flush=True)
        else:
            for index in range(arguments.kills):
                places = [place for place, event in enumerate(events[:-1]) if event[0] == stages[index % len(stages)]]
                place = draw.choice(places or [len(events) - 2])
                delay = draw.uniform(0.0, times[place + 1] - times[place])
                stage, at, _ = events[place]
                results.append(kill_and_resume(folder / "run", options, whole, stage, at, delay))
                print(f"{index + 1}: {results[-1]}", flush=True)
    lost = sum(not result.ok for result in results)
    hit = {result.stage for result in results if result.killed}
    print(f"{sum(r.killed for r in results)} killed in {len(hit)} of {len(stages)} stages, {lost} not whole")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
