"""What is checked of a backend: an op's calls on hard values, sizes and layouts, held to fp64, in memory with guard zones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import ltxkern
from ltxkern.dispatch import handed, registered
from ltxkern.verify.cases import BF16, CASES, F16, F32, F64, MAIN, OpCase, Size, Tensors
from ltxkern.verify.probe import FILLED, SIZES, WALK, WALKED, filled, listed, replaced
from ltxkern.verify.values import strided

# Ops by what of a generation they take: what comes first is checked first. All others follow as the table has them.
FIRST = (
    *("rms_norm_modulate", "gated_residual_rms_norm_modulate", "gated_residual_rms_norm_modulate_twice"),
    *("qk_norm_rope", "gated_residual", "head_gate"),
    *("group_norm_silu", "pixel_norm_silu", "res2s_midpoint", "res2s_advance", "combine_guidance", "merge_lora_"),
)
IMPORTANCE = tuple(dict.fromkeys([*FIRST, *(case.op for case in MAIN)]))
WHOLE, REST = SIZES
# Several chunks of a reduction; more blocks than a small card runs at once.
CHUNKS, BLOCKS = Size(2, 61, 300), Size(1, 1000, 1024)
EMPTY = (Size(0, 3, 4), Size(2, 0, 4))
# Where the reference has its own limits: a mean or a deviation of nothing.
NEVER_EMPTY = ("noise_statistics", "normalize_noise", "channelwise_normalize", "merge_lora_")
FACTOR = 1.5
# Exponentials and reciprocals of the GPU kernels flush what is below.
FLUSHED = 1e-36
# Of two guard patterns one is NaN in every dtype, and a value read from outside shows as a difference between them.
FILLS = (0xFF, 0x5A)
ZONE = 4096
MISALIGNED = 3


@dataclass(frozen=True)
class Check:
    """One call, twice.

    Attributes:
        case: of the table.
        dtype: of the activations.
        size: of the tensors.
        values: a key of `VALUES`.
        layout: "dense", "misaligned" (off the addresses that vectors want) or "strided".
        rank: importance; a backend is proven of an op once the checks of rank 0 have passed, and none has failed.
    """

    case: OpCase
    dtype: torch.dtype
    size: Size
    values: str = "normal"
    layout: str = "dense"
    rank: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [str(self.case), dtype, str(self.size), self.values, self.layout]
        return " ".join(word for word in words if word not in ("normal", "dense"))


def _of_first(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    def changed(tensors: Tensors) -> Tensors:
        name = next(iter(tensors))
        return {**tensors, name: change(tensors[name])}

    return changed


def _not_finite(x: Tensor) -> Tensor:
    """An infinity first and a NaN last, of a tensor that has rows without either."""
    flat = x.contiguous().view(-1).clone()
    if flat.numel():
        flat[0], flat[-1] = torch.inf, torch.nan
    return torch.empty_like(x).copy_(flat.view(x.shape))


def _denormal(tensors: Tensors) -> Tensors:
    """Below the smallest normal number, but for what is no activation."""
    return {
        name: value * (2.0**-20 if value.dtype == F16 else 2.0**-130)
        if value.is_floating_point() and value.dtype.itemsize > 1 and name not in ("mask", "noise_stats")
        else value
        for name, value in tensors.items()
    }


def _saturated(tensors: Tensors) -> Tensors:
    """Sigmoids next to 0 and 1: of a gate beside an x that makes up for what is left of the factor; by way of other parameters."""
    if "logits" not in tensors:
        return {name: 100 * value if name in ("weight", "bias") else value for name, value in tensors.items()}
    x, logits = tensors["x"], torch.tensor([-88.5, 100.0, -100.0]).to(tensors["logits"])
    logits = logits[torch.arange(x[..., 0].numel()) % 3].view(x.shape[:-1])
    large = 6e3 if x.dtype == F16 else 3e37
    return {"x": _not_finite(x * torch.where(logits == -88.5, large, 0.1)[..., None].to(x.dtype)), "logits": logits}


VALUES: dict[str, Callable[[Tensors], Tensors]] = {
    "normal": lambda tensors: tensors,
    # A mean of 1e4 standard deviations.
    "offset": _of_first(lambda x: (x.double() + 1e4).to(x.dtype)),
    "constant": _of_first(lambda x: torch.full_like(x, 2.0)),
    "denormal": _denormal,
    "not finite": _of_first(_not_finite),
    "saturated": _saturated,
}
# What has a sigmoid.
SATURATED = ("head_gate", "group_norm_silu", "pixel_norm_silu")


def plan(level: str) -> list[Check]:
    """The checks of a "quick" or a "full" run, the most important first."""
    hard = [name for name in VALUES if name != "normal"]
    checks = [Check(case, t, size) for case in MAIN for t in case.dtypes for size in (WHOLE, REST, *filled(case.op))]
    for case in CASES:
        values = [name for name in hard if name != "saturated" or case.op in SATURATED]
        usual = [dtype for dtype in case.dtypes if dtype in (BF16, F32)] or list(case.dtypes)
        if not case.variant:
            checks += [
                Check(case, t, size, v, rank=1) for t in usual for v in values for size in (REST, FILLED, CHUNKS)
            ]
            checks += [Check(case, t, REST, "normal", way, 3) for t in usual for way in ("misaligned", "strided")]
            if case.op not in NEVER_EMPTY:
                checks += [Check(case, t, size, rank=3) for t in usual for size in EMPTY]
        else:
            checks += [Check(case, t, size, rank=2) for t in usual for size in (WHOLE, REST, *filled(case.op))]
            if case.variant in WALKED:
                checks += [Check(case, BF16, WALK, rank=2)]
        if level == "full":
            checks += [Check(case, t, size, rank=4) for t in case.dtypes for size in (CHUNKS, BLOCKS)]
            if case.variant:
                rest = [dtype for dtype in case.dtypes if dtype not in usual]
                checks += [Check(case, t, size, rank=4) for t in rest for size in filled(case.op)]
                ways = [("normal", "misaligned"), *((v, "dense") for v in values)]
                checks += [Check(case, t, REST, v, way, 5) for t in case.dtypes for v, way in ways]
    return sorted(checks, key=lambda check: (check.rank, IMPORTANCE.index(check.case.op)))


class Guarded:
    """A tensor with zones of a pattern around it and in its gaps.

    Args:
        like: its values and how it lies.
        fill: the byte of the zones.
        shift: elements past an aligned address.
    """

    def __init__(self, like: Tensor, fill: int, shift: int = 0) -> None:
        reach = sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
        elements = reach + 1 if like.numel() else 0
        zone = ZONE + min(elements * like.element_size(), 1 << 20) // ZONE * ZONE
        first = zone + shift * like.element_size()
        size = first + elements * like.element_size() + zone
        self._like, self._fill, self._shift = like, fill, shift
        self._memory = torch.full((size,), fill, dtype=torch.uint8, device=like.device)
        dense = self._memory[first : size - zone].view(like.dtype)
        self.tensor = dense.as_strided(like.shape, like.stride(), dense.storage_offset()).copy_(like)

    def untouched(self) -> bool:
        """Whether nothing was written but the tensor's own elements."""
        again = Guarded(self._like, self._fill, self._shift)
        again.tensor.copy_(self.tensor)
        return torch.equal(again._memory, self._memory)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bytes."""
    return torch.equal(*(value.contiguous().view(-1).view(torch.uint8) for value in (one, other)))


class _Wide(TorchFunctionMode):
    """Arithmetic that a reference does in fp32 is done in fp64, and what its means and deviations lose of that is made good.

    An exact fp64 kernel would be called wrong otherwise: torch's std drifts as elements are added, and next to a mean of 1e4
    deviations half of the mean's last bit is more than rounding explains.
    """

    def __init__(self) -> None:
        super().__init__()
        self._means: list[tuple[Tensor, dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to:
            args = [F64 if value is F32 else value for value in args]
        if func is Tensor.std:
            squares = _centred(args[0], args[0].mean(**kwargs), kwargs).square().sum(**kwargs)
            return (squares / (args[0].numel() // squares.numel() - 1)).sqrt()
        if func is Tensor.sub:
            for mean, over in self._means:
                if mean is args[1]:
                    return _centred(args[0], mean, over)
        result = func(*args, **kwargs)
        if func is Tensor.mean:
            self._means.append((result, kwargs))
        return result


def _centred(x: Tensor, mean: Tensor, over: dict[str, Any]) -> Tensor:
    """x without its mean over some dims, and without what the mean's rounding left of it."""
    rough = x - mean
    return rough - rough.mean(**over)


