"""Runs one part's training in a few single-threaded workers that share their gradients; it stops and goes on at any step.

Workers of one thread each lose little when other programs want the cores, where threads that wait for each other lose most. Every
draw depends on the part, the step and the worker alone, so a training that was stopped ends as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from tqdm import tqdm

from ltxkern.whole_files import replacing
from tools.demo_model.muon import Muon

WORKERS = 2
SAVE_SECONDS = 300
LOG_STEPS = 50
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What a step with its evaluation may take on a busy machine.
STOP_SECONDS = 120


class Part(ABC):
    """A part of the model that is trained on its own.

    modules are saved, whether they train or not; optimiser knows what trains.
    """

    name: str
    steps: int
    evaluate_steps: int = 500
    warmup: int = 50
    decay_share: float = 0.3

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[str, nn.Module] = {}
        self.optimiser: Muon

    @abstractmethod
    def losses(self, draws: Random, step: int) -> dict[str, Tensor]:
        """Losses of one batch of one worker; they are added up, each with its weight in it."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures on scenes that training does not see."""

    def rate(self, step: int) -> float:
        """Share of the full learning rate: a short rise, a level, and a straight fall to a hundredth."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / (self.decay_share * self.steps))
        return min(rise, max(fall, 0.01))

    def at(self, share: float) -> int:
        """The first step after a share of them."""
        return round(share * self.steps)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {
            f"{key}.{name}": parameter
            for key, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }


def mixed_precision() -> torch.autocast:
    """Products in bf16 where the processor has instructions for them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def seeded(*words: object) -> int:
    return zlib.crc32("/".join(str(word) for word in words).encode())


def checkpoint(folder: Path, name: str) -> Path:
    return folder / f"{name}.pt"


def progress_of(folder: Path, name: str) -> int:
    """Steps that a part has behind it."""
    path = checkpoint(folder, name)
    return torch.load(path, mmap=True, weights_only=True)["step"] if path.is_file() else 0


def load_modules(folder: Path, name: str, modules: Mapping[str, nn.Module]) -> None:
    """Fills modules with the weights of a part that was trained before."""
    state = torch.load(checkpoint(folder, name), mmap=True, weights_only=True)["modules"]
    for key, module in modules.items():
        module.load_state_dict(state[key])


def save_modules(
    folder: Path, name: str, modules: Mapping[str, nn.Module], step: int, seconds: float = 0.0, **more: Any
) -> None:
    """Writes the weights of a part that has so many steps behind it; `load_modules` reads them."""
    weights = {key: module.state_dict() for key, module in modules.items()}
    with replacing(checkpoint(folder, name)) as path:
        torch.save({"step": step, "seconds": seconds, "modules": weights, **more}, path)


def _save(part: Part, step: int, seconds: float) -> None:
    save_modules(part.folder, part.name, part.modules, step, seconds, optimiser=part.optimiser.state_dict())


def _restore(part: Part) -> tuple[int, float]:
    path = checkpoint(part.folder, part.name)
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for name, module in part.modules.items():
        module.load_state_dict(state["modules"][name])
    if "optimiser" in state:
        part.optimiser.load_state_dict(state["optimiser"])
    return state["step"], state["seconds"]


