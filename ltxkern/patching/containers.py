"""Whether the code around a sequence of layers takes it apart, so that a layer may run without the one behind it.

Read from the source of the classes that hold it, cautiously as in `flow`: a sequence may be called, handed to a checkpoint, asked
for an attribute or compared; any other use counts as taking it apart.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ltxkern.patching import source
from ltxkern.patching.flow import Asked, UnreadableError, asked_by, changing, known
from ltxkern.patching.reach import LOOKING, WALKS
from ltxkern.patching.watch import own_class

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Use(NamedTuple):
    """An attribute that a class takes apart, or of which it takes the elements apart."""

    name: str
    of_self: bool
    elements: bool


def taken_apart(model: nn.Module, path: str, around: frozenset[str], asked: Asked) -> str | None:
    """Why the layers of a sequence may run one by one, or None where its holders call it as a whole.

    Args:
        path: of the sequence in the model, "" for the model itself.
        around: attributes that some code of the model sets.
        asked: takes what the answer depends on.
    """
    names = path.split(".") if path else []
    holders = [model]
    for name in names[:-1]:
        holders.append(getattr(holders[-1], name))
    within = False  # another container
    while holders and own_class(holders[-1]) in _CONTAINERS:
        holders.pop()
        within = True
    if path:
        own = own_class(model.get_submodule(path))
        if own is not nn.Sequential and any(inspect.isfunction(v) for n, v in vars(own).items() if n != "__init__"):
            return f"{own.__name__} is a sequence with methods of its own"
    if not holders or not names:
        return None
    name = names[len(holders) - 1]
    for holder in holders:
        kind = own_class(holder)
        try:
            uses = list(_uses(holder, around, asked))
        except UnreadableError:
            if holder is holders[-1]:
                return f"the source of {kind.__name__}, which holds it, cannot be read"
            continue
        for use in uses:
            if use.name == name and use.elements == within and (holder is holders[-1] or not use.of_self):
                return f"{name} is taken apart in {kind.__name__}"
    return None


_Parents = dict[ast.AST, ast.AST]


def _uses(holder: Any, around: frozenset[str], asked: Asked) -> Iterator[_Use]:
    """What the methods of a module take apart, on the branches that this module can take."""
    kind = own_class(holder)
    for parents, found in _methods(kind):
        for node, use in found:
            if _reached(node, parents, holder, around | changing(kind), asked):
                yield use


@functools.cache
def _methods(kind: type) -> list[tuple[_Parents, list[tuple[ast.AST, _Use]]]]:
    found = []
    for method in source.methods(kind):
        tree = source.parsed(method.function)
        if tree is None:
            raise UnreadableError(f"the source of {kind.__name__} cannot be read")
        parents: _Parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        found.append((parents, list(_opened(tree, parents))))
    return found


def _opened(tree: ast.AST, parents: _Parents) -> Iterator[tuple[ast.AST, _Use]]:
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    for node in parents:
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load) or _whole(node, parents):
            continue
        of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        if not _in_order(node, parents):
            yield node, _Use(node.attr, of_self, elements=False)
        if not _elements_whole(node, parents, names):
            yield node, _Use(node.attr, of_self, elements=True)


def _reached(node: ast.AST, parents: _Parents, holder: Any, may_change: frozenset[str], asked: Asked) -> bool:
    """Whether no test on what the holder has keeps a piece of code from running."""
    while node in parents:
        parent = parents[node]
        if isinstance(parent, (ast.If, ast.IfExp)) and node is not parent.test:
            value = known(holder, parent.test, "self", may_change)
            body = node in parent.body if isinstance(parent, ast.If) else node is parent.body
            if value is not None and value != body:
                asked.update(asked_by(holder, parent.test))
                return False
        node = parent
    return True


def _in_order(node: ast.Attribute, parents: _Parents) -> bool:
    """Whether a loop calls each layer on what the one before it gave, `x = layer(x)`, and looks at x only for convolutions."""
    loop = parents[node]
    if not isinstance(loop, ast.For) or loop.iter is not node or not isinstance(loop.target, ast.Name) or loop.orelse:
        return False
    layer = loop.target.id
    carried: set[str] = set()
    given: set[ast.AST] = set()
    for name in (
        part for part in ast.walk(loop) if isinstance(part, ast.Name) and part.id == layer and part is not loop.target
    ):
        call, assigned = parents[name], parents[parents[name]]
        if isinstance(call, ast.Call) and call.func is name and call.args:
            first = call.args[0]
            targets = assigned.targets if isinstance(assigned, ast.Assign) else []
            if not isinstance(first, ast.Name) or [ast.dump(each) for each in targets] != [_stored(first.id)]:
                return False
            carried.add(first.id)
            given.add(first)
        elif not _asks_for_class(call):
            return False
    looks = (part for part in ast.walk(loop) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load))
    return len(carried) == 1 and all(
        part.id not in carried or part in given or _behind_a_class(part, layer, loop, parents) for part in looks
    )


def _stored(name: str) -> str:
    return ast.dump(ast.Name(name, ast.Store()))


def _asks_for_class(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"


def _behind_a_class(node: ast.AST, layer: str, loop: ast.For, parents: _Parents) -> bool:
    """Whether code runs for convolutions alone: what goes into one is the same with and without the fusion before it."""
    while node is not loop:
        parent = parents[node]
        if isinstance(parent, ast.If) and node in parent.body:
            together = parent.test
            every = isinstance(together, ast.BoolOp) and isinstance(together.op, ast.And)
            for test in ast.iter_child_nodes(together) if every else [together]:
                if isinstance(test, ast.Call) and _asks_for_class(test) and ast.unparse(test.args[0]) == layer:
                    return "Conv" in ast.unparse(test.args[1])
        node = parent
    return False


def _whole(node: ast.AST, parents: _Parents) -> bool:
    """Whether a value is called, handed over, asked for an attribute, compared or tested, and no more."""
    parent = parents[node]
    if isinstance(parent, ast.keyword):
        parent = parents[parent]
    if isinstance(parent, ast.Call):
        return parent.func is node or _keeps_whole(parent.func)
    if isinstance(parent, ast.Attribute):
        return parent.attr not in WALKS
    if isinstance(parent, (ast.If, ast.IfExp)):
        return parent.test is node
    if isinstance(parent, ast.Subscript):
        return parent.slice is node
    return isinstance(parent, (ast.Compare, ast.BoolOp, ast.UnaryOp))


def _keeps_whole(function: ast.expr) -> bool:
    """Whether a function that is handed a sequence calls it as a whole, if at all."""
    name = ast.unparse(function).split(".")[-1]
    return name in LOOKING or "checkpoint" in name


def _elements_whole(node: ast.Attribute, parents: _Parents, names: list[ast.Name]) -> bool:
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
