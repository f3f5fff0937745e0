"""Which norms of a model may include the activation behind them, and why others may not."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from ltxkern.ops.checks import FOREIGN_HOOKS, unplain
from ltxkern.patching import flow as flows
from ltxkern.patching import video_vae
from ltxkern.patching.blocks import Activated, ActivatedBefore, ResidualBlock, ResidualNames, residual_names
from ltxkern.patching.containers import taken_apart
from ltxkern.patching.flow import Flow, Node, UnreadableError
from ltxkern.patching.norms import FusedGroupNorm, Including, Passed, kind_of
from ltxkern.patching.reach import aliased, reached
from ltxkern.patching.report import Left, Report, Site
from ltxkern.patching.rules import CONTRACT, Rules, joined
from ltxkern.patching.watch import Group, mix, own_class, stands

_BETWEEN = (
    "something stands between it and the activation: a scale and shift, which no op takes, "
    "or a residual in a block of another form"
)
_LTX2 = "diffusers.models.transformers.transformer_ltx2"


@dataclass
class Found:
    """A norm by its name in the block, and what stands against fusing it."""

    name: str
    norm: nn.Module
    reasons: list[str] = field(default_factory=list)


class Place(NamedTuple):
    """A block, its name in the report and in the model, its children, and what it depends on that they may be fused."""

    path: str
    at: str
    block: nn.Module
    children: dict[str, nn.Module]
    asked: flows.Asked


class Finder:
    """Fuses the sites of one model into a report."""

    def __init__(self, model: nn.Module, prefix: str, rules: Rules, report: Report) -> None:
        self.model = model
        self.prefix = prefix
        self.rules = rules
        self.report = report
        self.parents = Counter(
            id(child) for module in model.modules() for child in module._modules.values() if child is not None
        )
        self.parents.update(aliased(model))
        kinds = {own_class(module) for module in model.modules()}
        self.changing = frozenset[str]().union(*(flows.beside_forward(kind)[1] for kind in kinds))
        report.adopt(model)

    def run(self) -> None:
        """Every module that holds a norm."""
        for name, block in list(self.model.named_modules()):
            path = joined(self.prefix, name) if name else self.prefix
            place = Place(path, name, block, dict(block.named_children()), set())
            if type(block).__module__ == _LTX2 and (stands(block) or _ltx2().is_ltx2(block)):
                self._ltx2(place)
            elif video_vae.upsampler(block, self.report):
                continue
            elif type(block).forward is nn.Sequential.forward:
                self._sequential(place)
            elif any(_may_be_norm(child) for child in place.children.values()):
                self._block(place)

    def _ltx2(self, place: Place) -> None:
        if not stands(place.block):
            _ltx2().fuse_module(place.path, place.block, self.rules, self.report)
            return
        held: Any = place.block._ltxkern
        self._again(place.path, held if isinstance(held, Group) else held.group)

    def _sequential(self, place: Place) -> None:
        for (name, norm), (behind, activation) in pairwise(place.children.items()):
            if self._fused_already(place.path, {name: norm}) or type(activation) is not nn.SiLU:
                continue
            if kind_of(norm) is None:
                if _may_be_norm(norm):
                    self.report.left.append(Left(joined(place.path, name), _unserved(norm)))
            else:
                found = self._found({name: norm}, activation)
                apart = taken_apart(self.model, place.at, self.changing, place.asked)
                _add(found, [apart] if apart else self._reached(place, name, behind))
                self._settle(place, found, activation)

    def _block(self, place: Place) -> None:
        norms = {name: child for name, child in place.children.items() if kind_of(child) is not None}
        if self._fused_already(place.path, norms):
            return
        silu = any(type(child) is nn.SiLU for child in place.children.values())
        try:
            flow = flows.read(place.block, lambda name: name in norms and _takes_one(norms[name]), self.changing)
        except UnreadableError as error:
            if silu:
                reason = f"{type(place.block).__name__}: {error}"
                self.report.left += [Left(joined(place.path, name), reason) for name in norms]
            return
        place.asked.update(flow.asked)
        for name in dict.fromkeys(call.name for call in flow.calls):
            if name == flows.SILU or type(place.children[name]) is nn.SiLU:
                self._activation(place, flow, name, norms)

    def _activation(self, place: Place, flow: Flow, name: str, norms: dict[str, nn.Module]) -> None:
        """One activation of a block, and all that goes into it."""
        sources = {node for call in flow.calls if call.name == name and call.inputs for node in call.inputs[0]}
        plainly = {node.name for node in sources if node.kind == "call"}
        beyond = {call.name for node in sources for call in _beyond(node)}
        for other in sorted((plainly | beyond) & place.children.keys() - norms.keys()):
            if _may_be_norm(place.children[other]):
                self.report.left.append(Left(joined(place.path, other), _unserved(place.children[other])))
        activation = None if name == flows.SILU else place.children[name]
        residual = residual_names(flow, place.block)
        if residual is not None and activation is not None and self._residual(place, residual, norms):
            return
        taken = [other for other in norms if other in plainly | beyond]
        if not taken:
            return
        found = self._found({other: norms[other] for other in taken}, activation)
        for item in found:
            if item.name in beyond:
                item.reasons.append(_BETWEEN)
        parameters = sorted({node.name for node in sources if node.kind == "parameter"})
        _add(found, _against_activation(place, flow, name, sources, set(taken)))
        _add(found, self._against_block(place, parameters))
        _add(found, self._reached(place, *taken, *([] if activation is None else [name])))
        for item in found:
            item.reasons += _against_calls(flow, name, item.name)
        self._settle(place, found, activation, _positions(place.block, parameters))

    def _residual(self, place: Place, names: ResidualNames, norms: dict[str, nn.Module]) -> bool:
        """Whether a block with a residual inside its last activation is one for GroupNorm's op; then it is dealt with."""
        chosen = {name: norms[name] for name in (names.first_norm, names.second_norm) if name in norms}
        kinds = [kind_of(norm) for norm in chosen.values()]
        if len(kinds) != 2 or any(kind is None or not kind.residual for kind in kinds):
            return False
        activation = place.children[names.activation]
        found = self._found(chosen, activation)
        _add(found, self._against_block(place, ["x"]))
        _add(found, self._reached(place, *chosen, names.activation))
        self._settle(place, found, activation, names)
        return True

    def _found(self, norms: dict[str, nn.Module], activation: nn.Module | None) -> list[Found]:
        """Norms, with what they and their activation are."""
        found = [Found(name, norm) for name, norm in norms.items()]
        for item in found:
            kind = kind_of(item.norm)
            assert kind is not None
            against = [self._unplain(item.norm), kind.misfit(item.norm), self.rules.against(kind.op, CONTRACT)]
            shared = self.parents[id(item.norm)] > 1
            item.reasons += [reason for reason in [*against, "is held in several places" if shared else None] if reason]
        if activation is not None:
            reason = self._unplain(activation)
            shared = self.parents[id(activation)] > 1
            _add(found, [f"its activation {reason}"] if reason else [])
            _add(found, ["its activation is held in several places"] if shared else [])
        return found

    def _reached(self, place: Place, *layers: str) -> list[str]:
        """Why other code may run one of these layers of a block."""
        return [reason for layer in layers if (reason := reached(self.model, place.at, layer))]

    def _unplain(self, module: nn.Module) -> str | None:
        return next(filter(None, (unplain(part, meta=self.rules.meta) for part in module.modules())), None)

    def _against_block(self, place: Place, parameters: list[str]) -> list[str]:
        """Why the code that was read is not what runs, or may not be replaced where parameters have to be."""
        held, kind = vars(place.block), type(place.block).__name__
        if "forward" in held and (parameters or not FOREIGN_HOOKS.keys() & held.keys()):
            return [f"{kind}, of which it is a part, has a forward of its own"]
        if parameters and stands(place.block):
            return [f"another activation of {kind} goes with its time embedding"]
        return []

    def _settle(
        self,
        place: Place,
        found: list[Found],
        activation: nn.Module | None,
        around: ResidualNames | tuple[tuple[str, int], ...] = (),
    ) -> None:
        """Fuse all norms that share an activation, or none."""
        blocked = next((item for item in found if item.reasons), None)
        if blocked is not None or activation is None:
            for item in found:
                other = f"shares its activation with {blocked.name}, which is left alone" if blocked else ""
                self.report.left.append(Left(joined(place.path, item.name), item.reasons[0] if item.reasons else other))
            return
        group = Group()
        for item in found:
            kind = kind_of(item.norm)
            assert kind is not None
            site = Site(joined(place.path, item.name), kind.op, CONTRACT, group)
            group.sites.append(site)
            mix(item.norm, kind.mixin, site, group)
            if kind.inner:
                mix(getattr(item.norm, kind.inner), FusedGroupNorm, site, group)
        mix(activation, Passed, group, group)
        if isinstance(around, ResidualNames):
            mix(place.block, ResidualBlock, around, group)
        else:
            video_vae.extend(place.block, [item.norm for item in found], group, self.report)
            if around:
                mix(place.block, ActivatedBefore, Activated(around, bool(getattr(activation, "inplace", False))), group)
        self._watch(place, group)
        self.report.add(group)

    def _watch(self, place: Place, group: Group) -> None:
        """Have the group released where the code around it comes to be another."""
        holders = [self.model]
        for name in place.at.split(".") if place.at else ():
            holders.append(getattr(holders[-1], name))
        for holder in holders:
            if own_class(holder) not in (nn.ModuleList, nn.ModuleDict):
                self.report.watch(holder, group, ("forward",))
        for module, name in place.asked:
            self.report.watch(module, group, (name,))

    def _fused_already(self, path: str, norms: dict[str, nn.Module]) -> bool:
        already = {name: norm for name, norm in norms.items() if isinstance(norm, Including)}
        for name, norm in already.items():
            self._again(joined(path, name), norm._ltxkern.group)
        return bool(already)

    def _again(self, path: str, group: Group) -> None:
        """A module of an earlier patch: this report takes over what no other speaks for."""
        if not group.owned:
            self.report.add(group)
        elif not self.report.holds(group):
            self.report.left.append(Left(path, "is fused already, by an earlier patch", already=True))


