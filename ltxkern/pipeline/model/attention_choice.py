"""Which kernel computes attention: the best of an order known for the card, or a named one; each checked at its first use."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ltxkern.pipeline.model.attention_kernels import (
    KERNELS,
    Capability,
    Case,
    Run,
    capability,
    key_shares,
    math_share,
    short,
    torch_attention,
)

logger = logging.getLogger(__name__)

NAMES = ("auto", *KERNELS)
# Relative RMS distance from fp64, in units of the number format, that is right however well the math kernel did.
ROUNDINGS = 4
APPROXIMATE = 0.1

# From the least compute capability on, best first. torch's flash kernel is the second generation, made for 8.x; only cuDNN and
# the third use the asynchronous matrix products of 9.0, and the third has no code for what came after.
ORDERS: tuple[tuple[Capability, tuple[str, ...]], ...] = (
    ((10, 0), ("cudnn", "flash", "efficient", "math")),
    ((9, 0), ("fa3", "cudnn", "flash", "efficient", "math")),
    ((8, 0), ("flash", "cudnn", "efficient", "math")),
    ((0, 0), ("efficient", "math")),
)


def order(device: torch.device) -> tuple[str, ...]:
    """The kernels of a device that may serve unnamed, best first."""
    if device.type == "cpu":
        return ("flash", "math")
    if device.type != "cuda" or torch.version.hip:
        return ("torch",)
    return next(names for least, names in ORDERS if capability(device) >= least)


@functools.cache
def fault(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, shared: bool = False) -> str | None:
    """What is wrong with a kernel's result on a tiny case, with its keys in shares or not; None where it is right.

    It is held to fp64, within 1.5 times what the math kernel is away from it or a few roundings. Costs a call the first time.
    """
    kernel, generator = KERNELS[name], torch.Generator().manual_seed(0)
    with _disable_current_modes(), torch.no_grad():
        query, key, value = (
            torch.randn(1, rows, 2 * head_dim, generator=generator).to(device, dtype).unflatten(2, (2, head_dim))
            for rows in (40, 96, 96)
        )
        expected = math_share(query.double(), key.double(), value.double())[0]

        def error(result: Tensor) -> float:
            return float((result.double() - expected).norm() / expected.norm())

        limit = APPROXIMATE
        if kernel.exact:
            limit = max(1.5 * error(KERNELS["math"].run(query, key, value)), ROUNDINGS * torch.finfo(dtype).eps)
        try:
            if shared and kernel.in_shares is not None:
                found = error(kernel.in_shares(2, query, key, value))
            else:
                found = error(kernel.run(query, key, value))
        except (RuntimeError, TypeError, AttributeError, ImportError, OSError) as failure:
            return f"it failed on a tiny case: {str(failure).strip().splitlines()[0]}"
    return None if found <= limit else f"it is {found:.1e} from fp64 on a tiny case, allowed {limit:.1e}"


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclass
class AttentionChoice:
    """The attention of a pipeline: a kernel by its name, or with "auto" the first of the card's order that serves a case.

    A kernel is chosen once for a shape, from what it declares, and checked on a tiny case when it first serves a dtype and head
    width: one of the order that fails is dropped with a warning. A named one is never replaced. While a CUDA graph is captured
    nothing is checked.

    Attributes:
        name: one of `NAMES`; None for what the variable LTXKERN_ATTENTION says, else "auto".
        served: names of the kernels that have served.
    """

    name: str | None = None
    served: set[str] = field(default_factory=set, init=False)
    _names: dict[Case, str] = field(default_factory=dict, init=False, repr=False)
    _runs: dict[tuple[Any, ...], Run] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        source = "attention" if self.name is not None else "LTXKERN_ATTENTION"
        self.name = self.name if self.name is not None else os.environ.get("LTXKERN_ATTENTION") or "auto"
        if self.name not in NAMES:
            raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {self.name!r}")

    @classmethod
    def of(cls, choice: str | AttentionChoice | None) -> AttentionChoice:
        """One by a name, or the one that is given."""
        return choice if isinstance(choice, AttentionChoice) else cls(choice)

    def require(
        self, device: torch.device, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> AttentionChoice:
        """Refuse a named kernel that cannot serve a transformer, before anything is loaded; itself otherwise.

        Args:
            device, dtype: of the forward; dtype None where it is not known.
            config: of the transformer, for its head widths.
        Raises:
            ValueError: with the reason.
        """
        names = ("attention_head_dim", "audio_attention_head_dim")
        widths: list[int | None] = [int(config[name]) for name in names if name in config] if config else [None]
        for width in widths:
            self._candidates(Case(device, dtype, width, self.name != "auto"))
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, T, H, d) queries over (B, L, H, d) keys and values; (B, T, H, d).

        Raises:
            ValueError: the named kernel cannot serve the case, or failed its check.
        """
        layout = (query.device, query.dtype, query.shape, key.shape)
        run = self._runs.get(layout)
        if run is None:
            run = self._find(query, key, layout)
        return run(query, key, value)

    def _candidates(self, case: Case) -> list[str]:
        assert self.name is not None
        if self.name == "auto":
            return [name for name in order(case.device) if KERNELS[name].refuse(case) is None]
        reason = KERNELS[self.name].refuse(case)
        if reason is not None:
            others = [name for name, kernel in KERNELS.items() if kernel.exact and kernel.refuse(case) is None]
            what = f"{short(case.dtype)} on {case.device}"
            raise ValueError(
                f"attention {self.name} cannot serve {what}: {reason}; use one of auto, {', '.join(others)}"
            )
        return [self.name]

    def kernel(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """Name of the kernel for a dtype and a width of heads, which are checked where they are new.

        Raises:
            ValueError: the named kernel cannot serve them, or failed its check.
        """
        case = Case(device, dtype, head_dim, self.name != "auto")
        known = self._names.get(case)
        if known is not None:
            return known
        names = self._candidates(case)
        if _captures(device):
            return names[0]
        for name in names:
            wrong = fault(name, device, dtype, head_dim)
            if wrong is None:
                break
            if case.named:
                raise ValueError(f"attention {name} cannot serve on {device}: {wrong}")
            logger.warning("attention by %s is dropped on %s: %s", name, device, wrong)
        else:
            raise ValueError(f"attention: none of {', '.join(names)} is right on {device} in {short(dtype)}")
        if name not in self.served:
            refusals = {other: KERNELS[other].refuse(case._replace(named=False)) for other in order(device)}
            others = ", ".join(f"{other} ({reason})" for other, reason in refusals.items() if reason)
            logger.info("attention is computed by %s on %s%s", name, device, others and f"; not by {others}")
        self.served.add(name)
        self._names[case] = name
        return name

    def _find(self, query: Tensor, key: Tensor, layout: tuple[Any, ...]) -> Run:
        if query.device.type == "meta" or not query.numel() or not key.numel():
            return torch_attention  # shapes alone, or nothing to compute
        name = self.kernel(query.device, query.dtype, query.shape[-1])
        run, shares = KERNELS[name].run, self._shares(name, query, key)
        if (shared := KERNELS[name].in_shares) is not None and shares > 1:
            run = functools.partial(shared, shares)
        if not _captures(query.device):
            self._runs[layout] = run
        return run

    def _shares(self, name: str, query: Tensor, key: Tensor) -> int:
        # torch's flash kernel shares out long keys by itself; on a CPU threads take heads.
        if query.device.type != "cuda" or KERNELS[name].in_shares is None or name == "flash":
            return 1
        count = torch.cuda.get_device_properties(query.device).multi_processor_count
        shares = key_shares(query.shape[0], query.shape[1], key.shape[1], query.shape[2], count)
        if shares == 1 or _captures(query.device):
            return shares
        wrong = fault(name, query.device, query.dtype, query.shape[-1], shared=True)
        if wrong is not None:
            logger.warning("attention by %s takes long keys in one walk on %s: %s", name, query.device, wrong)
            return 1
        logger.info("attention by %s takes %d keys in %d shares", name, key.shape[1], shares)
        return shares


_current: ContextVar[AttentionChoice | None] = ContextVar("ltxkern_attention", default=None)
_default = functools.cache(AttentionChoice)


@contextlib.contextmanager
def use_attention(choice: AttentionChoice | str) -> Iterator[AttentionChoice]:
    """Within it the transformer's attention is computed as chosen.

    Args:
        choice: one that is kept, or a name.
    Raises:
        ValueError: unknown name; with the legal ones.
    """
    chosen = AttentionChoice.of(choice)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)


def _kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What torch.compile fixes in a graph: the kernel that is in force while it traces."""
    return (_current.get() or _default()).kernel(device, dtype, head_dim)


# The mark of `torch.compiler.assume_constant_result`, which would import the whole compiler before any request is refused.
_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` per head, by the kernel that is in force.

    Args:
        query: (B, T, H, d).
        key, value: (B, L, H, d).
    Returns:
        (B, T, H, d).

    Contract: rounded; on a CPU the bits of torch's own choice.
    """
    if torch.compiler.is_compiling():
        return KERNELS[_kernel(query.device, query.dtype, query.shape[-1])].run(query, key, value)
    return (_current.get() or _default())(query, key, value)
