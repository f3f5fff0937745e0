"""An op as torch knows it, `torch.ops.ltxkern.<name>`: schema, fake implementation, gradients.

Calls that something traces or differentiates go this way; `ltxkern.dispatch` serves all others directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltxkern import schema

_library = torch.library.Library("ltxkern", "DEF")


class Registered(NamedTuple):
    """The opaque torch ops of one op."""

    call: Callable[..., Any]
    """`call(*args)`: returns fresh outputs, or works in place."""

    into: Callable[..., None] | None
    """`into(*args, *outputs)`, or `into(*args, outputs)` where the op returns a list; None for an op that works in place."""

    outputs: int
    """How many; 0 for a list."""


def register_in_place(name: str, arguments: type[Any], run: Callable[[Any], None]) -> Registered:
    """Register an op that changes its first argument."""
    signature = f"({schema.text(arguments, in_place=True)}) -> ()"
    call = _define(name, signature, lambda *args: run(arguments(*args)), lambda *args: None, differentiable=False)
    return Registered(call, None, 0)


def register(
    name: str,
    arguments: type[Any],
    result: str,
    run: Callable[[Any], Any],
    run_into: Callable[[Any, Any], None],
    fake: Callable[[Any], Any],
    recompute: Callable[..., Any] | None,
) -> Registered:
    """Register an op and its form with given outputs, `<name>_out`.

    Args:
        name: under `torch.ops.ltxkern`.
        arguments: NamedTuple of the arguments.
        result: in torch schema syntax.
        run: `run(args)`.
        run_into: `run_into(out, args)`; `out` is a tensor, or the outputs.
        fake: outputs with the right shape, dtype and strides.
        recompute: the reference, of which gradients are taken; None: a wanted gradient raises.
    """
    # 0 for a list of tensors.
    count = 0 if "Tensor[]" in result else result.count("Tensor")
    outputs = ", ".join(f"Tensor({chr(ord('a') + i)}!) out{i}" for i in range(count)) or "Tensor(a!)[] out"
    given = max(1, count)

    def run_out(*args: Any) -> None:
        run_into(args[-1] if given == 1 else args[-given:], arguments(*args[:-given]))

    def call(*args: Any) -> Any:
        return run(arguments(*args))

    def allocate(*args: Any) -> Any:
        return fake(arguments(*args))

    parameters = schema.text(arguments, in_place=False)
    op = _define(name, f"({parameters}) -> {result}", call, allocate, differentiable=True)
    _register_backward(name, recompute)
    into = f"({parameters}, {outputs}) -> ()"
    return Registered(op, _define(f"{name}_out", into, run_out, lambda *args: None, differentiable=False), count)


def refuse_gradients(name: str, args: Sequence[Any]) -> None:
    """RuntimeError where a gradient is wanted of a call that writes into a given tensor."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(args)):
        raise RuntimeError(
            f"ltxkern.{name.removesuffix('_out')} writes into a given tensor and has no backward: "
            "call it under torch.no_grad()"
        )


def tensors_of(args: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, lists entered."""
    for value in args:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                yield item


def _define(
    name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any], *, differentiable: bool
) -> Callable[..., Any]:
    _library.define(name + signature)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ltxkern::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.ltxkern, name).default
    if not differentiable:
        _library.impl(name, _refusing(name, op), "Autograd", with_keyset=True)
    return op


def _refusing(name: str, op: Any) -> Callable[..., Any]:
    def refuse(keyset: Any, *args: Any) -> Any:
        refuse_gradients(name, args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refuse


def _register_backward(name: str, recompute: Callable[..., Any] | None) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if recompute is None:
            raise RuntimeError(
                f"ltxkern.{name} has no backward: call it under torch.no_grad() or on tensors without requires_grad"
            )
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert recompute is not None
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        with torch.enable_grad():
            for i, is_tensor in enumerate(ctx.is_tensor):
                if is_tensor:
                    args[i] = args[i].detach().requires_grad_(i in wanted)
            outputs = recompute(*args)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        # Of several outputs, one may not depend on any input whose gradient is wanted.
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        results = torch.autograd.grad(
            [output for output, _ in pairs],
            [args[i] for i in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
        by_index = dict(zip(wanted, results, strict=True))
        return tuple(by_index.get(i) for i in range(len(args)))

    torch.library.register_autograd(f"ltxkern::{name}", backward, setup_context=setup_context, lib=_library)
