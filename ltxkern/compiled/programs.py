"""Programs by case, calls that take one again, the workspace that launches share, and where a tier's tensors must lie."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ltxkern.compiled import extension
from ltxkern.compiled.steps import Call, Launch, Step
from ltxkern.compiled.tensors import DeviceLimits, device_limits, refuse_device

# Threads of a block of the elementwise kernels.
THREADS = 256


_Run = tuple[Any, tuple[Tensor | None, ...]]
# Programs that run, each with its tensors, where somebody wants to know.
_runs: ContextVar[list[_Run] | None] = ContextVar("ltxkern_program_runs", default=None)


class KnownCalls:
    """Programs that have served an op, by how the arguments of a call lie (csrc/known_calls.h).

    Args:
        fields: names of the arguments.
        indices: which of them hold indices, each with the one whose rows they are; None: no program is kept.
        followed: functions that return something true where torch has to see a call.
    """

    def __init__(
        self, fields: Sequence[str], indices: Mapping[str, str] | None, followed: Sequence[Callable[[], Any]]
    ) -> None:
        places = {field: place for place, field in enumerate(fields)}
        pairs = None if indices is None else [(places[name], places[table]) for name, table in indices.items()]
        self.made_of = None if pairs is None else (pairs, followed)
        self._kept: Any = None

    def __len__(self) -> int:
        kept = self._kept
        return 0 if kept is None else len(kept)

    def table(self) -> Any:
        """Where a call that is now chosen for may be noted; None where none is kept."""
        kept = self._kept
        if kept is None and self.made_of is not None:
            kept = self._kept = extension.known_calls(*self.made_of)
        return kept

    def again(self, args: Any) -> Any:
        """The outputs of a call like one that was noted; None where none was, or where torch has to see the call."""
        kept = self._kept  # another thread may forget it
        return None if kept is None else kept.again(args)

    def forget(self) -> None:
        """All of them."""
        self._kept = None


def run_noted(table: Any, run: Callable[[Any, Any], None], out: Any, args: Any) -> None:
    """`run(out, args)`; its program is kept in the table, where there is one, if that alone made the outputs of the arguments."""
    if table is None:
        run(out, args)
        return
    runs: list[_Run] = []
    token = _runs.set(runs)
    try:
        run(out, args)
    finally:
        _runs.reset(token)
    if len(runs) == 1:
        table.note(args, *runs[0], out)


def program(tier: str, steps: Callable[[Any], Sequence[Step | Call]], case: Any, arguments: int) -> Callable[..., None]:
    """The program of one case, made once: `steps(case)` are calls for the tier "cpu", launches for the others."""
    made = made_once(tier, steps, case, arguments)
    runs = _runs.get()
    if runs is None:
        return made

    def noted(*tensors: Tensor | None) -> None:
        made(*tensors)
        runs.append((made, tensors))

    return noted


@functools.lru_cache(maxsize=4096)
def made_once(
    tier: str, steps: Callable[[Any], Sequence[Step | Call]], case: Any, arguments: int
) -> Callable[..., None]:
    """`program`, of which nobody takes note. Cases that are equal have one: a number is of one type."""
    made = steps(case)
    if tier == "cpu":
        return extension.cpu_program([step for step in made if isinstance(step, Call)], arguments)
    return extension.program_builder(tier)([step for step in made if not isinstance(step, Call)], arguments)


def workspace(tier: str, case: Any, x: Tensor) -> Tensor | None:
    """Memory of `case.workspace_bytes` for what launches hand to one another, on x's device; CPU calls need none."""
    if tier == "cpu" or case.workspace_bytes == 0:
        return None
    return torch.empty(case.workspace_bytes, dtype=torch.uint8, device=x.device)


@functools.cache
def _limits(tier: str, device: int) -> DeviceLimits:
    def held(launch: Launch) -> int:
        return extension.held(tier, device, launch.kernel, launch.block, launch.shared_bytes, launch.cooperative)

    return device_limits(device)._replace(held=held)


def limits_of(tier: str, x: Tensor) -> DeviceLimits | None:
    """Limits of x's device, for a case whose launches depend on them; None for the tier "cpu"."""
    return None if tier == "cpu" else _limits(tier, x.device.index)


def refuse_elsewhere(tier: str, args: Sequence[Any]) -> str | None:
    """Why a tier cannot serve tensors where these lie, or None."""
    for value in args:
        # Most optional arguments are absent, and no check is as quick as this one.
        if value is None:
            continue
        if isinstance(value, Tensor):
            if tier != "cpu":
                return refuse_device(tier, value)
            if not value.is_cpu:
                return f"needs CPU tensors, got {value.device}"
        elif isinstance(value, (list, tuple)) and (reason := refuse_elsewhere(tier, value)) is not None:
            return reason
    return None