def _in_fp64(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return F64
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    return value


def references(op: str, given: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What the torch composition gives on an op's arguments, and what it gives in fp64."""
    reference = registered()[op].reference
    plain, wide = replaced(given, Tensor.clone), replaced(given, _in_fp64, every=True)
    composed = reference(*plain)
    with _Wide():
        exact = reference(*wide)
    if registered()[op].allocate is None:
        return [plain[0]], [wide[0]]
    return listed(composed), listed(exact)


def distance(ours: Tensor, composed: Tensor, exact: Tensor, compute: torch.dtype) -> str | None:
    """Why a result is further from fp64 than the contract allows, or None."""
    if (ours.shape, ours.dtype) != (composed.shape, composed.dtype):
        return f"{tuple(ours.shape)} {ours.dtype}, not {tuple(composed.shape)} {composed.dtype}"
    one, other = ours.double(), composed.double()
    # Where squares underflow, torch has a deviation of zero on one device and not on another: what fp64 has is as right.
    rounded = exact.to(ours.dtype).double()
    for name, kind in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        if not any(torch.equal(kind(one), kind(like)) for like in (other, rounded)):
            return f"{name} at other elements than torch's composition and fp64"
    met = one.isfinite() & other.isfinite() & exact.isfinite()
    if not bool(met.any()):
        return None
    mine, theirs, size = (one - exact)[met].abs(), (other - exact)[met].abs(), float(exact[met].abs().max())
    arithmetic = 64 * torch.finfo(F64).eps if compute == F64 else 4 * torch.finfo(F32).eps
    free = size * (torch.finfo(ours.dtype).eps / 2 * (ours.dtype != F64) + arithmetic) + FLUSHED
    for name, measure in (("largest", Tensor.max), ("RMS", lambda error: error.square().mean().sqrt())):
        got, allowed = float(measure(mine)), FACTOR * float(measure(theirs)) + free
        if got > allowed:
            return f"{name} error against fp64 {got:.2e}, {allowed:.2e} allowed"
    return None


@torch.no_grad()
def fault(
    check: Check, backend: str, device: torch.device, calling: Callable[[bool], None] = lambda now: None
) -> str | None:
    """What is wrong with a backend's answer to a check, or None.

    Args:
        check: what is asked.
        backend: of whom.
        device: of the tensors.
        calling: told when a call of the backend begins, and when the device is done with it.
    Raises:
        BackendError: the backend refuses the call.
    """
    case, shift = check.case, MISALIGNED if check.layout == "misaligned" else 0
    with torch.device(device):
        values = VALUES[check.values](case.tensors(check.dtype, check.size))
    if check.layout == "strided":
        # A weight that is changed in place lies in rows.
        values = {name: strided(value) if value.dim() > 1 else value for name, value in values.items()}
    composed, exact = references(case.op, handed(functools.partial(case.run, values)))
    runs: list[list[Tensor]] = []
    for fill in FILLS:
        inputs = {name: Guarded(value, fill, shift) for name, value in values.items()}
        outputs = [] if case.in_place else [Guarded(_stale(like, fill), fill, shift) for like in composed]
        calling(True)
        with ltxkern.use_backend(backend):
            results = case.run({n: g.tensor for n, g in inputs.items()}, [g.tensor for g in outputs])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calling(False)
        for name, guarded in [*inputs.items(), *((f"output {i}", g) for i, g in enumerate(outputs))]:
            if not guarded.untouched():
                return f"written outside of {name}"
        changed = next(iter(inputs)) if case.in_place else ""
        for name, guarded in inputs.items():
            if name != changed and not same_bits(guarded.tensor, values[name]):
                return f"the argument {name} was changed"
        runs.append(results)
    if not all(map(same_bits, *runs)):
        return "other bits the second time, in memory with other surroundings"
    for index, parts in enumerate(zip(runs[0], composed, exact, strict=True)):
        if (reason := distance(*parts, compute=check.dtype)) is not None:
            return f"output {index}: {reason}"
    return None


def _stale(like: Tensor, fill: int) -> Tensor:
    """What an output holds before it is written: NaN, then ones."""
    return torch.full_like(like, torch.nan if fill == FILLS[0] else 1.0)
