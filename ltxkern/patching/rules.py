"""What a patch may do, policies of fused passes, and which pass gives the bits of the ops that it stands for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ltxkern.ops.checks import check_choice

POLICIES = ("rounded", "exact")
# Of every op that serves here.
CONTRACT = "rounded"
ENOUGH = 1 << 20  # results that had the same bits before a pass counts as exact: a few could have them by chance
_NONE: Mapping[str, Any] = MappingProxyType({})
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Rules:
    """What a patch may do.

    Attributes:
        exact: only what gives the bits of what it replaces.
        ops: names of the ops that may serve; None for all.
        meta: weights on the meta device are no obstacle: they come before the model is called.
    """

    exact: bool = False
    ops: frozenset[str] | None = None
    meta: bool = False

    def against(self, op: str, contract: str) -> str | None:
        """Why an op must not serve."""
        if self.ops is not None and op not in self.ops:
            return f"{op} is not among ops"
        return f"the policy is exact, and {op} is {contract}" if self.exact and contract != "exact" else None


def chosen_policy(policy: str | None) -> str:
    """The policy of that name; None for what the variable LTXKERN_POLICY says, else "rounded".

    Raises:
        ValueError: unknown name.
    """
    source = "policy" if policy is not None else "LTXKERN_POLICY"
    name = policy if policy is not None else os.environ.get("LTXKERN_POLICY") or "rounded"
    check_choice(source, name, POLICIES)
    return name


def joined(path: str, name: str) -> str:
    """The name of a child."""
    return f"{path}.{name}" if path else name


@dataclass
class FusionPolicy:
    """Which fused passes serve the transformer.

    "rounded": all of them; each is at least as close to fp64 as what it replaces, but for fp32 products, GELU within them included,
    of which `products.onednn_quicker` says how far they are. "exact": those alone that gave the bits of the separate ops on this
    device in their first calls of a dtype and shape, where both run until `ENOUGH` results were compared; the others never again.
    What torch.compile traces is made of the separate ops then.

    Attributes:
        name: one of `POLICIES`; None for what the variable LTXKERN_POLICY says, else "rounded".
        verdicts: under "exact", by fused function and layout of its arguments, results that had the bits; 0 once one had not.
    """

    name: str | None = None
    verdicts: dict[tuple[Any, ...], int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.name = chosen_policy(self.name)

    @classmethod
    def of(cls, policy: str | FusionPolicy | None) -> FusionPolicy:
        """One by a name, or the one that is given."""
        return policy if isinstance(policy, FusionPolicy) else cls(policy)

    def proven(self, fused: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any] = _NONE) -> bool:
        """Whether a fused pass serves such arguments under "exact" by now."""
        return self.verdicts.get(_key(fused, args, keywords), 0) >= ENOUGH

    def checked(
        self,
        fused: Callable[..., _Result],
        separate: Callable[..., _Result],
        args: tuple[Any, ...],
        keywords: Mapping[str, Any] = _NONE,
    ) -> _Result:
        """The result under "exact" of a fused pass, or of the ops that it stands for, on the same arguments."""
        layout = _key(fused, args, keywords)
        known = self.verdicts.get(layout)
        if known is not None and known >= ENOUGH:
            return fused(*args, **keywords)
        expected = separate(*args, **keywords)
        if known == 0 or _traces((args, keywords)) or _captures((args, keywords)):
            return expected
        pairs = [*zip(tree_leaves(fused(*args, **keywords)), tree_leaves(expected), strict=True)]
        same = all(_same_bits(*pair) for pair in pairs)
        self.verdicts[layout] = (known or 0) + sum(other.numel() for _, other in pairs) if same else 0
        return expected


def _key(fused: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    return (fused, *map(_layout, tree_leaves((args, dict(keywords)))))


def _layout(value: Any) -> Any:
    return (value.device, value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


def _tensors(args: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


def _traces(args: Any) -> bool:
    """Whether the tensors have shapes and no values."""
    return any(tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter) for tensor in _tensors(args))


def _captures(args: Any) -> bool:
    return any(tensor.is_cuda for tensor in _tensors(args)) and torch.cuda.is_current_stream_capturing()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(x.contiguous().view(torch.uint8) for x in (one, other)))
