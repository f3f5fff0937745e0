"""What a module's forward does with its children, read from its source: which call's result goes into which.

A norm may be fused with an activation only where nothing else sees its result and nothing else goes into the activation. No list
of class names can promise that of a model of another stack; its code can. The reading is cautious: what it does not understand
counts as a use. Branches on what a module holds (`self.conv_shortcut is not None`, `self.kind == "default"`) go the way of that
very module.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn

from ltxkern.patching.source import methods, parsed
from ltxkern.patching.watch import own_class


@dataclass(frozen=True, eq=False)
class Node:
    """A value: a parameter of forward, what a child returned, a sum, other arithmetic or a part of a tuple, or something else."""

    kind: str
    name: str = ""
    inputs: tuple[Value, ...] = ()


# What an expression may be: one node, or several where branches meet.
Value = frozenset[Node]
# Modules, each with an attribute on which it depends what was read.
Asked = set[tuple[nn.Module, str]]

SILU = "torch.nn.functional.silu"
_VIEWS = {
    "movedim",
    "permute",
    "transpose",
    "contiguous",
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
}
_CHANGING = frozenset({"training", "gradient_checkpointing"})
_TESTS = (
    ast.Attribute,
    ast.Name,
    ast.Constant,
    ast.Compare,
    ast.BoolOp,
    ast.UnaryOp,
    ast.boolop,
    ast.cmpop,
    ast.unaryop,
)
_LATER = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def known(module: Any, test: ast.expr, me: str, changing: frozenset[str] | set[str]) -> bool | None:
    """How a test on nothing but what the module holds turns out; None where it may turn out either way."""
    for part in ast.walk(test):
        if isinstance(part, ast.Attribute) and part.attr in changing:
            return None
        if isinstance(part, ast.Name) and part.id != me:
            return None
        if not isinstance(part, (*_TESTS, ast.expr_context)):
            return None
    try:
        value = eval(compile(ast.Expression(test), "<test>", "eval"), {"__builtins__": {}}, {me: module})
        return bool(value) if not isinstance(value, nn.Module) else True
    except (AttributeError, TypeError, KeyError, RuntimeError):
        return None


def asked_by(module: Any, test: ast.expr) -> Iterator[tuple[nn.Module, str]]:
    """What a test whose result is known asks the module and its children for."""
    for part in ast.walk(test):
        if isinstance(part, ast.Attribute):
            _, *way, name = ast.unparse(part).split(".")
            owner = functools.reduce(lambda owner, step: getattr(owner, step, None), way, module)
            if isinstance(owner, nn.Module):
                yield owner, name


def changing(kind: type) -> frozenset[str]:
    """Attributes that may be others at a later call."""
    return _CHANGING | beside_forward(kind)[1]


@dataclass
class Flow:
    """What was read of one module's forward.

    Attributes:
        calls: of children, and of SiLU as a function.
        uses: of each node, what takes it; None where that is not a child, SiLU or arithmetic.
        returned: what forward returns.
        mentioned: children that are used otherwise than by calling them.
        asked: what the branches depend on that were taken.
    """

    calls: list[Node] = field(default_factory=list)
    uses: dict[Node, list[Node | None]] = field(default_factory=dict)
    returned: Value = frozenset()
    mentioned: set[str] = field(default_factory=set)
    asked: Asked = field(default_factory=set)


class UnreadableError(Exception):
    """Why the forward of a module cannot be read."""


class _DeadError(Exception):
    """This branch cannot run to its end."""


def read(module: nn.Module, one_argument: Callable[[str], bool], around: frozenset[str] = frozenset()) -> Flow:
    """The flow of a module's forward.

    Args:
        module: any module.
        around: attributes that code around the module sets.
        one_argument: whether a child of that name refuses more than one argument; a branch that gives it more is never taken.

    Raises:
        UnreadableError: no source, or none that is a function of `self`.
    """
    reader = _Reader(module, one_argument, around)
    return reader.run(_tree(inspect.unwrap(own_class(module).forward)))


def _tree(forward: Any) -> ast.FunctionDef:
    tree = parsed(forward)
    if tree is None:
        raise UnreadableError("the source of its forward cannot be read")
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        raise UnreadableError("its forward is no method")
    return tree


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.cache
def beside_forward(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names that methods of a class other than its forward and __init__ speak of, and those that methods set after __init__."""
    read_names: set[str] = set()
    set_names: set[str] = set()
    # The forward above the one that runs runs too where that asks for it.
    above = "super" in getattr(getattr(inspect.unwrap(kind.forward), "__code__", None), "co_names", ())
    for name, held, function in methods(kind):
        for part in _codes(function.__code__):
            if name != "forward" or (held is not kind.forward and above):
                read_names.update(part.co_names)
            set_names.update(step.argval for step in dis.get_instructions(part) if step.opname == "STORE_ATTR")
    return frozenset(read_names), frozenset(set_names)