def _against_activation(place: Place, flow: Flow, name: str, sources: set[Node], norms: set[str]) -> list[str]:
    """What stands against taking an activation out."""
    if name == flows.SILU:
        return ["SiLU is called as a function: there is no module to take it out of"]
    reasons = []
    calls = [call for call in flow.calls if call.name == name]
    strangers = [
        n for n in sources if n.kind not in ("parameter", "call") and not any(c.name in norms for c in _beyond(n))
    ]
    if strangers or any(n.kind == "call" and n.name not in norms for n in sources):
        reasons.append("its activation serves other values as well")
    for node in sources:
        if node.kind == "parameter" and any(use not in calls for use in flow.uses[node]):
            reasons.append(f"{node.name}, which goes into its activation, has other uses")
    return [*reasons, *_mentioned(place, flow, name), *(r for n in sorted(norms) for r in _mentioned(place, flow, n))]


def _mentioned(place: Place, flow: Flow, child: str) -> list[str]:
    kind = own_class(place.block)
    if child in flow.mentioned or child in flows.beside_forward(kind)[0]:
        return [f"{child} is used otherwise than by a call in forward"]
    return []


def _against_calls(flow: Flow, activation: str, norm: str) -> Iterator[str]:
    """What stands against a norm in the calls of it."""
    for call in flow.calls:
        if call.name == norm:
            if len(call.inputs) != 1:
                yield "is called with more than its input"
            if any(use is None or use.name != activation for use in flow.uses.get(call, [None])):
                yield "its result has other uses"


