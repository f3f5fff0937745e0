"""Runs one part's training in a few single-threaded workers that share their gradients; it stops and goes on at any step.

Workers of one thread each lose little when other programs want the cores, where threads that wait for each other lose most. Every
draw depends on the part, the step and the worker alone, so a training that was stopped ends as one that was not.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
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


def train(make: Callable[[Path], Part], folder: Path, steps: int, *, workers: int = WORKERS) -> bool:
    """Trains a part to its last step.

    Args:
        make: a module's function or class that builds the part; called in each worker.
        folder: of checkpoints and logs.
        steps: in all.
        workers: processes; the result depends on their number.

    Returns:
        Whether the part is finished; False where the training was asked to stop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            context.Process(target=_work, args=(make, folder, steps, rank, workers, f"{meeting}/rendezvous"))
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        stopped = False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True
            for process in processes:
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for process in processes:
                process.join()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if not stopped and any(process.exitcode for process in processes):
        raise RuntimeError(f"a worker failed, exit codes {[process.exitcode for process in processes]}")
    return not stopped


def shared_out(work: Callable[..., None], settings: tuple[Any, ...], numbers: list[int], workers: int) -> None:
    """Calls work(*settings, some of the numbers) in processes that share them out, and that end with the program."""
    if not numbers:
        return
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(*settings, numbers[rank::workers])) for rank in range(workers)]
    for process in processes:
        process.daemon = True
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a worker failed, exit codes {[process.exitcode for process in processes]}")


def _work(make: Callable[[Path], Part], folder: Path, steps: int, rank: int, workers: int, meeting: str) -> None:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
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
            stop, save = _share(list(part.parameters().values()), bool(asked), rank == 0 and now - saved > SAVE_SECONDS)
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


def _share(parameters: list[nn.Parameter], stop: bool, save: bool) -> tuple[bool, bool]:
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
