"""`ltxkern.patch(model)`: fused ops inside models of other stacks, a report of each site, and `.undo()` to take them out again.

A site is found by what a module is and holds, and by what its class's code does with it (`ltxkern.patching.flow`). The module keeps
its place, its parameters and its state-dict keys; only its class changes, to one of the same name that takes the op's way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ltxkern.ops.checks import check_choice

# `import ltxkern` imports this file: what a patch is made of comes with the first one.
if TYPE_CHECKING:
    from ltxkern.patching.report import Report
    from ltxkern.patching.rules import Rules

OPS = (
    "group_norm_silu",
    "pixel_norm_silu",
    "rms_norm_modulate",
    "gated_residual",
    "gated_residual_rms_norm_modulate",
    "gated_residual_rms_norm_modulate_twice",
    "linear_gelu",
    "qk_norm_rope",
    "head_gate",
)


def patch(
    model_or_pipeline: Any, policy: str | None = None, ops: Iterable[str] | None = None, strict: bool = False
) -> Report:
    """Put fused ops in the place of what a model composes of single ones, in place.

    Args:
        model_or_pipeline: a module, or a diffusers pipeline, of which every module among its `components` is taken.
        policy: "rounded" takes ops that agree with what they replace up to rounding (the contract of each op); "exact" only what
            gives the same bits: no norm with its activation does, and each row op of LTX-2's blocks is run beside what it
            replaces until 2^20 results were compared, and serves if all had the bits. None for the variable LTXKERN_POLICY,
            else "rounded".
        ops: names of the ops that may serve; None for all of `OPS`.
        strict: raise where a site is left alone, or none is found; the model is then as it was.
    Returns:
        The report: the sites with op, backend, contract and calls so far, the places left alone with the reason of each,
        `.undo()`, and a context manager. Printed it is a table.
    Raises:
        TypeError: neither a module nor a pipeline.
        ValueError: an unknown policy or op; with `strict` what is left alone.

    Contract: that of each op. A norm that has hooks, a forward of its own, parametrised weights or none in memory is left alone,
        and so is one whose result something other than SiLU takes. Hooks of offloading that come later are fine; any other hook
        on a fused norm or its activation gives both their classes back first, and so does whatever else changes what was read: a
        forward that is put in, a layer replaced or taken out, a flag that the model's code asks for. Taken out and called by
        itself a fused norm includes its activation.
    Calls within a graph of `torch.compile` are served and not counted.

    Example:
        >>> import ltxkern
        >>> from torch import nn
        >>> model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
        >>> report = ltxkern.patch(model)
        >>> report.sites
        ['0']
        >>> report.undo()
    """
    from ltxkern.patching.rules import Rules, chosen_policy

    exact = chosen_policy(policy) == "exact"
    chosen = None if ops is None else frozenset([ops] if isinstance(ops, str) else ops)
    for name in sorted(chosen or ()):
        check_choice("ops", name, OPS)
    return fuse(model_or_pipeline, Rules(exact, chosen), strict)


def fuse(model_or_pipeline: Any, rules: Rules, strict: bool = False) -> Report:
    """`patch` by rules."""
    from ltxkern.patching.report import Left, Report
    from ltxkern.patching.sites import Finder

    report = Report()
    for prefix, model in _models(model_or_pipeline):
        Finder(model, prefix, rules, report).run()
    if not report.rows and not report.left:
        kind = type(model_or_pipeline).__name__
        report.left.append(Left("", f"{kind} holds no norm that is seen to go straight into a SiLU module"))
    left = [item for item in report.left if not item.already]
    if strict and left:
        report.undo()
        reasons = "; ".join(f"{item.name or 'the model'}: {item.reason}" for item in left)
        raise ValueError(f"strict: expected every site fused, got {len(left)} left alone. {reasons}")
    return report


def _models(model_or_pipeline: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(model_or_pipeline, nn.Module):
        return [("", model_or_pipeline)]
    components = getattr(model_or_pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"model_or_pipeline must be a torch.nn.Module or a diffusers pipeline, got {type(model_or_pipeline).__name__}"
        )
    return [(name, part) for name, part in components.items() if isinstance(part, nn.Module)]
