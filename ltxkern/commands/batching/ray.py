"""A batch over many GPUs or machines with Ray: one actor per rank, one group of actors per item at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ltxkern.commands.batching.items import Item, Outcome

logger = logging.getLogger(__name__)

ATTEMPTS = 2


@dataclass(frozen=True)
class Placement:
    """Where one rank of a group stands: rank and size of the group, and the address at which its rank 0 hosts the store."""

    rank: int = 0
    size: int = 1
    host: str = ""
    port: int = 0


MakeWorker = Callable[[Placement], Callable[[Item], Outcome]]


class _Actor:
    """One rank: makes its worker once, then runs items."""

    def __init__(self) -> None:
        self._work: Callable[[Item], Outcome] | None = None

    def address(self) -> tuple[str, int]:
        """Where this actor's machine can host a store."""
        import socket

        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, make: MakeWorker, placement: Placement) -> None:
        """Load the model; on several ranks, meet the others."""
        self._work = make(placement)

    def run(self, item: Item) -> Outcome:
        """One item."""
        assert self._work is not None, "start comes first"
        return self._work(item)


@dataclass
class _Group:
    """The actors of one CFG group; a group of one where branches are not shared out."""

    actors: list[Any]
    starting: list[Any]
    item: Item | None = None
    running: list[Any] = field(default_factory=list)

    @classmethod
    def open(cls, size: int, gpus: float, make: MakeWorker) -> _Group:
        import ray

        remote = ray.remote(num_gpus=gpus, num_cpus=1, max_restarts=0)(_Actor)
        actors = [remote.remote() for _ in range(size)]
        host, port = ray.get(actors[0].address.remote()) if size > 1 else ("", 0)
        starting = [actor.start.remote(make, Placement(rank, size, host, port)) for rank, actor in enumerate(actors)]
        return cls(actors, starting)

    def submit(self, item: Item) -> Any:
        """Give the item to every rank; the lead's future."""
        self.item = item
        self.running = [actor.run.remote(item) for actor in self.actors]
        return self.running[0]

    def collect(self) -> Outcome:
        """The lead's outcome, once every rank is through. Raises RayError where an actor died or could not start."""
        import ray

        ray.get(self.starting)
        return ray.get(self.running)[0]

    def close(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


def require_capacity(groups: int, size: int, gpus: float) -> None:
    """Refuse what the Ray cluster can never place side by side: its actors would wait for ever.

    Args:
        groups, size, gpus: as `run_with_ray`; each rank takes one CPU beside its GPUs.
    Raises:
        ValueError: one sentence.
    """
    import ray

    found = ray.cluster_resources()
    for kind, each in (("GPU", gpus), ("CPU", 1.0)):
        needed, there = groups * size * each, found.get(kind, 0.0)
        if needed > there:
            raise ValueError(
                f"{groups} workers of {size} ranks need {needed:g} {kind}s and the Ray cluster has {there:g}: "
                "use fewer --workers or a smaller --cfg-parallel-size"
            )


def run_with_ray(
    items: Sequence[Item],
    make: MakeWorker,
    done: Callable[[Outcome], None],
    lost: Callable[[Item, str], Outcome],
    *,
    groups: int,
    size: int = 1,
    gpus: float = 1.0,
) -> None:
    """Run items on groups of Ray actors, each group one item at a time, first come first served.

    Args:
        items: what to run.
        make: makes the worker of one rank inside its actor; it and the items must be picklable.
        done: called here with each outcome, in the order in which items end.
        lost: the outcome of an item whose group died in `ATTEMPTS` attempts, with the reason.
        groups: that work side by side.
        size: ranks of a group: the CFG-parallel degree.
        gpus: GPUs of one rank; 0 on a CPU.
    """
    import ray

    queue = [(item, 1) for item in reversed(items)]
    busy: dict[Any, tuple[_Group, int]] = {}
    idle = [_Group.open(size, gpus, make) for _ in range(min(groups, len(items)))]
    try:
        while queue or busy:
            while queue and idle:
                group = idle.pop()
                item, trial = queue.pop()
                busy[group.submit(item)] = (group, trial)
            ready, _ = ray.wait(list(busy), num_returns=1)
            group, trial = busy.pop(ready[0])
            assert group.item is not None
            try:
                done(group.collect())
                idle.append(group)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                # A remote traceback ends with what went wrong; a dead actor's report begins with it.
                reason = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
                logger.warning("the worker of %s died: %s", group.item.name, reason)
                group.close()
                if trial < ATTEMPTS:
                    queue.append((group.item, trial + 1))
                else:
                    done(lost(group.item, f"its worker died {ATTEMPTS} times: {reason}"))
                if queue:
                    idle.append(_Group.open(size, gpus, make))
    finally:
        _close(idle, (group for group, _ in busy.values()))


def _close(*groups: Iterable[_Group]) -> None:
    for several in groups:
        for group in several:
            group.close()
