"""`ltxkern resume`: goes on where a run ended, or runs its later stages again with other settings."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from ltxkern.commands import generate, options, parallel, progress
from ltxkern.commands.text_files import home_in_paths


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "resume",
        help="go on where a run ended",
        description="Go on where `ltxkern generate` ended, by whatever cause; the result has the bits of a run that was never "
        "interrupted. With --from its later stages run again, with other settings where --set names some.",
    )
    parser.add_argument("folder", metavar="DIR", help="work folder of the run")
    parser.add_argument(
        "--from", dest="restart", metavar="STAGE", help="text, stage1, stage2 or decode: run again from here on"
    )
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of generate with another value, such as seed=7; repeatable",
    )
    parser.add_argument("-o", "--output", metavar="PATH", help="another place for the result")
    parser.add_argument("--no-plan", action="store_true", help="do not check beforehand that the run fits into memory")
    progress.add_progress_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Read what the run was started from, and generate on."""
    folder, output, arguments.preview = (
        None if path is None else os.path.abspath(path)
        for path in (arguments.folder, arguments.output, arguments.preview)
    )
    command = _stored(str(folder))
    os.chdir(command.pop("where"))
    again = _changed(command, arguments.changes)
    again.output = output or command["output"]
    again.work_dir, again.no_work_dir, again.restart = folder, False, arguments.restart
    for name in ("no_plan", "verbose", *progress.OPTIONS):
        setattr(again, name, getattr(arguments, name))
    again.command, again.dry_run = "generate", False
    return generate.generate(again, parallel.Job(None))


def _stored(folder: str) -> dict[str, Any]:
    from ltxkern.pipeline.work.folder import read_manifest

    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"resume: {folder!r} holds no run: name a work folder")
    if manifest.command is None:
        raise ValueError(
            f"resume: the run in {folder!r} was started from Python: call generate with work_dir={folder!r}"
        )
    command = dict(manifest.command)
    if not os.path.isdir(command["where"]):
        raise ValueError(f"resume: the run was started in {command['where']!r}, which is not there any more")
    return command


def _changed(command: dict[str, Any], changes: list[str]) -> argparse.Namespace:
    """The options of a run with those of --set in their place."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    options.add_request_options(parser)
    options.add_model_options(parser)
    parallel.add_parallel_options(parser)
    home_in_paths(parser)
    given = []
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise ValueError(f"set must be NAME=VALUE, got {change!r}")
        given.append((name.strip().lstrip("-").replace("_", "-"), value))
    replaced = {name.replace("-", "_") for name, _ in given}
    parser.set_defaults(**{name: value for name, value in command.items() if name not in replaced})
    parsed = parser.parse_args([f"--{name}={value}" for name, value in given])
    known = vars(parsed)
    for name, value in command.items():
        known.setdefault(name, value)
    return parsed


class _Parser(argparse.ArgumentParser):
    """It raises where one of the command line would leave the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"set: {message}")
