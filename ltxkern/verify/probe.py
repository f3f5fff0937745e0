"""The probe at first use: an op's main case and its other kernels, in the dtype at hand on one backend, by the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltxkern.dispatch import Backend, Op, handed
from ltxkern.registration import tensors_of
from ltxkern.verify.cases import BY_NAME, OpCase, Size
from ltxkern.verify.values import poisoned

# Rows that whole vectors fill, and rows with a rest.
SIZES = (Size(2, 6, 64), Size(3, 5, 13))
# A weight of more tiles than a large card has multiprocessors, so that a block walks from one to the next.
WALK = Size(1, 3000, 2056)
# Rows that whole warps fill, as those of the production shapes do, and narrower ones: of ops that share a row among heads or
# groups, and a slice of noise that one block holds.
FILLED = Size(1, 3, 1024)
NARROWER = {
    **dict.fromkeys(("qk_norm_rope", "group_norm_silu"), (Size(1, 3, 256), Size(1, 3, 128))),
    "normalize_noise": (Size(1, 3, 512),),
}
# Variants of an op that kernels of their own serve, on a card some with WALK too.
OTHER_KERNELS = {
    "merge_lora_": ("large_rank", "float8_single", "half_factors"),
    "qk_norm_rope": ("wide", "rows_one_axis", "rows_side_by_side"),
    "group_norm_silu": ("channels_last",),
    "pixel_norm_silu": ("channels_last",),
    "channelwise_normalize": ("pairs",),
    "res2s_midpoint": ("raw_noise_fp64",),
    "res2s_advance": ("raw_noise_fp64",),
}
WALKED = ("large_rank", "float8_single")


def filled(op: str) -> tuple[Size, ...]:
    """Sizes at which the kernels of an op's production shapes serve."""
    return FILLED, *NARROWER.get(op, ())


def probes_of(op: str, backend: str, dtype: torch.dtype, on_card: bool) -> list[tuple[OpCase, torch.dtype, Size]]:
    """What is asked of a backend for calls of a dtype.

    Kernels for some widths alone are those of CUDA; Triton compiles its one anew for every kind of call, and the CPU's takes all.
    """
    main, by_index = BY_NAME[op], BY_NAME.get(f"{op}-rows")
    others = [BY_NAME[f"{op}-{name}"] for name in OTHER_KERNELS.get(op, ())]
    wide = filled(op) if on_card and backend != "triton" else ()
    found = [(main, size) for size in (*SIZES, *wide)]
    found += [(by_index, size) for size in (SIZES[0], *wide)] if by_index else []
    for case in others if wide else [case for case in others if case.variant in WALKED]:
        found += [(case, size) for size in (*SIZES, *wide, *((WALK,) if on_card and case.variant in WALKED else ()))]
    usual = dtype if dtype in main.dtypes else main.dtypes[0]
    return [(case, usual if usual in case.dtypes else case.dtypes[-1], size) for case, size in found]


def replaced(value: Any, change: Callable[[Any], Any], *, every: bool = False) -> Any:
    """Arguments with all tensors changed, or `every` value; sequences entered, and a NamedTuple stays one."""
    if isinstance(value, (list, tuple)):
        made = [replaced(item, change, every=every) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else made
    return change(value) if every or isinstance(value, Tensor) else value


def listed(value: Any) -> list[Tensor]:
    """One tensor or several as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def _too_far(result: Tensor, wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """0-dim: whether a result is not that of the reference, within the roundings of both; of float8 within one of its steps."""
    eps = max(torch.finfo(result.dtype).eps, torch.finfo(dtype).eps)
    one, other = result.double(), wanted.double()
    if result.element_size() == 1:
        near = (one - other).abs() <= eps * other.abs() + torch.finfo(result.dtype).smallest_normal
    else:
        near = (one - other).abs() <= 4 * eps * other.abs() + 8 * eps * other.abs().max().clamp(min=1.0)
    return ~near.all()


@torch.no_grad()
def mismatch(op: Op, backend: Backend, args: Any, device: torch.device) -> str | None:
    """What is wrong with a backend, or None; one wait for the device.

    Args:
        op, backend: what is asked.
        args: of the call at hand, whose dtype the probe takes.
        device: where that call's tensors lie.
    """
    first = next(tensors_of(args)).dtype
    run, asked = backend.load(), []
    waits = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if waits:
        torch.cuda.set_sync_debug_mode(0)
    try:
        with torch.device(device):
            for case, dtype, size in probes_of(op.name, backend.name, first, device.type != "cpu"):
                given = handed(functools.partial(case.run, case.tensors(dtype, size)))
                if backend.refuse(given) is None:
                    asked.append((f"{dtype} of {size} {case.variant}".strip(), _differs(op, run, given, dtype)))
            if not asked:
                return None
            found = torch.stack([wrong for _, wrong in asked]).tolist()
    finally:
        if waits:
            torch.cuda.set_sync_debug_mode(waits)
    for (name, _), wrong in zip(asked, found, strict=True):
        if wrong:
            return f"{name} is not what the reference gives"
    return None


def _differs(op: Op, run: Any, given: Any, dtype: torch.dtype) -> Tensor:
    """0-dim: whether a kernel's results are not those of the reference."""
    ours, theirs = replaced(given, Tensor.clone), replaced(given, Tensor.clone)
    if op.allocate is None:
        run(ours)
        op.reference(*theirs)
        pairs = [(ours[0], theirs[0])]
    else:
        out = replaced(op.allocate(ours), poisoned)
        run(out, ours)
        pairs = list(zip(listed(out), listed(op.reference(*theirs)), strict=True))
    return torch.stack([_too_far(one, other, dtype) for one, other in pairs]).any()
