"""Classes mixed in front of a model's own ones, and what becomes of a fused group once its model is changed.

A group stands on what was read when it was fused: which modules there are, what their code asks for, that nobody looks between a
norm and its activation. Whoever changes that gives the group's classes back first. It is seen where an attribute is set, where a
layer is put in or taken out; calls pay nothing for it.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn

from ltxkern.ops.checks import FOREIGN_HOOKS

if TYPE_CHECKING:
    from ltxkern.patching.report import Site


class Member(NamedTuple):
    """A module of a group and the class that it had."""

    module: nn.Module
    kind: type


@dataclass(eq=False)
class Group:
    """Modules that are fused together or not at all: a block's norms and the activation after them.

    Attributes:
        owned: whether a report speaks for them; one of a copy does not.
        released: why they are no longer fused, "" while they are.
    """

    members: list[Member] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    owned: bool = True
    released: str = ""

    @property
    def group(self) -> Group:
        """Itself: a part may hold no more than its group."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """No report speaks for a copy."""
        return {**vars(self), "owned": False}

    def give_back(self, module: nn.Module) -> None:
        """Take one module out again."""
        member = next(member for member in self.members if member.module is module)
        self.members.remove(member)
        _restore(*member)

    def release(self, reason: str) -> None:
        """Give every module its class back."""
        for module, kind in self.members:
            _check(module, kind)
        self.released = reason
        for module, kind in self.members:
            _restore(module, kind)


class Patched(nn.Module):
    """Mixed in front of the class of a module that a patch changed, or whose changes it has to see."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made anew from the module's own one: no name leads to it."""
        kinds = type(self).__bases__
        return _empty, kinds, self.__getstate__() if hasattr(self, "__getstate__") else vars(self)

    def __init_subclass__(cls) -> None:
        """What a stack does with each new class is not for ours."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _released(_broken(self, name, value)):
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name != "forward" and _released(_broken(self, name, None)):
            delattr(self, name)
        else:
            super().__delattr__(name)


class Fused(Patched):
    """A module with another forward."""

    _ltxkern: Any


class Part(Fused):
    """A module whose own call a patch has taken over or passes: alone it is not what its class says.

    A hook has to see what its class gives and takes, and so has a forward that is put in. Those of offloading only move weights.
    """

    # Attributes that are asked for at each call.
    LIVE: ClassVar[frozenset[str]] = frozenset({"eps"})


class Sequence(Patched):
    """A sequence that holds parts of a group: they stay together."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and _released(_parted(self)):
            settle(self)
            return self[index]
        return super().__getitem__(index)  # type: ignore[misc]


def _releasing(name: str, mixin: type, broken: Callable[..., Iterable[tuple[Group, str]]]) -> None:
    """A method of a mixin that is called once the groups it breaks are released."""

    def method(self: Any, *args: Any, **keywords: Any) -> Any:
        if _released(broken(self, *args, **keywords)):
            return getattr(self, name)(*args, **keywords)
        return getattr(super(mixin, self), name)(*args, **keywords)

    setattr(mixin, name, method)


def _hooked(module: Any, /, *_: Any, **__: Any) -> Iterator[tuple[Group, str]]:
    yield module._ltxkern.group, "a hook was registered on it or beside it"


def _parted(module: Any, /, *_: Any, **__: Any) -> Iterator[tuple[Group, str]]:
    for part in module._modules.values():
        if isinstance(part, Part):
            yield part._ltxkern.group, "the sequence that holds it was changed or cut"


def _broken(module: Any, name: str, value: Any) -> Iterator[tuple[Group, str]]:
    """Groups that no longer stand once an attribute of a module is that value, each with the reason."""
    held, kind = vars(module), own_class(module).__name__
    if name == "__class__":
        if getattr(value, "forward", None) is type(module).forward:
            return
        name = "forward"
    for part in (held["_modules"].get(name), value):
        if isinstance(part, Part):
            yield part._ltxkern.group, f"{name} of {kind} was put in or taken out"
    if name == "forward" and (FOREIGN_HOOKS.keys() & held.keys() or _is_own_forward(module, value)):
        return
    if isinstance(module, Part) and _turns(module, name, value):
        put_in = "a forward was put into it or beside it"
        yield module._ltxkern.group, put_in if name == "forward" else f"{name} of {kind} was set"
    if name not in held or held[name] is not value:
        for group in held.get("_ltxkern_watches", {}).get(name, ()):
            yield group, f"{name} of {kind} was set"


