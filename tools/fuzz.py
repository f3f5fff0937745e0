"""Feeds broken files and requests to whatever reads them: `python -m tools.fuzz --inputs 100000 --seed 1`.

An input passes where the reader takes it, or refuses it with an error that this package raised in words. A crash, an error from
anywhere else, more than `SECONDS` of the processor for one input, or memory beyond what is stated for a target fails, and the
input is kept.

Inputs are drawn by hypothesis; `--engine atheris` lets that fuzzer, where it is installed, look for new paths through the code.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from tools.fuzz_targets import MIB, Target, targets

PACKAGE = str(Path(__file__).resolve().parents[1] / "ltxkern")
SECONDS = 10.0  # of the processor, for one input


class FuzzError(AssertionError):
    """What an input did that none may do."""


def ours(error: BaseException) -> bool:
    """Whether an error is of the kinds that carry a sentence, has one, and was raised by this package."""
    frames = traceback.extract_tb(error.__traceback__)
    kinds = (ValueError, TypeError, OSError, ArithmeticError)
    carries = isinstance(error, kinds) or type(error).__name__ == "RefusedError"  # of the service, an extra
    return carries and bool(str(error).strip()) and frames[-1].filename.startswith(PACKAGE)


@contextlib.contextmanager
def limits(extra: int) -> Iterator[None]:
    """Bound memory to what the process has and `extra` bytes more; a Python program in a loop is stopped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)

    def stop(*_: object) -> None:
        raise FuzzError(f"took more than {SECONDS:g} s of the processor")

    former = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, former)


def feed(target: Target, data: bytes) -> bool:
    """Feed one input; whether it was taken.

    Raises:
        FuzzError: what happened that must not.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(data)
    except Exception as error:
        if isinstance(error, FuzzError) or not ours(error):
            raise FuzzError(f"{target.name}: {type(error).__name__}: {str(error)[:200]}") from error
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return True


@dataclass
class Counted:
    """How many inputs a target was fed with, how many it took, and how long that was."""

    inputs: int = 0
    taken: int = 0
    seconds: float = 0.0


def fuzz(target: Target, count: int, seed: int, kept: Path | None = None) -> Counted:
    """Feed a target with `count` inputs; the first that fails is kept in the folder `kept`.

    Raises:
        FuzzError: one failed.
    """
    counted, started = Counted(), time.monotonic()

    @hypothesis_seed(seed)
    @settings(
        max_examples=-(-count // (target.mutations + 1)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(target.inputs, st.integers(0, 2**48))
    def some(drawn: bytes, number: int) -> None:
        for data in target.around(drawn, number):
            counted.inputs += 1
            try:
                counted.taken += feed(target, data)
            except FuzzError:
                if kept is not None:
                    (kept / f"fuzz-{target.name}").write_bytes(data)
                raise

    with limits(target.limit), quiet():
        # Hypothesis stops where it has seen all that a strategy gives; ours give no end of inputs.
        while counted.inputs < count:
            some()
            seed += 1
            some = hypothesis_seed(seed)(some)
    counted.seconds = time.monotonic() - started
    return counted


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that broken files give."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def instrumented(engine: str) -> contextlib.AbstractContextManager[object]:
    """Within, modules of the package that are imported tell atheris which way they go."""
    if engine != "atheris":
        return contextlib.nullcontext()
    import atheris

    found: contextlib.AbstractContextManager[object] = atheris.instrument_imports(include=["ltxkern"])
    return found


def fuzz_with_atheris(target: Target, count: int, seed: int, folder: Path) -> None:
    """Let atheris look for inputs that reach new code; it ends the process."""
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir()
    for index, example in enumerate(target.examples):
        (corpus / f"{index}").write_bytes(example)
    atheris.Setup(
        [sys.argv[0], f"-runs={count}", f"-seed={seed}", "-max_len=4096", "-print_final_stats=1", str(corpus)],
        lambda data: feed(target, data),
    )
    with limits(target.limit), quiet():
        atheris.Fuzz()


def main(argv: Sequence[str] | None = None) -> int:
    """Feed every target, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--inputs", type=int, default=100_000, help="in all, shared out to the targets (default 100000)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--engine", choices=["hypothesis", "atheris"], default="hypothesis")
    parser.add_argument("--keep", type=Path, default=Path.cwd(), help="folder for an input that failed (default here)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as name:
        with instrumented(arguments.engine):
            every = targets(Path(name))
        chosen = [t for t in every if not arguments.target or t.name in arguments.target]
        each = -(-arguments.inputs // len(chosen))
        total = 0
        for target in chosen:
            if arguments.engine == "atheris":
                fuzz_with_atheris(target, each, arguments.seed, Path(name))
            found = fuzz(target, each, arguments.seed, arguments.keep)
            total += found.inputs
            print(
                f"{target.name}: {found.inputs} inputs, {found.taken} taken, {found.inputs - found.taken} refused in words, "
                f"{found.seconds:.0f} s, within {target.limit // MIB} MiB",
                flush=True,
            )
    print(f"{total} inputs, none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
