"""Argument checks shared by the ops: each raises one sentence with the parameter, what was expected, what came and what to give.

Of modules: whether a call is their class's forward on weights that are there, and nothing else (`unplain`).

The right argument takes the shortest way through: sentences are made when there is something to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ltxkern.layout import is_array

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SAMPLER_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    value: object,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    min_dim: int = 0,
    arrays: bool = False,
) -> bool:
    """`value` is a tensor of an allowed dtype with at least `min_dim` dimensions; True where it is an array and may be."""
    if not isinstance(value, Tensor):
        if arrays and is_array(value):
            return True
        raise_no_tensor(name, value)
    if dtypes is not None and value.dtype not in dtypes:
        nearest = torch.float32 if torch.float32 in dtypes else dtypes[-1]
        use = f"{name}.real" if value.is_complex() else f"{name}.to({nearest})"
        expected = str(dtypes[0]) if len(dtypes) == 1 else f"one of {', '.join(map(str, dtypes))}"
        raise TypeError(f"{name} must be {expected}, got {value.dtype}: use {use}")
    if min_dim and value.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimensions, got shape {tuple(value.shape)}")
    return False


def check_integer_tensor(name: str, value: object) -> None:
    """`value` is a tensor of int32 or int64."""
    check_tensor(name, value, dtypes=(torch.int32, torch.int64))


def raise_no_tensor(name: str, value: object, expected: str = "a torch.Tensor") -> NoReturn:
    """The error for what is no tensor, with the way to make one of it."""
    kind = type(value).__name__
    use = ""
    if kind == "ndarray":
        use = f": use torch.from_numpy({name})"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        use = f": use torch.tensor({name})"
    elif isinstance(value, dict):
        use = f": use list({name}.values())"
    raise TypeError(f"{name} must be {expected}, got {kind}{use}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """`value` has exactly this shape."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """`value` lies on the same device as the op's first tensor."""
    if value.device != device:
        raise ValueError(f'{name} must be on {device}, got {value.device}: use {name}.to("{device}")')


def check_like(name: str, value: Any, model: Tensor) -> None:
    """`value` is a tensor of the model's shape, dtype and device."""
    if not isinstance(value, Tensor):
        raise_no_tensor(name, value)
    check_shape(name, value, model.shape)
    check_device(name, value, model.device)
    if value.dtype != model.dtype:
        use = f"{name}.real" if value.is_complex() else f"{name}.to({model.dtype})"
        raise TypeError(f"{name} must be {model.dtype}, got {value.dtype}: use {use}")


def broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    """Whether a tensor of this shape broadcasts to exactly the shape `onto`; torch.broadcast_shapes takes 10 us to say so."""
    if shape == onto:
        return True
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return len(shape) <= len(onto) and all(size == 1 or size == whole for size, whole in pairs)


def check_vector(name: str, value: Any, length: int, device: torch.device) -> None:
    """`value` holds `length` values in an activation dtype, on the device of the op's first tensor."""
    check_tensor(name, value, dtypes=ACTIVATION_DTYPES)
    check_shape(name, value, (length,))
    check_device(name, value, device)


def check_indexed(x: Tensor, rows: Tensor, tables: Mapping[str, Tensor]) -> None:
    """`rows` has one index per row of x, and the tables are (N, D) of one N."""
    check_integer_tensor("rows", rows)
    check_device("rows", rows, x.device)
    if x.dim() == 0:
        raise ValueError("x must have at least 1 dimensions with rows, got shape ()")
    check_shape("rows", rows, x.shape[:-1])
    first = ""
    for name, table in tables.items():
        check_tensor(name, table, dtypes=ACTIVATION_DTYPES)
        check_device(name, table, x.device)
        if table.dim() != 2 or table.shape[-1] != x.shape[-1]:
            raise ValueError(f"{name} must have shape (N, {x.shape[-1]}) with rows, got {tuple(table.shape)}")
        if first and table.shape[0] != tables[first].shape[0]:
            raise ValueError(
                f"{name} must have as many rows as {first}, {tables[first].shape[0]}, got {tuple(table.shape)}"
            )
        first = first or name