def _registered(module: Any, /, *args: Any, **keywords: Any) -> Iterator[tuple[Group, str]]:
    """As for `register_parameter(name, value)`, whatever its words for these are."""
    values = [*args, *(value for word, value in keywords.items() if word != "name")]
    name = keywords["name"] if "name" in keywords else values.pop(0)
    return _broken(module, name, values[0])


for _name in (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_backward_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
):
    _releasing(_name, Part, _hooked)
for _name in ("add_module", "register_parameter", "register_buffer"):
    _releasing(_name, Patched, _registered)
_releasing("insert", Sequence, _parted)


def _released(broken: Iterable[tuple[Group, str]]) -> bool:
    """Release groups; whether there was one that stood."""
    standing = {group: reason for group, reason in broken if not group.released}
    for group, reason in standing.items():
        group.release(reason)
    return bool(standing)


def _is_own_forward(module: Any, value: Any) -> bool:
    """Whether a forward is that of the module's class, as hooks put it back, or compiled."""
    value = getattr(value, "_torchdynamo_orig_callable", value)
    kind: Any = type(module)
    return getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is kind.forward


def _turns(part: Part, name: str, value: Any) -> bool:
    """Whether a part is no longer what was fused once an attribute is that value."""
    if name == "forward":
        return True
    if name in part.LIVE or name not in _spoken(own_class(part)):
        return False
    held = vars(part)
    if held["_parameters"].get(name) is not None:
        return type(value) is not nn.Parameter
    return name not in held or held[name] is not value


@functools.cache
def _spoken(kind: type) -> frozenset[str]:
    """What the code of a class asks for when it is called, and does not set itself."""
    codes = [
        value.__code__
        for base in kind.__mro__
        if base not in (nn.Module, object)
        for name, value in vars(base).items()
        if name != "__init__" and inspect.isfunction(value)
    ]
    own = {step.argval for code in codes for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    return frozenset(name for code in codes for name in code.co_names) - own


@functools.cache
def fused(mixin: Any, kind: Any) -> Any:
    """`kind` with the forward of `mixin`, under the name of `kind`; called, it makes a `kind`."""

    @functools.wraps(kind.__init__)
    def plainly(self: Any, *args: Any, **keywords: Any) -> None:
        if type(self) is made:
            _dress(self, kind)
        kind.__init__(self, *args, **keywords)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made = type(kind.__name__, (mixin, kind), {**names, "__init__": plainly, "_ltxkern_own": kind})
    return made


def _empty(mixin: Any, kind: Any) -> nn.Module:
    made = fused(mixin, kind)
    return made.__new__(made)


def own_class(module: Any) -> Any:
    """The class that a module had before any patch."""
    kind = type(module)
    return vars(kind).get("_ltxkern_own", kind)


def stands(module: Any) -> bool:
    """Whether a module runs on another forward."""
    return isinstance(module, Fused)


def mix(module: Any, mixin: Any, held: Any, group: Group) -> None:
    """Give a module of a group the forward of `mixin`, and what that reads."""
    kind = own_class(module)
    group.members.append(Member(module, kind))
    vars(module)["_ltxkern"] = held
    _dress(module, fused(mixin, kind))


def watch(module: Any, group: Group, names: Iterable[str]) -> None:
    """Release a group where one of these attributes of a module is set, or a part of the group is put in or taken out."""
    watches = vars(module).setdefault("_ltxkern_watches", {})
    for name in names:
        watches.setdefault(name, []).append(group)
    if not isinstance(module, Patched):
        _dress(module, _watching(own_class(module)))


def settle(module: Any) -> None:
    """Forget released groups; a module that nothing is left to watch for has its class again."""
    held = vars(module)
    watches = {
        name: standing
        for name, groups in held.pop("_ltxkern_watches", {}).items()
        if (standing := [group for group in groups if not group.released])
    }
    if watches:
        held["_ltxkern_watches"] = watches
    elif type(module) is _watching(own_class(module)):
        _dress(module, own_class(module))


def _watching(kind: Any) -> Any:
    return fused(Sequence if issubclass(kind, nn.Sequential) else Patched, kind)


def _dress(module: Any, kind: type) -> None:
    object.__setattr__(module, "__class__", kind)


def _check(module: Any, kind: type) -> None:
    if "_ltxkern" in vars(module) and own_class(module) is not kind:
        raise RuntimeError(
            f"a {kind.__name__} cannot be given its class back: it has become a {type(module).__name__} since it was patched; "
            "take that back first"
        )


def _restore(module: Any, kind: type) -> None:
    if vars(module).pop("_ltxkern", None) is not None:
        _dress(module, _watching(kind))
        settle(module)
