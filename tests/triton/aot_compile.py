"""Compiles every Triton launch at production shapes for several architectures without a GPU, and reads what the cubins need.

Run as a script, without TRITON_INTERPRET: `python aot_compile.py OUT.json [arch ...]`. The launchers run on meta tensors; a driver
that only names a target makes Triton compile what they would launch, with the real argument specialisation, and launch nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ltxkern import res2s_steps
from ltxkern.triton import (
    combine_guidance,
    dual_add,
    gated_residual,
    group_norm_silu,
    merge_lora,
    normalize_noise,
    pixel_norm_silu,
    qk_norm_rope,
    res2s,
    rms_norm_modulate,
)

ARCHITECTURES = (80, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


class NamedTarget:
    """The part of a driver that compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def empty(*shape: int, dtype: torch.dtype = BF16, last: bool = False) -> Tensor:
    value = torch.empty(shape, dtype=dtype, device="meta")
    return value.to(memory_format=torch.channels_last_3d) if last else value


def group_norm(shape: tuple[int, ...], *, last: bool = False, full: bool = False, dtype: torch.dtype = BF16) -> None:
    x = empty(*shape, dtype=dtype, last=last)
    weight = empty(shape[1], dtype=FP32)
    group_norm_silu.launch(
        torch.empty_like(x), x, weight, weight, 32, 1e-5, x if full else None, weight if full else None
    )


def pixel_norm(shape: tuple[int, ...], *, last: bool = False, dtype: torch.dtype = BF16) -> None:
    x = empty(*shape, dtype=dtype, last=last)
    pixel_norm_silu.launch(torch.empty_like(x), x, 1e-8, None)


def noise(shape: tuple[int, ...], dtype: torch.dtype = FP64) -> None:
    x = empty(*shape, dtype=dtype)
    normalize_noise.launch(torch.empty_like(x), x)
    normalize_noise.launch_statistics(empty(x.shape[:-2].numel(), 3, dtype=FP64), x)


def guidance(dtype: torch.dtype) -> None:
    x = empty(1, 32640, 128, dtype=dtype)
    combine_guidance.launch(torch.empty_like(x), x, x, x, x, 3.0, 1.0, 3.0, 0.7)


def half_steps(masked: bool, compute: torch.dtype) -> None:
    step = res2s_steps([1.0, 0.9])[0]
    state = [empty(1, 32640, 128), empty(1, 126, 128)]
    draws = [torch.empty_like(x, dtype=FP64) for x in state]
    anchors = [torch.empty_like(x, dtype=compute) for x in state]
    mask = [empty(1, x.shape[1], 1, dtype=FP32) if masked else None for x in state]
    clean = state if masked else [None, None]
    stats = [empty(1, 3, dtype=FP64)] * 2
    res2s.launch_midpoint(
        [*state, *anchors], state, state, draws, mask, clean, stats, [0.1, *step.substep], True, compute
    )
    res2s.launch_advance(
        state, anchors, state, state, draws, mask, clean, stats, [0.1, 0.2, *step.advance], [BF16, BF16]
    )


def sde_step() -> None:
    x, draw = empty(1, 32640, 128), empty(1, 32640, 128, dtype=FP64)
    res2s.launch_sde_step(x, draw, x, draw, [0.1, 0.2, 0.3], None)


def merge(dtype: torch.dtype, loras: int) -> None:
    weight, a, b = empty(4096, 4096, dtype=dtype), empty(384, 4096, dtype=dtype), empty(4096, 384, dtype=dtype)
    merge_lora.launch(weight, [a] * loras, [b] * loras, [0.5] * loras, 32 << 20, "single")


def two_sums(dtype: torch.dtype) -> None:
    x = empty(4096, 4096, dtype=dtype)
    dual_add.launch((x, torch.empty_like(x)), x, x, x)


