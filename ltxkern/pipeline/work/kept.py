"""What a run takes from its work folder and leaves there; without a folder it computes everything and leaves nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.sampling.finite import check_finite
from ltxkern.pipeline.sampling.state import Latents, SamplerPoint
from ltxkern.pipeline.work.folder import WorkFolder
from ltxkern.pipeline.work.record import DamagedRecordError, read_record, write_record

logger = logging.getLogger(__name__)

# The last one is what a run goes on from; the one before it is there should the last be damaged.
_POINTS = 2
_DONE, _LATENT, _GENERATOR, _LAST = "done", "latent ", "generator ", "last "

Tensors = dict[str, Tensor]


@dataclass
class KeptWork:
    """The records of one run.

    A record that cannot be written is no reason to lose the run: it goes on, with a warning. One that is damaged is made again.

    Attributes:
        folder: where they lie; None keeps nothing.
        device: where tensors that are taken from it go.
        owns: whether the run opened it.
        waiting: how many times `done` is still to come.
    """

    folder: WorkFolder | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    owns: bool = False
    waiting: int = 0
    _warned: bool = False

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, place: str | Path | WorkFolder | None, device: torch.device, facts: Mapping[str, Any]
    ) -> Iterator[KeptWork]:
        """The work of a run that depends on `facts`. A folder that is opened here is closed when the block has ended and
        everything that it waits for is done.

        Args:
            place: a path, a folder that is open and stays so, or None.
            device: of the run.
            facts: what its result depends on.

        Raises:
            WorkFolderError: another process holds the folder, or it holds a run with other facts.
        """
        if place is None:
            yield cls(None, device)
            return
        folder = place if isinstance(place, WorkFolder) else WorkFolder(place)
        work = cls(folder, device, owns=folder is not place, waiting=1)
        try:
            if not folder.begins(facts):
                work.folder = None
            yield work
        except BaseException:
            if work.owns:
                folder.close()
            raise
        work.done()

    def done(self) -> None:
        """A part of the run is complete: after the last a folder that the run opened is tidied and closed."""
        self.waiting -= 1
        if self.owns and self.folder is not None and self.waiting == 0:
            self.folder.finish()
            self.folder.close()

    def take(self, name: str) -> Tensors | None:
        """A record; None where there is none that can be used.

        Raises:
            DamagedRecordError: it is damaged, and cannot be made again as it was.
        """
        if self.folder is None:
            return None
        path = self.folder.record(name)
        try:
            found = read_record(path, self.folder.manifest.run)
        except FileNotFoundError:
            return None
        except DamagedRecordError as error:
            stage = name.partition("-")[0]
            then = self.folder.manifest.earlier.get(stage)
            if then:
                made = ", ".join(f"{fact} {value}" for fact, value in then.items())
                raise DamagedRecordError(f"{error}; it was made with {made}: start a new run") from error
            logger.warning("%s: it is made again", error)
            path.unlink(missing_ok=True)
            return None
        return {key: tensor.to(self.device) for key, tensor in sorted(found.items())}

    def leave(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a record."""
        if self.folder is None:
            return
        try:
            write_record(self.folder.record(name), tensors, self.folder.manifest.run)
        except OSError as error:
            if not self._warned:
                logger.warning("the run goes on, but %s is not kept: %s", name, error.strerror or error)
            self._warned = True

    def once(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The record of this name, or what `make` gives, which is then kept."""
        found = self.take(name)
        if found is None:
            found = make()
            self.leave(name, found)
        return found

    def steps(self, stage: str, title: str) -> KeptSteps:
        """The steps of a stage, whose errors call it by its title."""
        return KeptSteps(self, f"steps-{stage}-", title)

    def stage(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a stage gives; its steps are not needed any more."""
        self.leave(stage, tensors)
        if self.folder is not None and self.folder.record(stage).exists():
            self.folder.remove(f"steps-{stage}-")


@dataclass
class KeptSteps:
    """Points of one stage's sampler, each with the predictions that later steps may reuse."""

    work: KeptWork
    prefix: str
    title: str

    def latest(self) -> tuple[SamplerPoint, Latents] | None:
        """The last point that can be used."""
        folder = self.work.folder
        for name in reversed([] if folder is None else folder.names(self.prefix)):
            found = self.work.take(name)
            if found is not None:
                parts = [
                    {key.removeprefix(kind): value for key, value in found.items() if key.startswith(kind)}
                    for kind in (_LATENT, _GENERATOR, _LAST)
                ]
                states = tuple(parts[1][key] for key in sorted(parts[1]))
                return SamplerPoint(int(found[_DONE]), parts[0], states), parts[2]
        return None

    def keep(self, point: SamplerPoint, last: Latents) -> None:
        """Keep a point; those before it go, but for one.

        Raises:
            NonFiniteError: its latents are not finite. The last healthy point is the one that stays.
        """
        folder = self.work.folder
        if folder is None:
            return
        latents = {name: latent.cpu() for name, latent in point.latents.items()}
        for name, latent in latents.items():
            check_finite(f"{self.title}, step {point.done}", f"{name} latent", latent)
        tensors = {_DONE: torch.tensor(point.done)}
        tensors |= {f"{_LATENT}{name}": latent for name, latent in latents.items()}
        tensors |= {f"{_GENERATOR}{index:04d}": state for index, state in enumerate(point.generators)}
        tensors |= {f"{_LAST}{name}": value for name, value in last.items()}
        self.work.leave(f"{self.prefix}{point.done:05d}", tensors)
        for name in folder.names(self.prefix)[:-_POINTS]:
            folder.record(name).unlink(missing_ok=True)
