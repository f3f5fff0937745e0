"""Whether the code around a sequence of layers takes it apart, so that a layer may run without the one behind it.

Read from the source of the classes that hold it, cautiously as in `flow`: a sequence may be called, handed to a function, asked for
an attribute or compared; any other use counts as taking it apart.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Functions that hand out the layers of what they are given.
_OPENING = {"list", "tuple", "iter", "next", "enumerate", "zip", "reversed", "map", "filter", "sorted"}
_OPENING_METHODS = {"children", "named_children", "modules", "named_modules", "_modules"}


class _Use(NamedTuple):
    """An attribute that a class takes apart, or of which it takes the elements apart."""

    name: str
    of_self: bool
    elements: bool


def taken_apart(model: nn.Module, path: str) -> str | None:
    """Why the layers of a sequence may run one by one, or None where its holders call it as a whole.

    Args:
        path: of the sequence in the model, "" for the model itself.
    """
    names = path.split(".") if path else []
    holders = [model]
    for name in names[:-1]:
        holders.append(getattr(holders[-1], name))
    within = False  # another container
    while holders and type(holders[-1]) in _CONTAINERS:
        holders.pop()
        within = True
    if not holders or not names:
        return None
    name = names[len(holders) - 1]
    for holder in holders:
        kind: Any = type(holder)
        uses = _uses(kind)
        if uses is None:
            if holder is holders[-1]:
                return f"the source of {kind.__name__}, which holds it, cannot be read"
            continue
        for use in uses:
            if use.name == name and use.elements == within and (holder is holders[-1] or not use.of_self):
                return f"{name} is taken apart in {kind.__name__}"
    return None


@functools.cache
def _uses(kind: type) -> frozenset[_Use] | None:
    """What the methods of a class take apart; None where the source of one cannot be read."""
    found: set[_Use] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("torch."):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if inspect.isfunction(value) else getattr(value, "fget", None)
            if name == "__init__" or not inspect.isfunction(function):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):
                return None
            found.update(_opened(tree))
    return frozenset(found)


def _opened(tree: ast.AST) -> Iterator[_Use]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    for node in parents:
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load) or _whole(node, parents):
            continue
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        yield _Use(node.attr, of_self, elements=False)
        if not _elements_whole(node, parents, names):
            yield _Use(node.attr, of_self, elements=True)


def _whole(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a value is called, handed over, asked for an attribute, compared or tested, and no more."""
    parent = parents[node]
    if isinstance(parent, ast.keyword):
        parent = parents[parent]
    if isinstance(parent, ast.Call):
        return not (isinstance(parent.func, ast.Name) and parent.func is not node and parent.func.id in _OPENING)
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _OPENING_METHODS
    if isinstance(parent, (ast.If, ast.IfExp)):
        return parent.test is node
    if isinstance(parent, ast.Subscript):
        return parent.slice is node
    return isinstance(parent, (ast.Compare, ast.BoolOp, ast.UnaryOp))


def _elements_whole(node: ast.Attribute, parents: dict[ast.AST, ast.AST], names: list[ast.Name]) -> bool:
    """Whether what a list of layers gives by an index or in a loop is used as a whole."""
    top: ast.AST = node
    while top in parents:
        parent = parents[top]
        if isinstance(parent, ast.Subscript) and top is node:
            return parent.value is node and not isinstance(parent.slice, ast.Slice) and _whole(parent, parents)
        if isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is top and isinstance(top, ast.expr):
            target = _target_of(node, top, parent.target)
            drawn = {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
            return all(_whole(name, parents) for name in names if name.id in drawn)
        if isinstance(parent, ast.stmt):
            return False
        top = parent
    return False


def _target_of(node: ast.Attribute, drawn_from: ast.expr, target: ast.expr) -> ast.expr:
    """What of a loop's target is an element of the list: the whole, or its part where several are zipped or counted."""
    if not isinstance(target, ast.Tuple) or not isinstance(drawn_from, ast.Call):
        return target
    kind = drawn_from.func.id if isinstance(drawn_from.func, ast.Name) else ""
    if kind == "enumerate" and len(target.elts) == 2:
        return target.elts[1]
    if kind == "zip" and node in drawn_from.args and len(target.elts) == len(drawn_from.args):
        return target.elts[drawn_from.args.index(node)]
    return target
