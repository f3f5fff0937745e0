"""Launches and elementwise bytes of one transformer block, counted from shapes alone: it runs on the meta device.

A video-sized pass is one kernel that walks over a video-sized tensor: `video_passes` counts the launches that read or write at
least a quarter of a (T, 4096) bf16 tensor, T being the video tokens, matrix products and attention left out. `video_tensors` is
what those launches move, in units of that tensor: a fused pass reads and writes several. What a launch moves is what its kernel
has to: every distinct tensor argument once, the elements that an expanded dim repeats once, and every result. Views are free;
matrix products and attention are launches without elementwise bytes, and so is an activation within a product's epilogue. All
other launches (sound, text, modulation) count their bytes and no pass.

A forward is predicted from that: products and attention at their rates, the bytes of video-sized passes at theirs, a launch each
for all other elementwise work. `beyond_percent` is what the last two add to the first two. No forward of it is measured.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cases import count_bytes

WIDTH = 4096
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "linear", "_linear_pointwise")
# What launches nothing.
NO_LAUNCH = (
    "_fused_sdp_choice",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "_unsafe_view",
    "detach",
    "alias",
)
# What these change they do not read; those take a tensor for its shape alone.
OVERWRITING = ("copy_", "fill_", "zero_")
FILLING = ("new_", "zeros", "ones", "full", "rand")


class Rates(NamedTuple):
    """Of a card: flop/s of products and of attention, bytes/s of elementwise passes, seconds of a launch of next to nothing."""

    products: float
    attention: float
    bytes: float
    launch: float


# results/nvidia-h200-df8da9e3f6-attention.json: its product of random bf16, cuDNN on the video of stage 2 (at stage 1: 552e12), and
# 88 % of its copy, the least that docs/predicted.md says of the CUDA tier at these shapes. That of a launch is assumed.
H200 = Rates(678e12, 589e12, 0.88 * 4.19e12, 2.5e-6)
BLOCKS = 48


@dataclass(frozen=True)
class Launched:
    """One kernel launch: where it comes from, what it is; what it moves outside matrix products and attention, else its flops.

    wide: whether it writes a tensor of more than two bytes a value that is as large as `largest`.
    """

    site: str
    op: str
    bytes: int
    largest: int
    flops: int = 0
    wide: bool = False


@dataclass
class Count:
    """The launches of one block, and the most bytes that it had made and not yet let go of; `unit` is a (T, 4096) bf16 tensor's."""

    unit: int
    launches: list[Launched] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def elementwise_bytes(self) -> int:
        """Moved by all launches but matrix products and attention."""
        return sum(one.bytes for one in self.launches)

    def _is_video(self, one: Launched) -> bool:
        return bool(one.bytes) and 4 * one.largest >= self.unit

    @property
    def video_passes(self) -> int:
        """Launches that walk over a video-sized tensor."""
        return sum(map(self._is_video, self.launches))

    @property
    def video_tensors(self) -> float:
        """Video-sized tensors read or written by these passes."""
        return sum(one.bytes for one in self.launches if self._is_video(one)) / self.unit

    @property
    def wide_passes(self) -> int:
        """Video-sized passes that write more than two bytes a value: fp32 temporaries."""
        return sum(self._is_video(one) and one.wide for one in self.launches)

    def predicted(self, rates: Rates) -> tuple[float, float]:
        """Seconds of a forward of 48 such blocks: products and attention, then all else."""
        flops: Counter[bool] = Counter()
        for one in self.launches:
            flops[one.op == "attention"] += one.flops
        moved = sum(one.bytes for one in self.launches if self._is_video(one))
        small = sum(bool(one.bytes) and not self._is_video(one) for one in self.launches)
        within = flops[False] / rates.products + flops[True] / rates.attention
        return BLOCKS * within, BLOCKS * (moved / rates.bytes + small * rates.launch)

    def sites(self) -> list[tuple[str, int, float]]:
        """Of the video-sized passes: site with op, how many, the tensors that they move; most of these first."""
        moved: Counter[str] = Counter()
        passes: Counter[str] = Counter()
        for one in filter(self._is_video, self.launches):
            name = f"{one.site} {one.op}"
            moved[name] += one.bytes
            passes[name] += 1
        return [(name, passes[name], each / self.unit) for name, each in moved.most_common()]

    def row(self, shape: str, provider: str) -> dict[str, Any]:
        """Plain data."""
        within, beyond = self.predicted(H200)
        return {
            "shape": shape,
            "provider": provider,
            "video_passes": self.video_passes,
            "video_tensors": round(self.video_tensors, 2),
            "elementwise_bytes": self.elementwise_bytes,
            "launches": len(self.launches),
            "wide_passes": self.wide_passes,
            "peak_tensors": round(self.peak_bytes / self.unit, 2),
            "gemm_and_attention_ms": round(1e3 * within, 1),
            "beyond_percent": round(100 * beyond / within, 1),
            "sites": [{"site": s, "video_passes": n, "video_tensors": round(m, 2)} for s, n, m in self.sites()],
        }