def _positions(block: nn.Module, parameters: list[str]) -> tuple[tuple[str, int], ...]:
    """Parameters of a block's forward with their places behind self."""
    names = list(inspect.signature(own_class(block).forward).parameters)
    return tuple((name, names.index(name) - 1) for name in parameters)


def _add(found: list[Found], reasons: list[str]) -> None:
    for item in found:
        item.reasons += reasons


def _ltx2() -> Any:
    """What knows the LTX-2 transformer: it imports diffusers, which is there where the model is."""
    from ltxkern.patching import ltx2_model

    return ltx2_model


def _may_be_norm(child: nn.Module) -> bool:
    return any("norm" in kind.__name__.lower() for kind in type(child).__mro__)


def _unserved(norm: nn.Module) -> str:
    condition = "" if _takes_one(norm) else ": it takes a condition beside its input"
    return f"{type(norm).__name__} is no norm that an op serves{condition}"


def _takes_one(norm: nn.Module) -> bool:
    return len(inspect.signature(type(norm).forward).parameters) == 2


def _beyond(node: Node) -> Iterator[Node]:
    """Calls that arithmetic alone stands before."""
    if node.kind in ("sum", "arithmetic"):
        for part in (part for value in node.inputs for part in value):
            if part.kind == "call":
                yield part
            yield from _beyond(part)
