"""Where a forward's time goes, site by site: seconds, elementwise bytes and launches of each, eager or compiled by inductor.

A site is the function of a model's source that asks for a launch, with its op (`dit_count.py` has what a launch moves), or the
kernel that inductor made. Times are those of a forward that waits for nothing else: a mode stands around every op and measures
the op alone, so what Python does between two ops is in no row.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

import dit_count
from dit_count import Launched

COMPILED = ("cpp_fused", "triton_")


@dataclass
class SiteTimes:
    """Launches of one forward, each with the time that it took."""

    device: torch.device
    launches: list[Launched] = field(default_factory=list)
    _times: list[Any] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """The time of what runs inside, for the launch that is noted next."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._times.append((start, end))
        else:
            begun = time.perf_counter()
            yield
            self._times.append(time.perf_counter() - begun)

    def drop(self) -> None:
        """Forget the last time: it was a view's."""
        self._times.pop()

    def seconds(self) -> list[float]:
        """Of each launch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) / 1e3 for start, end in self._times]
        return self._times


class _TimedLaunches(dit_count.Launches):
    """Notes launches with their times."""

    def __init__(self, times: SiteTimes) -> None:
        super().__init__(times)
        self._times = times

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled runs as it is, and the ops that it calls are seen."""
        return True

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self._times.timed():
            return func(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = len(self._times.launches)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self._times.launches) == before:
            self._times.drop()
        return result


def _eager(call: Callable[[], Any], times: SiteTimes) -> None:
    with _TimedLaunches(times):
        call()


class _Kernel:
    """A kernel of inductor's that notes its calls."""

    def __init__(self, kernel: Any, name: str, times: SiteTimes) -> None:
        self._kernel, self._name, self._times = kernel, name, times

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernel, name)
        return functools.partial(self._noted, found) if name == "run" else found  # Triton's is called by it

    def __call__(self, *args: Any) -> Any:
        return self._noted(self._kernel, *args)

    def _noted(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        with self._times.timed():
            result = function(*args, **kwargs)
        moved = dit_count.moved_bytes(leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor))
        self._times.launches.append(Launched("inductor", self._name, moved, 0))
        return result


def _compiled(call: Callable[[], Any], times: SiteTimes) -> None:
    """The kernels of inductor's modules too, which no mode sees."""
    from torch._inductor.codecache import PyCodeCache

    with contextlib.ExitStack() as stack:
        for module in PyCodeCache.modules:
            for name, value in list(vars(module).items()):
                if name.startswith(COMPILED):
                    stack.enter_context(mock.patch.object(module, name, _Kernel(value, name, times)))
        _eager(call, times)


def site_rows(
    calls: Mapping[str, Callable[[], Any]], compiled: str, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """Rows of every site of every provider: launches and bytes of one forward, and the least time of some, in turn.

    Args:
        calls: a forward by its provider.
        compiled: the provider that inductor compiled.
    """
    seconds: dict[str, list[list[float]]] = {}
    launches: dict[str, list[Launched]] = {}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            times = SiteTimes(device)
            (_compiled if name == compiled else _eager)(call, times)
            if turn:  # the first warms up
                launches[name] = times.launches
                seconds.setdefault(name, []).append(times.seconds())
    rows = []
    for name, found in launches.items():
        least = [min(each) for each in zip(*seconds[name], strict=True)]
        sites: dict[str, list[float]] = {}
        for launch, taken in zip(found, least, strict=True):
            site = launch.op if launch.op in ("product", "attention") else f"{launch.site} {launch.op}"
            row = sites.setdefault(site, [0, 0, 0.0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + launch.bytes, row[2] + taken
        rows += [
            {"provider": name, "site": site, "launches": row[0], "bytes": row[1], "us": round(1e6 * row[2], 1)}
            for site, row in sorted(sites.items(), key=lambda item: -item[1][2])
        ]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, the sums of each provider first."""
    lines = [f"{'provider':26}{'launches':>9}{'bytes':>14}{'ms':>10}  site"]
    for name in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == name]
        whole = {key: sum(row[key] for row in own) for key in ("launches", "bytes", "us")}
        for row in ({"site": "all", "provider": name, **whole}, *own):
            lines.append(f"{name:26}{row['launches']:9}{row['bytes']:14}{row['us'] / 1e3:10.3f}  {row['site']}")
    return "\n".join(lines)