class _Reader:
    def __init__(self, module: Any, one_argument: Callable[[str], bool], around: frozenset[str]) -> None:
        self.module = module
        self.one_argument = one_argument
        self.children = {name for name, child in module.named_children()}
        self.changing = around | changing(own_class(module))
        self.flow = Flow()
        self.names: dict[str, Value] = {}
        self.me = "self"

    def run(self, tree: ast.FunctionDef) -> Flow:
        self.me = tree.args.args[0].arg
        for argument in [*tree.args.posonlyargs, *tree.args.args[1:], *tree.args.kwonlyargs]:
            self.names[argument.arg] = frozenset({Node("parameter", argument.arg)})
        self._block(tree.body)
        return self.flow

    def _block(self, body: Sequence[ast.stmt]) -> bool:
        """Whether the end is reached."""
        try:
            return all(self._statement(statement) for statement in body)
        except _DeadError:
            return False

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            value = self._value(node.value) if node.value is not None else _other()
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._assign(target, value)
        elif isinstance(node, ast.AugAssign):
            self._assign(
                node.target, self._arithmetic(node.op, self._value(_loaded(node.target)), self._value(node.value))
            )
        elif isinstance(node, ast.Return):
            value = self._value(node.value) if node.value is not None else _other()
            self._used(value)
            self.flow.returned |= value
            return False
        elif isinstance(node, ast.If):
            return self._branches(node.test, node.body, node.orelse)
        elif isinstance(node, (ast.For, ast.While)):
            self._loop(node)
        elif isinstance(node, ast.With):
            for item in node.items:
                self._used(self._value(item.context_expr))
            return self._block(node.body)
        elif isinstance(node, ast.Expr):
            self._used(self._value(node.value))
        elif isinstance(node, ast.Raise):
            return False
        elif isinstance(node, (ast.Break, ast.Continue)):
            # From here everything goes where the loop ends or starts again.
            self._used(*self.names.values())
        else:
            self._unseen(node)
        return True

    def _branches(self, test: ast.expr, body: Sequence[ast.stmt], orelse: Sequence[ast.stmt]) -> bool:
        known = self._known(test)
        if known is not None:
            return self._block(body if known else orelse)
        self._test(test)
        before = dict(self.names)
        reached = self._block(body)
        first, self.names = self.names, before
        other_reached = self._block(orelse)
        if reached and other_reached:
            for name, value in first.items():
                self.names[name] = self.names.get(name, frozenset()) | value
        elif reached:
            self.names = first
        return reached or other_reached

    def _loop(self, node: ast.For | ast.While) -> None:
        """What a loop assigns is unknown within it and after it, and what goes in or comes out that way counts as used."""
        assigned = {
            n.id for part in ast.walk(node) for n in [part] if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        if isinstance(node, ast.For):
            self._used(self._value(node.iter))
        else:
            self._test(node.test)

        def forget() -> None:
            for name in assigned:
                self._used(self.names.get(name, frozenset()))
                self.names[name] = _other()

        forget()
        self._block(node.body)
        forget()
        self._block(node.orelse)

    def _assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
            return
        if isinstance(target, ast.Tuple):
            part = self._taken(Node("arithmetic", inputs=(value,)))
            for element in target.elts:
                self._assign(element, part)
            return
        self._used(value)
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                self.names[name.id] = _other()
            elif isinstance(name, ast.Name):
                # A part of it is written.
                self._used(self.names.get(name.id, frozenset()))

    def _known(self, test: ast.expr) -> bool | None:
        value = known(self.module, test, self.me, self.changing)
        if value is not None:
            self.flow.asked.update(asked_by(self.module, test))
        return value

    def _test(self, test: ast.expr) -> None:
        """A comparison with None looks at no value."""
        if isinstance(test, ast.BoolOp):
            for part in test.values:
                self._test(part)
        elif not _asks_for_none(test) and self._known(test) is None:
            self._used(self._value(test))

    def _value(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Name):
            return self.names.get(node.id) or _other()
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BinOp):
            return self._arithmetic(node.op, self._value(node.left), self._value(node.right))
        if isinstance(node, ast.IfExp):
            known = self._known(node.test)
            if known is not None:
                return self._value(node.body if known else node.orelse)
            self._test(node.test)
            return self._value(node.body) | self._value(node.orelse)
        if isinstance(node, ast.NamedExpr):
            value = self._value(node.value)
            self._assign(node.target, value)
            return value
        if isinstance(node, ast.Attribute) and (name := self._child(node)) is not None:
            self.flow.mentioned.add(name)
            return _other()
        if isinstance(node, _LATER):
            self._unseen(node)
            return _other()
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self._used(self._value(part))
            elif not isinstance(part, (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)):
                self._unseen(part)
        return _other()

    def _call(self, node: ast.Call) -> Value:
        given = [argument.value if isinstance(argument, ast.Starred) else argument for argument in node.args]
        values = [self._value(argument) for argument in [*given, *(keyword.value for keyword in node.keywords)]]
        name = self._child(node.func)
        if name is None and len(values) == 1 and ast.unparse(node.func).split(".")[-1] == "silu":
            name = SILU
        if name is not None:
            if len(values) != 1 and name != SILU and self.one_argument(name):
                raise _DeadError
            if node.keywords:
                # The class in its place need not name its argument alike.
                self.flow.mentioned.add(name)
            return self._taken(Node("call", name, tuple(values)), record=True)
        if isinstance(node.func, ast.Attribute):
            value = self._value(node.func.value)
            if node.func.attr in _VIEWS:
                self._used(*values)
                return value
            self._used(value)
        else:
            self._used(self._value(node.func))
        self._used(*values)
        return _other()

    def _arithmetic(self, operator: ast.operator, left: Value, right: Value) -> Value:
        return self._taken(Node("sum" if isinstance(operator, ast.Add) else "arithmetic", inputs=(left, right)))

    def _taken(self, node: Node, *, record: bool = False) -> Value:
        for value in node.inputs:
            for part in value:
                self.flow.uses.setdefault(part, []).append(node)
        if record:
            self.flow.calls.append(node)
        return frozenset({node})

    def _used(self, *values: Value) -> None:
        for value in values:
            for part in value:
                self.flow.uses.setdefault(part, []).append(None)

    def _unseen(self, node: ast.AST) -> None:
        """Code that is not followed: what it names is used, what it assigns is unknown."""
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and (name := self._child(part)) is not None:
                self.flow.mentioned.add(name)
            elif isinstance(part, ast.Name) and part.id in self.names:
                self._used(self.names[part.id])
                if isinstance(part.ctx, ast.Store):
                    self.names[part.id] = _other()

    def _child(self, node: ast.expr) -> str | None:
        """The child that `self.name` is."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.me:
            return node.attr if node.attr in self.children else None
        return None


def _other() -> Value:
    return frozenset({Node("other")})


def _asks_for_none(test: ast.expr) -> bool:
    if not isinstance(test, ast.Compare) or not isinstance(test.left, ast.Name):
        return False
    return isinstance(test.ops[0], (ast.Is, ast.IsNot))


def _loaded(target: ast.expr) -> ast.expr:
    """What an augmented assignment reads."""
    return ast.Name(target.id, ast.Load()) if isinstance(target, ast.Name) else ast.Constant(None)
