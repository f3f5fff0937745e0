"""An op as torch knows it, `torch.ops.ltxkern.<name>`: schema, fake implementation, gradients.

Calls that something traces or differentiates go this way; `ltxkern.dispatch` serves all others directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ltxkern import schema

# Asked at every call: a lookup in the module of torch takes as long as the answer.
is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_increment_version = torch._C._increment_version
# What returns something true where torch has to see every call; `needs_dispatcher` asks more.
FOLLOWING = (_dispatch_modes, _tracing_state, _transforms_active)
_library = torch.library.Library("ltxkern", "DEF")


# c10::ScalarType by its number: what torch 2.11 hands to an implementation in Python, later ones the dtype itself.
_DTYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}


def typed(arguments: type[Any]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What makes dtypes of the numbers among an op's positional arguments."""
    places = {place for place, kind in enumerate(schema.kinds(arguments).values()) if kind == "ScalarType"}
    if not places:
        return lambda args: args

    def given(args: Sequence[Any]) -> Sequence[Any]:
        return [_DTYPES[v] if place in places and type(v) is int else v for place, v in enumerate(args)]

    return given


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
    call = _define(name, signature, lambda *args: run(arguments(*args)), lambda *args: None)
    _library.impl(name, _refusing(name, call), "Autograd", with_keyset=True)
    return Registered(call, None, 0)


def register(
    name: str,
    arguments: type[Any],
    result: str,
    run: Callable[[Any], Any],
    run_into: Callable[[Any, Any], None],
    fake: Callable[[Any], Any],
    reference: Callable[..., Any],
) -> Registered:
    """Register an op and its form with given outputs, `<name>_out`.

    Args:
        name: under `torch.ops.ltxkern`.
        arguments: NamedTuple of the arguments.
        result: in torch schema syntax.
        run: `run(args)`.
        run_into: `run_into(out, args)`; `out` is a tensor, or the outputs.
        fake: outputs with the right shape, dtype and strides.
        reference: the composition, of which gradients are taken, and which transforms of torch.func see in the op's place.
    """
    # 0 for a list of tensors.
    count = 0 if "Tensor[]" in result else result.count("Tensor")
    outputs = ", ".join(f"Tensor({chr(ord('a') + i)}!) out{i}" for i in range(count)) or "Tensor(a!)[] out"
    given = max(1, count)

    with_dtypes = typed(arguments)

    def run_out(*args: Any) -> None:
        run_into(args[-1] if given == 1 else args[-given:], arguments(*with_dtypes(args[:-given])))

    def call(*args: Any) -> Any:
        return run(arguments(*with_dtypes(args)))

    def allocate(*args: Any) -> Any:
        return fake(arguments(*with_dtypes(args)))

    parameters = schema.text(arguments, in_place=False)
    op = _define(name, f"({parameters}) -> {result}", call, allocate)
    _library.impl(name, _differentiated(op, reference, with_dtypes), "Autograd", with_keyset=True)
    into = _define(f"{name}_out", f"({parameters}, {outputs}) -> ()", run_out, lambda *args: None)
    _library.impl(f"{name}_out", _refusing(name, into), "Autograd", with_keyset=True)
    return Registered(op, into, count)


def needs_dispatcher(args: Sequence[Any]) -> bool:
    """Whether something traces or transforms, a gradient is wanted or a tensor is no plain one: torch has its say then."""
    if is_compiling() or _dispatch_modes() > 0 or _tracing_state() is not None:
        return True
    if _transforms_active() or forward_ad._current_level >= 0:
        return True
    grad = is_grad_enabled()
    for value in args:
        # Most optional arguments are absent, and to ask what they are no instance of takes longer than a tensor.
        if value is None:
            continue
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            kind = type(tensor)
            if kind is Tensor or kind is torch.nn.Parameter:
                # The values of a negative view are not those in its memory, which torch sees to.
                if (grad and tensor.requires_grad) or tensor.is_neg():
                    return True
            elif isinstance(tensor, Tensor):
                return True
    return False


def transforming() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp, functionalize) or a forward-mode gradient is under way."""
    return _transforms_active() or forward_ad._current_level >= 0


def composed(reference: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The reference in the place of an op, for a transform: torch's rules for them know little of other layouts."""
    return reference(*(value.contiguous() if isinstance(value, Tensor) else value for value in args))


