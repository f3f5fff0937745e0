"""The receipt of a patch: a row for each site and for each place that was left alone, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ltxkern.dispatch import handed, registered
from ltxkern.patching.watch import Group, Patched, settle, watch
from ltxkern.registration import needs_dispatcher


@dataclass(eq=False)
class Site:
    """A place that runs on a fused op.

    Attributes:
        name: of the module, e.g. "decoder.mid_block.resnets.0.norm1".
        op: the op's name.
        contract: "exact" or "rounded", as the op's docstring says it; "exact" where the policy has its calls checked.
        calls: eager calls that the op served. Within a graph of torch.compile it serves and is not counted: a note there would be
            a side effect of the graph, which a checkpoint within it refuses.
        composed: eager calls that took the composition the op replaces (autocast, a dtype that the op does not take).
        backend: that of the last eager call, "" before it.
    """

    name: str
    op: str
    contract: str
    group: Group = field(repr=False)
    calls: int = 0
    composed: int = 0
    backend: str = ""
    _seen: Any = field(default=None, repr=False)

    def count(self, x: torch.Tensor, call: Callable[[torch.Tensor], Any] | None) -> None:
        """Note a call of the op on x, and who serves it where dtype or device are new.

        `call` is None where torch itself has the op. Where something traces or transforms nobody is asked: a tracer would see it.
        """
        if torch.compiler.is_compiling():
            return
        self.calls += 1
        seen = (x.dtype, x.device)
        if seen != self._seen and not needs_dispatcher(()):
            self._seen = seen
            self.backend = "torch" if call is None else self._serving(x, call)

    def _serving(self, x: torch.Tensor, call: Callable[[torch.Tensor], Any]) -> str:
        with torch.no_grad():
            args = handed(lambda: call(x))
        return "" if args is None else registered()[self.op].select(args)

    def serve(self, x: torch.Tensor, call: Callable[[torch.Tensor], Any]) -> Any:
        """A call of the op on x, counted."""
        self.count(x, call)
        return call(x)

    def compose(self) -> None:
        """Note a call that takes the composition."""
        if not torch.compiler.is_compiling():
            self.composed += 1

    def __getstate__(self) -> dict[str, Any]:
        """A copy counts anew."""
        return {**vars(self), "calls": 0, "composed": 0, "backend": "", "_seen": None}

    def row(self) -> dict[str, Any]:
        """What the report tells of it."""
        names = ("name", "op", "backend", "contract", "calls", "composed")
        return {name: getattr(self, name) for name in names}


class Left(NamedTuple):
    """A place that was left alone."""

    name: str
    reason: str
    already: bool = False  # fused, by an earlier patch


@dataclass
class Report:
    """What `patch` did; a context manager that undoes it at its end.

    Attributes:
        rows: the sites that run on a fused op.
        left: the places that were left alone, with the reason of each.
    """

    rows: list[Site] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    _groups: list[Group] = field(default_factory=list, repr=False)
    _watching: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def sites(self) -> list[str]:
        """Names of the sites that are fused now."""
        return [site.name for site in self._standing()]

    def add(self, group: Group) -> None:
        """Take over a group."""
        group.owned = True
        self._groups.append(group)
        self.rows += group.sites

    def watch(self, module: nn.Module, group: Group, names: Iterable[str]) -> None:
        """Release a group once one of these attributes of a module is another."""
        watch(module, group, names)
        self._watching.append(module)

    def adopt(self, model: nn.Module) -> None:
        """Settle also what an earlier patch, or that of what this is a copy of, watches for."""
        self._watching += [module for module in model.modules() if isinstance(module, Patched)]

    def holds(self, group: Group) -> bool:
        """Whether this report speaks for a group."""
        return any(own is group for own in self._groups)

    def undo(self) -> None:
        """Give every module the class that it had; twice is fine."""
        for group in reversed(self._groups):
            if not group.released:
                group.release("undone")
        for module in self._watching:
            settle(module)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _standing(self) -> list[Site]:
        return [site for site in self.rows if not site.group.released]

    def _left(self) -> list[Left]:
        return [*(Left(row.name, row.group.released) for row in self.rows if row.group.released), *self.left]

    def to_json(self) -> str:
        """Rows and places left alone, as JSON: `{"sites": [...], "left": [{"name", "reason"}]}`."""
        sites = [site.row() for site in self._standing()]
        return json.dumps(
            {"sites": sites, "left": [{"name": name, "reason": reason} for name, reason, _ in self._left()]}, indent=2
        )

    def __str__(self) -> str:
        """The table."""
        table = _table(
            ("site", "op", "backend", "contract", "eager calls", "composed"),
            [list(map(str, site.row().values())) for site in self._standing()],
        )
        if table:
            table += "\ncalls within a graph of torch.compile are not counted"
        left = _table(("left alone", "reason"), [[name or "(the model)", reason] for name, reason, _ in self._left()])
        return "\n\n".join(part for part in (table, left) if part) or "nothing was fused"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, *rows]
    if len(lines) == 1:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def give_back(model: nn.Module, reason: str) -> None:
    """Give every fused module of a model the class that it had, whichever report speaks for it."""
    patched = [module for module in model.modules() if isinstance(module, Patched)]
    for module in patched:
        group = getattr(vars(module).get("_ltxkern"), "group", None)
        if group is not None and not group.released:
            group.release(reason)
    for module in patched:
        settle(module)
