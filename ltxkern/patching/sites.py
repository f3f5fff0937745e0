"""Which norms of a model may include the activation behind them, and why others may not."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from ltxkern.ops.plain import unplain
from ltxkern.patching import flow as flows
from ltxkern.patching.blocks import Activated, ActivatedBefore, ResidualBlock, residual_names
from ltxkern.patching.flow import Flow, Node, UnreadableError
from ltxkern.patching.norms import Fused, Including, Passed, kind_of, mix
from ltxkern.patching.report import Group, Left, Report, Site
from ltxkern.patching.rules import CONTRACT, Rules, joined

@dataclass
class Found:
    """A norm and the reasons against fusing it."""

    name: str
    norm: nn.Module
    reasons: list[str] = field(default_factory=list)


class Finder:
    """Fuses the sites of one model into a report."""

    def __init__(self, model: nn.Module, prefix: str, rules: Rules, report: Report) -> None:
        self.prefix = prefix
        self.rules = rules
        self.report = report
        self.model = model
        self.parents = Counter(
            id(child) for module in model.modules() for child in module._modules.values() if child is not None
        )

    def run(self) -> None:
        """Every module that holds a norm."""
        for name, block in list(self.model.named_modules()):
            path = self.prefix + name
            if type(block).__module__ == _LTX2 and _ltx2().is_ltx2(block):
                _ltx2().fuse_module(path, block, self.rules, self.report)
            elif isinstance(block, Fused) and type(block).__module__ == _LTX2:
                held = block._ltxkern
                self._again(path, held if isinstance(held, Group) else held.group)
            elif type(block).forward is nn.Sequential.forward:
                self._sequential(path, block)
            elif any(_may_be_norm(child) for child in block.children()):
                self._block(path, block)

    def _sequential(self, path: str, block: nn.Sequential) -> None:
        for (name, norm), (_, activation) in pairwise(block.named_children()):
            if kind_of(norm) is None or self._fused_already(path, {name: norm}) or type(activation) is not nn.SiLU:
                continue
            found = self._found(path, {name: norm}, activation, None)
            self._settle(found, activation, block, None)

    def _block(self, path: str, block: nn.Module) -> None:
        children = dict(block.named_children())
        norms = {name: child for name, child in children.items() if kind_of(child) is not None}
        if self._fused_already(path, norms):
            return
        if not norms and not any(type(child) is nn.SiLU for child in children.values()):
            return
        try:
            flow = flows.read(block, lambda name: name in norms and _takes_one(norms[name]))
        except UnreadableError as error:
            if any(type(child) is nn.SiLU for child in children.values()):
                self.report.left += [Left(joined(path, name), f"{type(block).__name__}: {error}") for name in norms]
            return
        for name in dict.fromkeys(call.name for call in flow.calls):
            if name == flows.SILU or type(children[name]) is nn.SiLU:
                self._activation(path, block, flow, name, norms)

    def _activation(self, path: str, block: nn.Module, flow: Flow, name: str, norms: dict[str, nn.Module]) -> None:
        """One activation of a block, and all that goes into it."""
        children = dict(block.named_children())
        calls = [call for call in flow.calls if call.name == name]
        sources = set().union(*(call.inputs[0] for call in calls if call.inputs))
        direct = {node.name: children[node.name] for node in sources if node.kind == "call" and node.name in norms}
        beyond = {call.name for node in sources for call in _beyond(node) if call.name in children}
        behind = {other: norms[other] for other in sorted(beyond & norms.keys())}
        plainly = {node.name for node in sources if node.kind == "call" and node.name in children}
        for other in sorted(n for n in (beyond | plainly) - norms.keys() if _may_be_norm(children[n])):
            self.report.left.append(Left(joined(path, other), f"{type(children[other]).__name__} is no norm that an op serves"))
        residual = residual_names(flow, block)
        if residual is not None and {residual.first_norm, residual.second_norm} <= norms.keys():
            chosen = {n: norms[n] for n in (residual.first_norm, residual.second_norm)}
            if all(kind_of(norm).op == "group_norm_silu" for norm in chosen.values()):
                found = self._found(path, chosen, children[name], block)
                convolutions = (children[residual.first], children[residual.second])
                self._add(found, [r for c in convolutions for r in [self._unplain(c)] if r], "a convolution of it ")
                self._settle(found, children[name], block, (ResidualBlock, residual))
                return
        if not direct and not behind:
            return
        activation = None if name == flows.SILU else children[name]
        found = self._found(path, {**direct, **behind}, activation, block)
        for item in found:
            own = item.name.rpartition(".")[2]
            if own in behind:
                item.reasons.append("something stands between it and the activation (a scale and shift, or a residual)")
        parameters = {node.name for node in sources if node.kind == "parameter"}
        strangers = [n for n in sources if n.kind != "parameter" and n.name not in direct and not _norms_in(n, behind)]
        if activation is None:
            self._add(found, ["SiLU is called as a function: there is no module to take it out of"])
        elif strangers:
            self._add(found, ["its activation serves other values as well"])
        for node in [*sources, *flow.calls]:
            if node.kind == "parameter" and any(use not in calls for use in flow.uses[node]):
                self._add(found, [f"{node.name}, which goes into its activation, has other uses"])
            if node.kind == "call" and node.name in direct and any(use not in calls for use in flow.uses.get(node, [None])):
                self._add(found, ["its result has other uses"], only=joined(path, node.name))
            if node.kind == "call" and node.name in direct and len(node.inputs) != 1:
                self._add(found, ["is called with more than its input"], only=joined(path, node.name))
        outside = flows.beside_forward(type(block))[0]
        for child in {*direct, name}:
            if child in flow.mentioned or child in outside:
                self._add(found, [f"{child} is used otherwise than by a call in forward"])
        before = None
        if parameters:
            positions = list(inspect.signature(type(block).forward).parameters)
            before = (ActivatedBefore, tuple((p, positions.index(p) - 1) for p in sorted(parameters)))
            if isinstance(block, Fused):
                self._add(found, [f"another activation of {type(block).__name__} goes with its time embedding"])
            if (reason := unplain(block, meta=True)) is not None and not reason.endswith("hooks"):
                self._add(found, [f"{type(block).__name__}, which has to activate its time embedding, {reason}"])
        self._settle(found, activation, block, before)

    def _found(
        self, path: str, norms: dict[str, nn.Module], activation: nn.Module | None, block: nn.Module | None
    ) -> list[Found]:
        """Norms with what stands against each by itself, and against all of them."""
        found = [Found(joined(path, name), norm) for name, norm in norms.items()]
        for item in found:
            kind = kind_of(item.norm)
            assert kind is not None
            against = [self._unplain(item.norm), kind.misfit(item.norm), self.rules.against(kind.op, CONTRACT)]
            if self.parents[id(item.norm)] > 1:
                against.append("is held in several places")
            item.reasons += [reason for reason in against if reason]
        if activation is not None:
            if (reason := self._unplain(activation)) is not None:
                self._add(found, [f"its activation {reason}"])
            if self.parents[id(activation)] > 1:
                self._add(found, ["its activation is held in several places"])
        if block is not None and "forward" in vars(block) and not {"_hf_hook", "_diffusers_hook"} & vars(block).keys():
            self._add(found, [f"{type(block).__name__} has a forward of its own"])
        return found

    def _unplain(self, module: nn.Module) -> str | None:
        return next(filter(None, (unplain(part, meta=self.rules.meta) for part in module.modules())), None)

    @staticmethod
    def _add(found: list[Found], reasons: list[str], prefix: str = "", only: str | None = None) -> None:
        for item in found:
            if only in (None, item.name):
                item.reasons += [prefix + reason for reason in reasons]

    def _settle(
        self, found: list[Found], activation: nn.Module | None, block: nn.Module, around: tuple[type[Fused], Any] | None
    ) -> None:
        """Fuse all norms that share an activation, or none."""
        blocked = next((item for item in found if item.reasons), None)
        if blocked is not None or activation is None:
            for item in found:
                reason = item.reasons[0] if item.reasons else f"shares its activation with {blocked.name}, which is left alone"
                self.report.left.append(Left(item.name, reason))
            return
        group = Group([], [])
        for item in found:
            kind = kind_of(item.norm)
            assert kind is not None
            site = Site(item.name, kind.op, CONTRACT, group=group)
            group.sites.append(site)
            mix(item.norm, kind.mixin, site, group)
        if around is None or around[0] is ActivatedBefore:
            mix(activation, Passed, Site("", "", CONTRACT, group=group), group)
        if around is not None:
            mixin, held = around
            if mixin is ActivatedBefore:
                held = Activated(held, group)
            else:
                held.group = group
            mix(block, mixin, held, group)
        self.report.add(group)

    def _fused_already(self, path: str, norms: dict[str, nn.Module]) -> bool:
        already = {name: norm for name, norm in norms.items() if isinstance(norm, Including)}
        for name, norm in already.items():
            self._again(joined(path, name), norm._ltxkern.group)
        return bool(already)

    def _again(self, path: str, group: Group | None) -> None:
        """A module of an earlier patch: this report takes over what no other speaks for."""
        assert group is not None
        if not group.owned:
            self.report.add(group)
        elif not self.report.holds(group):
            self.report.left.append(Left(path, "is fused already, by an earlier patch", already=True))


_LTX2 = "diffusers.models.transformers.transformer_ltx2"


def _ltx2() -> Any:
    """What knows the LTX-2 transformer: it imports diffusers, which is there where the model is."""
    from ltxkern.patching import ltx2_model

    return ltx2_model


def _may_be_norm(child: nn.Module) -> bool:
    return "norm" in type(child).__name__.lower()


def _takes_one(norm: nn.Module) -> bool:
    return len(inspect.signature(type(norm).forward).parameters) == 2


def _beyond(node: Node) -> Iterator[Node]:
    """Calls that arithmetic alone stands before."""
    if node.kind in ("sum", "arithmetic"):
        for part in (part for value in node.inputs for part in value):
            if part.kind == "call":
                yield part
            yield from _beyond(part)


def _norms_in(node: Node, behind: dict[str, Any]) -> bool:
    return node.kind in ("sum", "arithmetic") and bool(behind)
