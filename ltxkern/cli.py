"""The command line: `ltxkern generate | resume | batch | serve | plan | lora | compare | doctor | verify | bench-env`."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import sys
from collections.abc import Sequence

from ltxkern.commands.options import expected_errors
from ltxkern.commands.text_files import home_in_paths, read_config

COMMANDS = ("generate", "resume", "batch", "serve", "plan", "lora", "compare", "doctor", "verify")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 refused or failed with a sentence, 130 interrupted."""
    try:
        return _run(argv)
    except KeyboardInterrupt as interrupt:
        print(f"ltxkern: interrupted; {str(interrupt) or 'no half-written file was left'}", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "ltxkern":
            raise
        print(f'ltxkern: error: {error.name} is not installed: pip install "ltxkern[pipeline]"', file=sys.stderr)
        return 2
    except expected_errors() as error:
        sentence = (
            error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
        )
        print(f"ltxkern: error: {sentence}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="ltxkern", description="Diffusion video kernels, and the exact LTX-2.3 two-stage generator."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what each step does")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"ltxkern.commands.{name}").add_parser(subparsers)
    for command in subparsers.choices.values():
        home_in_paths(command)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that cannot be shown is no failure
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr
    )
    if getattr(arguments, "config", None):
        values = read_config(arguments.parser, arguments.config)
        # argparse appends to a list default: a list on the command line takes the place of the file's.
        kept = {
            name: value for name, value in values.items() if not (isinstance(value, list) and getattr(arguments, name))
        }
        arguments.parser.set_defaults(**kept)
        arguments = parser.parse_args(argv)
    return int(arguments.run(arguments) or 0)