def moved_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all distinct tensors; the elements that an expanded dim repeats lie in memory once."""
    distinct = {
        (id(t.untyped_storage()), t.storage_offset(), t.dtype, t.shape, t.stride()): t for t in tensors if t.numel()
    }
    return count_bytes([*distinct.values()])


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor))


def _site() -> str:
    """The function of a model's own source that asked for the launch."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name in ("model", "patching") or path.stem.startswith("transformer"):
            # With the class, where Python knows it.
            return f"{path.stem}.{getattr(frame.f_code, 'co_qualname', frame.f_code.co_name).removesuffix('.forward')}"
        frame = frame.f_back
    return "elsewhere"


class _OnDevice(TorchFunctionMode):
    """What a device does in one kernel and the meta device does not: attention, RMSNorm."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else settings["query"]
            key = args[1] if len(args) > 1 else settings["key"]
            self._count.launches.append(Launched(_site(), "attention", 0, 0, 4 * query.numel() * key.shape[-2]))
            return torch.empty_like(query)  # the kernels keep the memory order of the queries
        if func in (torch.nn.functional.rms_norm, torch.rms_norm):
            tensors = [*_tensors((args, settings))]
            result = torch.empty_like(tensors[0])
            moved = moved_bytes(tensors) + moved_bytes([result])
            self._count.launches.append(Launched(_site(), "rms_norm", moved, max(map(count_bytes, tensors))))
            return result
        return func(*args, **settings)


class Launches(TorchDispatchMode):
    """Notes the launches of what runs inside."""

    def __init__(self, count: Any) -> None:
        super().__init__()
        self._count = count

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The op's call."""
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.run(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        if func.is_view or name in NO_LAUNCH:
            return result
        if "scaled_dot_product" in name:
            self._count.launches.append(Launched(_site(), "attention", 0, 0, 4 * args[0].numel() * args[1].shape[-2]))
            return result
        if name in PRODUCTS:
            matrix = args[0] if name in ("mm", "bmm", "linear", "_linear_pointwise") else args[1]
            self._count.launches.append(Launched(_site(), "product", 0, 0, 2 * result.numel() * matrix.shape[-1]))
            return result
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        changed = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        unread = changed if name in OVERWRITING or name.endswith("_out") else set()
        if name.startswith(FILLING):
            unread = set(given)
        read = [*_tensors([value for key, value in given.items() if key not in unread])]
        written = [*_tensors(([given.get(key) for key in changed], result))]
        moved = moved_bytes(read) + moved_bytes(written)
        largest = max(map(count_bytes, [*read, *written]), default=0)
        wide = any(tensor.element_size() > 2 and count_bytes([tensor]) == largest for tensor in written)
        self._count.launches.append(Launched(_site(), name, moved, largest, wide=wide))
        return result


class _Live(TorchDispatchMode):
    """Memory that what runs inside makes: the most of it that is held at one time."""

    def __init__(self, count: Count, given: Any) -> None:
        super().__init__()
        self._count = count
        # Of these none is made inside; a reference keeps the address from being another's.
        self._given = {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(given)}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for storage in (tensor.untyped_storage() for tensor in _tensors(result)):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._count.peak_bytes = max(self._count.peak_bytes, sum(size for _, size in self._made.values()))
        return result


@torch.no_grad()
def count_block(block: torch.nn.Module, call: Callable[[], Any], tokens: int) -> Count:
    """What one block launches within `call`, a forward on the meta device that runs it once.

    Args:
        block: of the model that `call` runs.
        tokens: of the video.
    """
    count = Count(tokens * WIDTH * 2)
    # Of the class: a patched block that is given a forward of its own is not fused any longer.
    kind: Any = type(block)
    forward = kind.forward

    def watched(one: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if one is not block:
            return forward(one, *args, **kwargs)
        with _OnDevice(count), _Live(count, (args, kwargs, [*block.parameters()])), Launches(count):
            return forward(one, *args, **kwargs)

    with mock.patch.object(kind, "forward", watched):
        call()
    return count


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The counts of a block, then what of ours remains, as text."""
    lines = [
        f"{'shape':8}{'provider':12}{'video passes':>14}{'video tensors':>15}{'elementwise bytes':>19}{'launches':>10}"
        f"{'GEMM, attention':>17}{'beyond':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row['shape']:8}{row['provider']:12}{row['video_passes']:14}{row['video_tensors']:15.1f}"
            f"{row['elementwise_bytes']:19}{row['launches']:10}{row['gemm_and_attention_ms']:14} ms{row['beyond_percent']:8}%"
        )
    rates = f"products {H200.products / 1e12:.0f} and attention {H200.attention / 1e12:.0f} TFLOP/s, {H200.bytes / 1e12:.2f} TB/s"
    lines.append(
        f"The last two, predicted for {BLOCKS} blocks on an H200: {rates}, {1e6 * H200.launch} us a small launch"
    )
    last = next((row for row in reversed(rows) if row["provider"] == "ltxkern"), None)
    for one in last["sites"] if last else ():
        lines.append(f"{one['video_tensors']:8.2f} tensors, {one['video_passes']:2} passes: {one['site']}")
    return "\n".join(lines)