def check_finite_number(name: str, value: Any, *, low: float | None = None, high: float | None = None) -> None:
    """`value` is a finite real number within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        use = f": use float({name})" if hasattr(value, "item") else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{use}")
    # A comparison, where math.isfinite would break the graph of a compiled caller.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}: use {low}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}: use {high}")


def check_integer(name: str, value: Any, low: int, high: int | None = None, *, use: int | None = None) -> None:
    """`value` is a whole number within [low, high]; `use` is what to advise below that."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        advice = f": use int({name})" if isinstance(value, float) or hasattr(value, "item") else ""
        raise TypeError(f"{name} must be an int, got {type(value).__name__}{advice}")
    number: Any = value
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {value}: use {low if use is None else use}")
    if high is not None and number > high:
        raise ValueError(f"{name} must be at most {high}, got {value}: use {high}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """`value` is one of these words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {_quoted(choices)}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be {_quoted(choices)}, got {value!r}")


def _quoted(choices: Sequence[str]) -> str:
    *others, last = (f'"{choice}"' for choice in choices)
    return f"{', '.join(others)} or {last}"


def check_together(first: str, one: object, second: str, other: object) -> None:
    """Two parameters are given both, or left out both."""
    if (one is None) != (other is None):
        alone = second if one is None else first
        raise ValueError(f"{first} and {second} go together, got {alone} alone: give both or neither")


def check_flag(name: str, value: Any) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_out(
    out: Any, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str = "out"
) -> None:
    """`out` can take a result of this shape, dtype and device."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(out).__name__}")
    check_shape(name, out, shape)
    if out.device != device:
        raise ValueError(f"{name} must be on {device}, got {out.device}")
    if out.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {out.dtype}")


def check_pair(out: Any, count: int = 2) -> None:
    """`out` is a pair, or three, of tensors or of lists of them."""
    wanted = "a pair of tensors" if count == 2 else "three tensors"
    if not isinstance(out, (tuple, list)):
        raise TypeError(f"out must be {wanted}, got {type(out).__name__}")
    if len(out) != count:
        raise ValueError(f"out must be {wanted}, got {len(out)} of them")


def check_outs(out: Any, model: Tensor, count: int = 2) -> None:
    """`out` is a pair, or three, of tensors that can take results of the model's shape, dtype and device."""
    check_pair(out, count)
    for index, each in enumerate(out):
        check_out(each, model.shape, model.dtype, model.device, f"out[{index}]")


def listed(name: str, value: Any, count: int) -> list[Any]:
    """`value` as a list of `count` entries; None stands for a list of None."""
    if value is None:
        return [None] * count
    if isinstance(value, Tensor):
        value = [value]
    elif not isinstance(value, (list, tuple)):
        raise_no_tensor(name, value, "a tensor, or a list with one per modality")
    if len(value) != count:
        raise ValueError(f"{name} must have {count} entries, one per modality, got {len(value)}")
    return list(value)


def modalities(name: str, value: Any) -> list[Tensor] | None:
    """The states of a half-step: one tensor, or one per modality; None where they are arrays."""
    if isinstance(value, Tensor):
        return [value]
    if is_array(value):
        return None
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError(f"{name} must have at least one entry, got an empty {type(value).__name__}")
    states = listed(name, value, len(value) if isinstance(value, (list, tuple)) else 1)
    for index, state in enumerate(states):
        if not isinstance(state, Tensor):
            if is_array(state):
                return None
            raise_no_tensor(f"{name}[{index}]" if isinstance(value, (list, tuple)) else name, state)
    return states


_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
}
# Attributes that the hooks of accelerate and diffusers leave on a module, whose forward they take the place of.
FOREIGN_HOOKS = {"_hf_hook": "a hook of accelerate", "_diffusers_hook": "a hook of diffusers"}
_TENSORS = (Tensor, nn.Parameter, FakeTensor)


def unplain(module: Any, *, meta: bool = False, hooks: bool = False) -> str | None:
    """Why a call of the module is more than its class's forward on its weights, or None if it is not.

    It is more where hooks stand on it or on all modules (torch's own, forward or backward, or those of accelerate and diffusers),
    where it has a forward of its own, where weights are parametrised or no plain tensors, or where they lie on the meta device, as
    those of offloaded modules do between calls.

    Args:
        meta: weights on the meta device are no reason: they come before the module is called.
        hooks: hooks are no reason, unless a forward of the module's own runs them.
    """
    if not isinstance(module, nn.Module):
        return f"is a {type(module).__name__}, no module"
    held = vars(module)
    own = "forward" in held
    if own or not hooks:
        for name, words in FOREIGN_HOOKS.items():
            if name in held:
                return f"has {words}"
        for name, words in _HOOKS.items():
            if held[name]:
                return f"has {words}"
        if torch.nn.modules.module._has_any_global_hook():
            return "is seen by hooks on all modules"
    if own:
        return "has a forward of its own"
    if "parametrizations" in held["_modules"]:
        return "has parametrised weights"
    for name, weight in held["_parameters"].items():
        if weight is None:
            continue
        if type(weight) not in _TENSORS:
            return f"has a {type(weight).__name__} as {name}"
        if weight.is_meta and not meta:
            return f"has its {name} on the meta device"
    return None


def is_plain(module: Any) -> bool:
    """Whether `unplain` has nothing to say."""
    return unplain(module) is None