def block(width: int) -> None:
    x, row = empty(1, 32640, width), empty(1, 1, width)
    rms_norm_modulate.launch(x, x, row, row, 1e-6, None)
    rms_norm_modulate.launch_gated((x, x), x, x, row, row, row, 1e-6, None)
    gated_residual.launch(x, x, x, row)
    heads = x.unflatten(-1, (32, -1))
    gated_residual.launch_head_gate(heads, heads, empty(1, 32640, 32))
    table = empty(1, 32, 32640, width // 64, dtype=FP32)
    weight = empty(width)
    qk_norm_rope.launch((x, x), x, x, weight, weight, table, table, 1e-6, "split")


def block_by_rows(width: int) -> None:
    x, table, rows = empty(1, 32640, width), empty(2, width), empty(1, 32640, dtype=torch.int64)
    rms_norm_modulate.launch(x, x, table, table, 1e-6, None, rows)
    rms_norm_modulate.launch_gated((x, x), x, x, table, table, table, 1e-6, None, rows)
    gated_residual.launch(x, x, x, table, rows)


LAUNCHES: dict[str, Callable[[], None]] = {
    "group_norm-8x45x80": lambda: group_norm((1, 512, 8, 45, 80)),
    "group_norm-16x180x320": lambda: group_norm((1, 512, 16, 180, 320)),
    "group_norm-1024-16x34x60-full": lambda: group_norm((1, 1024, 16, 34, 60), full=True),
    "group_norm-1024-16x34x60-last-full": lambda: group_norm((1, 1024, 16, 34, 60), last=True, full=True),
    "group_norm-fp32-8x45x80": lambda: group_norm((1, 512, 8, 45, 80), dtype=FP32),
    "group_norm-single-512-8x8x8": lambda: group_norm((1, 512, 8, 8, 8), full=True),
    "pixel_norm-128": lambda: pixel_norm((1, 128, 9, 272, 480)),
    "pixel_norm-1024": lambda: pixel_norm((1, 1024, 9, 68, 120)),
    "pixel_norm-128-last": lambda: pixel_norm((1, 128, 9, 272, 480), last=True),
    "pixel_norm-1024-last": lambda: pixel_norm((1, 1024, 9, 68, 120), last=True),
    "noise-32640x128": lambda: noise((1, 32640, 128)),
    "noise-128x16x34x60": lambda: noise((1, 128, 16, 34, 60)),
    "noise-small": lambda: noise((1, 126, 32), FP32),
    "guidance-bf16": lambda: guidance(BF16),
    "guidance-fp64": lambda: guidance(FP64),
    "half-steps": lambda: half_steps(False, FP64),
    "half-steps-masked": lambda: half_steps(True, FP64),
    "half-steps-fp32": lambda: half_steps(False, FP32),
    "sde-step": sde_step,
    "merge-bf16": lambda: merge(BF16, 1),
    "merge-bf16-2": lambda: merge(BF16, 2),
    "merge-fp32": lambda: merge(FP32, 1),
    "dual-add-bf16": lambda: two_sums(BF16),
    "dual-add-fp32": lambda: two_sums(FP32),
    "block-4096": lambda: block(4096),
    "block-by-rows-4096": lambda: block_by_rows(4096),
}

# One launch of every kernel, compiled for each architecture; the whole table and its disassembly are for FULL_ARCHITECTURE.
CORE = (
    "group_norm-1024-16x34x60-full",
    "group_norm-single-512-8x8x8",
    "pixel_norm-1024",
    "noise-32640x128",
    "noise-small",
    "guidance-bf16",
    "half-steps-masked",
    "sde-step",
    "merge-bf16",
    "dual-add-bf16",
    "block-4096",
)
FULL_ARCHITECTURE = 90


def compiled(launch: Callable[[], None]) -> Iterator[tuple[str, bytes]]:
    """(kernel name, cubin) of everything a launcher would launch."""
    found: list[tuple[str, bytes]] = []
    stock = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__.strip("_"), kernel.asm["cubin"]))
        return kernel

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = stock
    yield from found


def resources(cubin: bytes, disassemble: bool) -> dict[str, int]:
    """Registers and stack bytes of a cubin, and its 128-bit global accesses, which take a second of nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = ""
        if disassemble:
            command = [TOOLS / "nvdisasm", "-c", "-ndf", file.name]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    row = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    report = {"registers": row["REG"], "stack": row["STACK"] + row["LOCAL"]}
    if disassemble:
        report["loads128"] = len(re.findall(r"\bLDG(?:STS)?(?:\.\w+)*\.128\b", sass))
        report["stores128"] = len(re.findall(r"\bSTG(?:\.\w+)*\.128\b", sass))
    return report


def main() -> None:
    path, *names = sys.argv[1:]
    report: dict[str, dict[str, int]] = {}
    for arch in [int(name) for name in names] or ARCHITECTURES:
        triton.runtime.driver.set_active(NamedTarget(arch))
        full = arch == FULL_ARCHITECTURE
        for name in LAUNCHES if full else CORE:
            for kernel, cubin in compiled(LAUNCHES[name]):
                key = f"sm_{arch} {name} {kernel}"
                report[f"{key} 2" if key in report else key] = resources(cubin, full)
    Path(path).write_text(json.dumps(report, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
