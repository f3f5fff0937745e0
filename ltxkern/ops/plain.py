"""Whether a call of a module is its class's forward on weights that are there, and nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
}
# Attributes that the hooks of accelerate and diffusers leave on a module, whose forward they take the place of.
_FOREIGN_HOOKS = {"_hf_hook": "a hook of accelerate", "_diffusers_hook": "a hook of diffusers"}
_TENSORS = (Tensor, nn.Parameter, FakeTensor)


def unplain(module: Any, *, meta: bool = False) -> str | None:
    """Why a call of the module is more than its class's forward on its weights, or None if it is not.

    It is more where hooks stand on it (torch's own, forward or backward, or those of accelerate and diffusers), where it has a
    forward of its own, where weights are parametrised or no plain tensors, or where they lie on the meta device, as those of
    offloaded modules do between calls.

    Args:
        meta: weights on the meta device are no reason: they come before the module is called.
    """
    if not isinstance(module, nn.Module):
        return f"is a {type(module).__name__}, no module"
    held = vars(module)
    for name, words in _FOREIGN_HOOKS.items():
        if name in held:
            return f"has {words}"
    for name, words in _HOOKS.items():
        if held[name]:
            return f"has {words}"
    if "forward" in held:
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
