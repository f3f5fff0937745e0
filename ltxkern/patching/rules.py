"""What a patch may do, and names of what it finds."""

from __future__ import annotations

from dataclasses import dataclass

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


def joined(path: str, name: str) -> str:
    """The name of a child."""
    return f"{path}.{name}" if path else name
