"""The work folder of a command: which one it is, and the sentence that tells how to go on."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ltxkern.commands import parallel

if TYPE_CHECKING:
    from ltxkern.pipeline.work.folder import WorkFolder

# What the result does not depend on, and what is said anew each time.
_ELSEWHERE = (*parallel.OWN_AFFAIR, "work_dir", "no_work_dir", "restart", "dry_run", "no_plan", "where")

logger = logging.getLogger(__name__)


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Where what is done is kept."""
    group = parser.add_argument_group("going on after an end (ltxkern resume DIR)")
    group.add_argument(
        "--work-dir", metavar="DIR", help="keeps what is done, step by step (default: a folder of the user's cache)"
    )
    group.add_argument("--no-work-dir", action="store_true", help="keep nothing")


def check_options(arguments: argparse.Namespace, ranks: int) -> None:
    """Refuse options that contradict each other.

    Args:
        ranks: that share the run.

    Raises:
        ValueError: one sentence.
    """
    from ltxkern.pipeline.work.place import limit_bytes

    limit_bytes()
    if arguments.work_dir is not None and (arguments.no_work_dir or ranks > 1):
        other = f"{ranks} ranks share the run" if ranks > 1 else "no-work-dir keeps nothing"
        raise ValueError(f"work-dir is kept by one process, and {other}: leave one of them out")


def command_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that a run is started from, for another process to start it again."""
    options = {name: value for name, value in vars(arguments).items() if name not in _ELSEWHERE}
    return options | {"where": getattr(arguments, "where", None) or os.getcwd()}


@contextlib.contextmanager
def kept(arguments: argparse.Namespace, job: parallel.Job) -> Iterator[WorkFolder | None]:
    """The work folder of a run; None where it keeps nothing. Whatever ends the block early points to `ltxkern resume`.

    Raises:
        ValueError: a named folder that cannot be used.
    """
    from ltxkern.pipeline.work.folder import WorkFolderError

    folder = _open(arguments, job)
    if folder is None:
        yield None
        return
    with folder:
        sentence = f"what is done is kept: ltxkern resume {shlex.quote(str(folder.path))}"
        try:
            yield folder
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(sentence if folder.names("") else "") from interrupt
        except Exception as error:
            # A run that the folder is not for is told so, and nothing of it is kept.
            if folder.names("") and not isinstance(error, WorkFolderError):
                print(f"ltxkern: {sentence}", file=sys.stderr)
            raise
        folder.finish()


def _open(arguments: argparse.Namespace, job: parallel.Job) -> WorkFolder | None:
    from ltxkern.pipeline.work.folder import WorkFolder, WorkFolderError
    from ltxkern.pipeline.work.place import default_folder, limit_bytes, trim

    named, several = arguments.work_dir, job.ranks is not None
    if arguments.no_work_dir or several:
        return None
    command = command_of(arguments)
    stored = command | {"output": os.path.abspath(os.path.expanduser(arguments.output))}
    if named is not None:
        return WorkFolder(named, command=stored, restart=getattr(arguments, "restart", None))
    place, limit = default_folder(command), limit_bytes()
    try:
        trim(place, limit)
        return WorkFolder(place, command=stored, is_cache=True)
    except (WorkFolderError, OSError) as error:
        logger.warning("the run is not kept: %s", error)
        return None