def refuse_writing(name: str, args: Sequence[Any], written: Sequence[Tensor] = ()) -> None:
    """RuntimeError where torch would have to follow a call that writes into a given tensor; a compiler can.

    ValueError where that is a negative view, whose memory would have to hold other values than the result.
    """
    if is_compiling():
        return
    if any(tensor.is_neg() for tensor in written):
        raise ValueError(f"ltxkern.{name} cannot write into a negative view (x.is_neg()): give memory of its own")
    if transforming():
        raise RuntimeError(
            f"ltxkern.{name} writes into a given tensor, which torch.func and forward-mode gradients cannot follow: "
            "call it outside of them, or a functional op without out"
        )
    if is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(args)):
        raise RuntimeError(
            f"ltxkern.{name} writes into a given tensor and has no backward: call it under torch.no_grad()"
        )


def resolved(args: Sequence[Any]) -> Sequence[Any]:
    """Arguments with tensors of their own values in the place of negative views (torch's own fallback knows no absent tensors)."""
    if is_compiling():
        return args
    return [
        resolved(value)
        if isinstance(value, (list, tuple))
        else value.resolve_neg()
        if isinstance(value, Tensor) and value.is_neg()
        else value
        for value in args
    ]


def refuse_inference(name: str, written: Sequence[Tensor]) -> None:
    """RuntimeError where torch forbids to change a tensor: it was made in inference mode, and that has ended."""
    for tensor in written:
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"ltxkern.{name} writes into a tensor of shape {tuple(tensor.shape)} made in inference mode, which nothing "
                "may change outside of it: call it under torch.inference_mode(), or make the tensor under torch.no_grad()"
            )


def allow_writing(name: str, written: Sequence[Tensor]) -> None:
    """Before a kernel writes: refuse what torch forbids, and let autograd know, which else takes stale values in silence."""
    for tensor in written:
        if tensor.is_inference():
            refuse_inference(name, written)
    _increment_version(written)


def tensors_of(args: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, lists entered."""
    for value in args:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                yield item


def _define(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(name + signature)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ltxkern::{name}", fake, lib=_library)
    return getattr(torch.ops.ltxkern, name).default


def _refusing(name: str, op: Any) -> Callable[..., Any]:
    def refuse(keyset: Any, *args: Any) -> Any:
        refuse_writing(name, args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refuse


def _differentiated(
    op: Any, reference: Callable[..., Any], with_dtypes: Callable[[Sequence[Any]], Sequence[Any]]
) -> Callable[..., Any]:
    """The op under autograd: the reference under a transform, else with a backward through the reference.

    Not `torch.library.register_autograd`: it loses the gradients of a list in which an entry is None.
    """

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, structure: Any, *leaves: Any) -> Any:
            ctx.structure = structure
            ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
            ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            ctx.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            with torch._C._AutoDispatchBelowAutograd():
                result = op.redispatch(keyset, *pytree.tree_unflatten(leaves, structure))
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # With create_graph gradients are differentiated further: then they hang on the inputs themselves.
            again = is_grad_enabled()
            leaves = list(ctx.leaves)
            wanted = [place for place in ctx.places if ctx.needs_input_grad[place + 2]]
            with torch.enable_grad():
                for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
                    # An alias: an input that is made of another does not count for both.
                    one = saved.view_as(saved) if again else saved.detach()
                    leaves[place] = one.requires_grad_() if place in wanted and not one.requires_grad else one
                outputs = reference(*pytree.tree_unflatten(leaves, ctx.structure))
            # Of several outputs, one may not depend on any input whose gradient is wanted.
            pairs = [
                pair
                for pair in zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=True)
                if pair[0].requires_grad
            ]
            results = torch.autograd.grad(
                [output for output, _ in pairs],
                [leaves[place] for place in wanted],
                [grad for _, grad in pairs],
                allow_unused=True,
                create_graph=again,
            )
            by_place = dict(zip(wanted, results, strict=True))
            return None, None, *(by_place.get(place) for place in range(len(leaves)))

    listed = str(op._schema.returns[0].type) == "List[Tensor]"

    def differentiated(keyset: Any, *given: Any) -> Any:
        args = with_dtypes(given)
        if transforming():
            return composed(reference, args)
        below = keyset & torch._C._after_autograd_keyset
        if not (is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(args))):
            return op.redispatch(below, *args)
        filled = [*args, *(argument.default_value for argument in op._schema.arguments[len(args) :])]
        leaves, structure = pytree.tree_flatten(filled)
        result = Differentiated.apply(below, structure, *leaves)
        return list(result) if listed else result

    return differentiated
