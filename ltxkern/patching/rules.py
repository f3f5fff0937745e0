"""What a patch may do, and names of what it finds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ltxkern.ops.checks import check_choice

POLICIES = ("rounded", "exact")
# Of every op that serves here.
CONTRACT = "rounded"


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
