"""Whether code reaches a layer otherwise than by the calls that were read: from a block above it, through an alias, by a walk.

A block's forward is read call by call in `flow`, and containers in `containers`. What neither sees is looked for here, in the
source of every class on the way down to the layer; a class whose source cannot be read is taken to do none of it.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from ltxkern.ops.checks import FOREIGN_HOOKS
from ltxkern.patching import source
from ltxkern.patching.watch import own_class

_ENTRIES = ("forward", "__call__", "encode", "decode")
# Of a module: they hand out what it holds.
WALKS = {
    "children",
    "named_children",
    "modules",
    "named_modules",
    "_modules",
    "get_submodule",
    "__dict__",
    "__getattr__",
    "__getitem__",
    "__iter__",
}
# Functions that look at a module without calling what it holds.
LOOKING = {"isinstance", "hasattr", "type", "id", "super", "len", "callable", "bool"}


class _Reach(NamedTuple):
    """What the code of a class does beside calling its children.

    Attributes:
        attributes: names that it asks other things than itself for.
        walk: how a call of it reaches layers that its code does not name, "" where none does.
    """

    attributes: frozenset[str]
    walk: str


def aliased(model: nn.Module) -> set[int]:
    """Modules that stand in a list, tuple, set or dict beside the registered ones, by id."""
    found: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name == "_modules" or not isinstance(value, (list, tuple, set, dict)):
                continue
            parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
            found.update(id(part) for part in parts if isinstance(part, nn.Module))
    return found


def reached(model: nn.Module, path: str, layer: str) -> str | None:
    """Why a layer of the block at `path` may be run by other code than the block's own forward."""
    holder: Any = model
    for step in ["", *path.split(".")] if path else [""]:
        holder = getattr(holder, step) if step else holder
        name = type(holder).__name__
        if "forward" in vars(holder) and not FOREIGN_HOOKS.keys() & vars(holder).keys():
            return f"{name}, of which it is a part, has a forward of its own"
        reach = _reach(own_class(holder))
        if layer in reach.attributes:
            return f"{layer} is used in {name}, outside of the block that holds it"
        if reach.walk:
            return f"{name} {reach.walk}"
    return None


@functools.cache
def _reach(kind: Any) -> _Reach:
    attributes: set[str] = set()
    methods: dict[str, list[ast.FunctionDef]] = {}
    for name, held, function in source.methods(kind):
        tree = source.parsed(function)
        if not inspect.isfunction(held) or not isinstance(tree, ast.FunctionDef):
            continue
        methods.setdefault(name, []).append(tree)
        me = tree.args.args[0].arg if tree.args.args else ""
        attributes.update(
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == me)
        )
        attributes.update(filter(None, map(_asked_by_name, ast.walk(tree))))
    if kind.__module__.startswith("torch."):
        return _Reach(frozenset(), "")
    waiting, seen = [name for name in _ENTRIES if name in methods], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        # The nearest one runs; those behind it too where it asks for them.
        trees = methods[name]
        above = any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(trees[0]))
        for tree in trees if above else trees[:1]:
            walk, spoken = _walks(tree)
            if walk:
                return _Reach(frozenset(attributes), walk)
            waiting += [other for other in spoken if other in methods]
    return _Reach(frozenset(attributes), "")


def _walks(tree: ast.FunctionDef) -> tuple[str, set[str]]:
    """How a method reaches what it does not name, and what it asks itself for."""
    me = tree.args.args[0].arg if tree.args.args else ""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    spoken = set()
    for node in parents:
        if not isinstance(node, ast.Name) or node.id != me:
            continue
        parent = parents[node]
        if isinstance(parent, ast.Attribute):
            spoken.add(parent.attr)
            if parent.attr in WALKS:
                return f"reaches its layers by {parent.attr}", spoken
        elif not isinstance(parent, ast.Compare) and not _looks(parent):
            return f"hands itself to other code in {tree.name}", spoken
    return "", spoken


def _looks(call: ast.AST) -> bool:
    """Whether a function that is handed a module looks at it, and no more."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return False
    return call.func.id in LOOKING or "parameter" in call.func.id or _asked_by_name(call) is not None


def _asked_by_name(call: ast.AST) -> str | None:
    """The constant name that `getattr` is given."""
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "getattr":
        name = call.args[1]
        return str(name.value) if isinstance(name, ast.Constant) else None
    return None
