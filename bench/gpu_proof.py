"""Everything that waits for a GPU, within a budget of time: `make gpu-proof`, or `python bench/gpu_proof.py --budget 540`.

Each stage is a command of its own and leaves bench/results/<machine>-<revision>-<stage>.json before the next one starts; one that
fails, hangs or does not fit what is left costs the others nothing. <machine>-<revision>-proof.json lists what came of each.
Exit status 0: all stages were done. 1: one failed, ran out of time or was left out. 2: no GPU, or no torch. 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch

    import machine
    from command_line import names_of
    from ltxkern.commands.verify import budget as seconds_above_0
    from ltxkern.compiled import driver
    from ltxkern.verify.interruption import interruptible
    from report import write_whole
except ModuleNotFoundError as missing:
    print(
        f"gpu-proof needs the module {missing.name}, which {sys.executable} has not: `make setup-dev` first, "
        "or `make gpu-proof PYTHON=...` with one that has it",
        file=sys.stderr,
    )
    sys.exit(2)

RESULTS = Path(__file__).resolve().parent / "results"
BUDGET = 540.0
TAIL = 6000
# What a stage has to write what it has, once it is asked to end.
GRACE = 5.0
INTERRUPTED = 130
# What torch's product takes and what our own kernel does, by rank; with two LoRAs, and into float8.
MERGES = ",".join(f"video_attn_{case}" for case in ("r32", "r128", "r384", "r384_float8", "two_r384"))
WITH_ADDMM = ("--backends", "torch addmm_,cuda,nvrtc,triton")
SHORT = ("--cases", "all", "--backends", "torch eager,cuda,nvrtc,triton")
SAMPLING = ("tests/pipeline/sampling/test_res2s.py", "tests/pipeline/sampling/test_host_reads.py")
ROW_OPS = "rms_norm_modulate,gated_residual,qk_norm_rope"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of its file.
        command: its words; {file} is where it may write its results, {seconds} what it may take.
        seconds: its part of a budget of 540.
        least: with less than this left it is not started.
        environment: variables that it has besides.
        needs: a program without which it is left out.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""


@dataclass
class Outcome:
    """What came of a stage: "done", "failed", "out of time", "interrupted" or "left out", and why."""

    stage: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    file: str = ""
    output: str = ""


def _bench(name: str, script: str, *words: str, seconds: float) -> Stage:
    return Stage(name, (sys.executable, f"bench/{script}.py", *words, "--output-json", "{file}"), seconds)


def _tests(name: str, *words: str, seconds: float, before: Sequence[str] = (), **more: Any) -> Stage:
    return Stage(name, (*before, sys.executable, "-m", "pytest", "-q", "-x", *words), seconds, 15.0, **more)


def stages(capability: str) -> tuple[Stage, ...]:
    """In their order; `capability` is that of the card, which alone is built for."""
    return (
        Stage(
            *("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 120.0, 30.0),
            environment={"LTXKERN_BUILD": "auto", "TORCH_CUDA_ARCH_LIST": capability},
        ),
        Stage(
            "verify",
            (
                *(sys.executable, "-m", "ltxkern", "verify", "--full", "--budget", "{seconds}"),
                "--output-json",
                "{file}",
            ),
            *(130.0, 40.0),
        ),
        _tests("tests-ops", "-m", "gpu", "tests/ops/test_on_gpu.py", seconds=50),
        _tests("tests-triton", "-m", "gpu", "tests/triton/test_gpu.py", seconds=25),
        _tests(
            *("sanitizer", "tests/ops/test_on_gpu.py", "-k", "test_every_case and cuda and width7"),
            seconds=35,
            before=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
            # Out of torch's pool a tensor has no end of its own: what lies behind it is as good as its memory.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            needs="compute-sanitizer",
        ),
        # CUDA against Triton, one call of each in turn: which of the two dispatch is to prefer.
        _bench("rows", "run_all", "--ops", ROW_OPS, *SHORT, "--budget", "{seconds}", seconds=45),
        _bench("group-norm-kernels", "deciding", "group-norm-kernels", seconds=30),
        _bench("attention", "deciding", "attention", seconds=25),
        _bench("block", "deciding", "block", seconds=30),
        _bench("merge", "bench_merge_lora", "--cases", MERGES, *WITH_ADDMM, "--budget", "{seconds}", seconds=20),
        _bench("vae-tile", "deciding", "vae-tile", seconds=25),
        # Where time is left, or the budget is larger.
        _bench("pieces", "deciding", "pieces", seconds=20),
        _tests("tests-memory", "-m", "gpu", "tests/pipeline/memory/test_manager_gpu.py", seconds=40),
        _tests("tests-choices", "-m", "gpu", "tests/pipeline/model/test_attention_choice.py", *SAMPLING, seconds=40),
        _tests("tests-golden", "-m", "gpu", "tests/pipeline/test_golden_gpu.py", seconds=60),
        # Stage 1 first.
        _bench("dit", "bench_dit", "--cases", "large", "--rounds", "2", "--rep", "1000", seconds=300),
        _bench("ops", "run_all", "--cases", "all-large", "--budget", "{seconds}", seconds=430),
        _bench("lora", "bench_lora_switch", "--cases", "large", "--rounds", "2", seconds=200),
        _bench("dit-sites", "bench_dit", "--sites", "--cases", "large", "--blocks", "2", seconds=120),
        _bench("hq", "bench_hq", "--model", "random-full", "--rounds", "1", seconds=400),
    )


@contextlib.contextmanager
def process(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command with a process group of its own, none of which outlives the block."""
    # What the caller has on it stays: packages may lie there.
    path = str(machine.ROOT), os.environ.get("PYTHONPATH")
    running = subprocess.Popen(
        command,
        cwd=machine.ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def ended(running: subprocess.Popen[str]) -> str:
    """What a command said, once it was asked to end and had its time for that."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGTERM)
    try:
        return running.communicate(timeout=GRACE)[0]
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return said if isinstance(said, str) else said.decode(errors="replace")


def run_stage(stage: Stage, file: Path, seconds: float) -> Outcome:
    """Run a stage for so long at most; its file is there afterwards, written by its command or here."""
    # Time to end by itself, with what it has.
    given = {"{file}": str(file), "{seconds}": str(int(seconds - min(10.0, seconds / 5)))}
    words = [given.get(word, word) for word in stage.command]
    began = time.monotonic()
    outcome = Outcome(stage.name, "done", file=str(file))
    with process(words, stage.environment) as running:
        try:
            outcome.output = running.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            outcome.output = ended(running)
            outcome.status, outcome.reason = "out of time", f"ended after {seconds:.0f} s"
        except KeyboardInterrupt:
            outcome.output, outcome.status = ended(running), "interrupted"
        else:
            if running.returncode:
                outcome.status, outcome.reason = "failed", f"exit status {running.returncode}"
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.output = outcome.output[-TAIL:]
    if not file.is_file():
        write_whole({**asdict(outcome), "command": words}, file)
    return outcome


def prove(
    planned: Sequence[Stage],
    budget: float,
    file_of: Callable[[str], Path],
    facts: dict[str, Any],
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the stages in turn; the list of outcomes is written after each, and after an interruption.

    Args:
        planned: the stages, the most important first.
        budget: seconds for all of them; each gets its part, more where the budget is larger, and what is left at most.
        file_of: where the results of a name go.
        facts: about the machine.
        say: takes a line about each stage.
        clock: seconds, for tests.
    """
    end, outcomes = clock() + budget, []
    scale = max(1.0, budget / BUDGET)
    for stage in planned:
        left = end - clock()
        file = file_of(stage.name)
        if stage.needs and shutil.which(stage.needs) is None:
            outcome = Outcome(stage.name, "left out", reason=f"{stage.needs} is not on PATH")
        elif left < stage.least:
            outcome = Outcome(stage.name, "left out", reason=f"{max(0.0, left):.0f} s left, {stage.least:.0f} s needed")
        else:
            say(f"{stage.name} ... {min(left, scale * stage.seconds):.0f} s at most")
            # What an earlier run left must not pass for this one's.
            file.unlink(missing_ok=True)
            outcome = run_stage(stage, file, min(left, scale * stage.seconds))
        outcomes.append(outcome)
        listed = {"stage": "proof", "budget": budget, "machine": facts, "outcomes": list(map(asdict, outcomes))}
        write_whole(listed, file_of("proof"))
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
        say(
            f"{stage.name}: {outcome.status}"
            + (f", {outcome.reason}" if outcome.reason else f" in {outcome.seconds:.0f} s")
        )
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--budget", type=seconds_above_0, default=BUDGET, metavar="SECONDS", help=f"default: {BUDGET:g}"
    )
    options.add_argument("--stages", help="names, comma between them (default: all that fit)")
    options.add_argument("--dry-run", action="store_true", help="list the stages and their budgets")
    parsed = options.parse_args(arguments)
    there = torch.cuda.is_available()
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if there else "9.0"
    planned = stages(capability)
    if parsed.stages:
        names = names_of(options, "--stages", parsed.stages, [stage.name for stage in planned])
        planned = tuple(stage for stage in planned if stage.name in names)
    if parsed.dry_run:
        scale = max(1.0, parsed.budget / BUDGET)
        for stage in planned:
            words = ["python" if word == sys.executable else word for word in stage.command]
            print(f"{stage.name:20} {scale * stage.seconds:5.0f} s  {' '.join(words)}")
        return 0
    if not there:
        print(f"gpu-proof needs a GPU; {driver.no_device()}; --dry-run lists the stages", file=sys.stderr)
        return 2
    facts = machine.describe(machine.best_device(), torch.get_num_threads())
    slug = machine.slug(facts)
    try:
        with interruptible():
            outcomes = prove(planned, parsed.budget, lambda name: RESULTS / f"{slug}-{name}.json", facts, print)
    except KeyboardInterrupt:
        print(f"interrupted: what was done stands in {RESULTS}/{slug}-*.json", file=sys.stderr)
        return INTERRUPTED
    return 0 if all(outcome.status == "done" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
