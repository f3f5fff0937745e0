"""How long each proven backend takes for calls of production size, beside a copy of the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import ltxkern
from ltxkern.verify.cases import BF16, BY_NAME, F32, OpCase, Size, Tensors
from ltxkern.verify.checks import IMPORTANCE

# What a backend must be quicker by to be preferred to one that dispatch would take first.
MARGIN = 1.05
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
# Read between two samples, so that none finds its operands in a cache: more than the last cache of any card.
FLUSH_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
LEAST_SAMPLES, MOST_SAMPLES = 5, 100


@dataclass(frozen=True)
class Timed:
    """One backend on one case: seconds of the median call, and what share of the copy's bytes a second its least traffic is."""

    op: str
    case: str
    tier: str
    seconds: float
    bytes: int
    roof: float
    percent_of_roof: float


def sizes(device: str) -> list[tuple[OpCase, torch.dtype, Size]]:
    """Calls of production size: of the video's tokens at stage 1 on a GPU, of the audio's on a CPU; the most important first."""
    on_gpu = device == "cuda"
    tokens, dtype = (8160, BF16) if on_gpu else (126, F32)
    rows, latent, noise = Size(1, tokens, 4096), Size(1, tokens, 128), Size(1, tokens // 8, 128)
    pictures = Size(1, 720 if on_gpu else 36, 80)
    wide = {"cos": F32, "sin": F32}
    groups = "x residual: 1 512 T W; weight bias conv_bias: 512"
    changed: dict[str, tuple[Size, dict[str, Any]]] = {
        "rms_norm_modulate": (rows, {"arguments": "x: B T W; scale shift: B 1 W"}),
        "gated_residual_rms_norm_modulate": (rows, {"arguments": "x y: B T W; gate scale shift: B 1 W"}),
        "gated_residual_rms_norm_modulate_twice": (
            rows,
            {"arguments": "x y: B T W; gate scale shift scale2 shift2: B 1 W"},
        ),
        "qk_norm_rope": (
            Size(1, tokens, 64),
            {"arguments": "q k: 1 T 64W; q_weight k_weight: 64W; cos sin: 1 32 T W", "fixed": wide},
        ),
        "gated_residual": (rows, {"arguments": "x y: B T W; gate: B 1 W"}),
        "head_gate": (latent, {"arguments": "x: B T 32 W; logits: B T 32"}),
        "group_norm_silu": (pictures, {"arguments": groups, "others": {"num_groups": 32}}),
        "pixel_norm_silu": (pictures, {"arguments": "x: 1 512 T W; weight: 512"}),
        "merge_lora_": (Size(1, 4096, 4096), {"arguments": "weight: T W; lora_a: 64 W; lora_b: T 64"}),
        **dict.fromkeys(("noise_statistics", "normalize_noise", "channelwise_normalize"), (noise, {})),
    }
    made = []
    for op in IMPORTANCE:
        size, change = changed.get(op, (latent, {}))
        made.append((replace(BY_NAME[op], **change), dtype, size))
    return made


class Clock:
    """Times calls on a device, each on cold caches.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], Any]) -> float:
        """Seconds of one call. On a GPU the flush ahead of it is long enough that the host has issued the call by then."""
        self._flush.fill_(1)
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def interleaved(self, calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        """Median seconds of each call, all in turn for so long at most; the first round warms up."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        end = time.monotonic() + seconds
        for call in calls.values():
            self.sample(call)
        for taken in range(MOST_SAMPLES):
            if taken >= LEAST_SAMPLES and time.monotonic() > end:
                break
            for name, call in calls.items():
                samples[name].append(self.sample(call))
        return {name: statistics.median(times) for name, times in samples.items()}

    def roof(self) -> float:
        """Bytes a second of a copy, reads and writes counted: the best of several."""
        source = torch.ones(COPY_BYTES[self._device.type] // 2, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * source.numel() / min(self.sample(lambda: target.copy_(source)) for _ in range(8))


def _on(tier: str, case: OpCase, tensors: Tensors) -> Callable[[], Any]:
    def call() -> Any:
        with ltxkern.use_backend(tier):
            return case.run(tensors)

    return call


@torch.no_grad()
def measure(
    device: torch.device, tiers: dict[str, list[str]], seconds: float, calling: Callable[[str, str, bool], None]
) -> Iterator[Timed]:
    """Time the tiers of every op; one that refuses a case is left out of it.

    Args:
        device: where they run.
        tiers: by op.
        seconds: of all samples together.
        calling: told of op and tier when the first call of each begins, and when the device is done with it.
    """
    clock = Clock(device)
    roof = clock.roof()
    chosen = [entry for entry in sizes(device.type) if entry[0].op in tiers]
    for case, dtype, size in chosen:
        with torch.device(device):
            tensors = case.tensors(dtype, size)
        calls: dict[str, Callable[[], Any]] = {}
        moved = 0
        for tier in tiers[case.op]:
            calling(case.op, tier, True)
            call = _on(tier, case, tensors)
            try:
                results = call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except (ltxkern.BackendError, torch.OutOfMemoryError):
                continue
            finally:
                calling(case.op, tier, False)
            moved = sum(tensor.nbytes for tensor in (*tensors.values(), *results))
            calls[tier] = call
        name = f"{str(dtype).removeprefix('torch.')} {size}"
        if calls:
            for tier, taken in clock.interleaved(calls, seconds / len(chosen)).items():
                yield Timed(case.op, name, tier, taken, moved, roof, 100 * moved / roof / taken)


def preferred(rows: Sequence[Timed], usual: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By op the tiers in the order of preference: a quicker one goes ahead only of what it beats by the margin; never torch."""
    order: dict[str, tuple[str, ...]] = {}
    for op in dict.fromkeys(row.op for row in rows):
        seconds = {row.tier: row.seconds for row in rows if row.op == op and row.tier != "torch"}
        ranked: list[str] = []
        for tier in sorted(seconds, key=list(usual).index):
            place = next((i for i, other in enumerate(ranked) if seconds[tier] * MARGIN < seconds[other]), len(ranked))
            ranked.insert(place, tier)
        if ranked:
            order[op] = tuple(ranked)
    return order