def train(make: Callable[[Path], Part], folder: Path, steps: int, *, workers: int = WORKERS) -> None:
    """Trains a part to its last step.

    Args:
        make: a module's function or class that builds the part; called in each worker.
        folder: of checkpoints and logs.
        steps: in all.
        workers: processes; the result depends on their number.

    Raises:
        SystemExit: the training was asked to stop.
        RuntimeError: a worker failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        settings = [(make, folder, steps, rank, workers, f"{meeting}/rendezvous") for rank in range(workers)]
        _run(_work, settings, STOP_SECONDS)


def shared_out(work: Callable[..., None], settings: tuple[Any, ...], numbers: list[int], workers: int) -> None:
    """Calls work(*settings, some of the numbers) in processes that share them out.

    Raises:
        SystemExit: the program was asked to stop.
        RuntimeError: a worker failed.
    """
    _run(work, [(*settings, numbers[rank::workers]) for rank in range(min(workers, len(numbers)))])


def _run(work: Callable[..., None], settings: Sequence[tuple[Any, ...]], stop_seconds: float = 0) -> None:
    """Calls work(*one) for each of the settings in a process of its own, which starts with SIGTERM and SIGINT blocked.

    Where this process is asked to stop, the others get SIGTERM, and are killed where they have not ended in time.
    """
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in STOP_SIGNALS}
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=one) for one in settings]
    deadline = math.inf
    try:
        # It unblocks the signals when it starts, which is with the first process.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for process in processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while running := [process for process in processes if process.is_alive()]:
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                break
            if asked and deadline == math.inf:
                deadline = time.monotonic() + stop_seconds
                for process in running:
                    process.terminate()
            connection.wait([process.sentinel for process in running], 0.2)
        failed = [process.exitcode for process in processes if process.exitcode]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        sys.exit("stopped; the same command goes on")
    if failed:
        raise RuntimeError(f"a worker ended with exit code {failed[0]}: see above why; the same command goes on")


def _work(make: Callable[[Path], Part], folder: Path, steps: int, rank: int, workers: int, meeting: str) -> None:
    asked: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    # A worker may get no time for long where others want the cores; that is no reason to give up.
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers, timeout=timedelta(days=7)
    )
    torch.manual_seed(0)
    part = make(folder)
    part.steps = steps
    start, before = _restore(part)
    began = saved = time.monotonic()
    recent: dict[str, list[float]] = {}
    with tqdm(total=part.steps, initial=start, desc=part.name, disable=rank > 0, mininterval=30) as bar:
        for step in range(start, part.steps):
            torch.manual_seed(seeded(part.name, step, rank))
            losses = part.losses(Random(seeded(part.name, step, rank, "draws")), step)
            torch.stack(list(losses.values())).sum().backward()
            now = time.monotonic()
            stop, save = _reduce(
                list(part.parameters().values()), bool(asked), rank == 0 and now - saved > SAVE_SECONDS
            )
            part.optimiser.scale_rates(part.rate(step))
            part.optimiser.step()
            part.optimiser.zero_grad(set_to_none=True)
            bar.update()
            for name, loss in losses.items():
                recent.setdefault(name, []).append(float(loss.detach()))
            done, last = step + 1, step + 1 == part.steps
            if rank == 0:
                if done % LOG_STEPS == 0 or last:
                    figures: dict[str, Any] = {name: round(fmean(values), 5) for name, values in recent.items()}
                    if done % part.evaluate_steps == 0 or last:
                        torch.manual_seed(seeded(part.name, "evaluate"))
                        figures |= {name: round(value, 4) for name, value in part.evaluate().items()}
                    _log(part, done, before + now - began, figures)
                if stop or save or last:
                    _save(part, done, before + now - began)
                    saved = time.monotonic()
            if done % LOG_STEPS == 0:
                recent = {}
            if stop:
                break
    # None goes before the others have their answers.
    dist.barrier()
    dist.destroy_process_group()


def _log(part: Part, step: int, seconds: float, figures: dict[str, Any]) -> None:
    with (part.folder / f"{part.name}.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "seconds": round(seconds), **figures}) + "\n")


def _reduce(parameters: list[nn.Parameter], stop: bool, save: bool) -> tuple[bool, bool]:
    """Averages gradients over the workers, and tells each whether any wants to stop or to save."""
    # What one worker's batch left out another's may have used.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([float(stop), float(save)])])
    dist.all_reduce(flat)
    count = dist.get_world_size()
    place = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = flat[place : place + grad.numel()].view_as(grad) / count
        place += grad.numel()
    return bool(flat[-2]), bool(flat[-1])
