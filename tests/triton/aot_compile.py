"""Compiles every Triton launch at production shapes for several architectures without a GPU, and reads what the cubins need.

Run without TRITON_INTERPRET: `python -m tests.triton.aot_compile OUT.json [arch ...]`. The ops run on meta tensors; a driver
that only names a target makes Triton compile what they would launch, with the real argument specialisation, and launch nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import ltxkern
from ltxkern import dispatch
from ltxkern import triton as tier
from ltxkern.verify.cases import BF16, F32, F64
from tests.csrc.kernel_resources import told
from tests.ops.contract import channels_last

ARCHITECTURES = (80, 90, 100, 120)


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


Call = Callable[[], object]
LATENT, AUDIO, TOKENS = (1, 32640, 128), (1, 126, 128), (1, 32640)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def upsampler(*shape: int, dtype: torch.dtype = BF16, last: bool = False, full: bool = False) -> Call:
    """A norm of (1, C, *), parameters in fp32; `full` with residual and bias of the convolution."""
    x = channels_last(empty(1, *shape, dtype=dtype)) if last else empty(1, *shape, dtype=dtype)
    weight, bias, conv_bias = (empty(shape[0], dtype=F32) for _ in range(3))
    more = {"residual": torch.empty_like(x), "conv_bias": conv_bias} if full else {}
    return partial(ltxkern.group_norm_silu, x, weight, bias, 32, **more)


def decoder(*shape: int, last: bool = False) -> Call:
    return partial(ltxkern.pixel_norm_silu, channels_last(empty(1, *shape)) if last else empty(1, *shape))


def noise(*shape: int, dtype: torch.dtype = F64) -> list[Call]:
    return [partial(op, empty(*shape, dtype=dtype)) for op in (ltxkern.normalize_noise, ltxkern.noise_statistics)]


def guidance(dtype: torch.dtype) -> Call:
    scales = {"cfg_scale": 3.0, "stg_scale": 1.25, "modality_scale": 2.5, "rescale_scale": 0.7}
    return partial(ltxkern.combine_guidance, *(empty(*LATENT, dtype=dtype) for _ in range(4)), **scales)


def half_steps(compute: torch.dtype, *, masked: bool = False) -> list[Call]:
    """Both half-steps of two modalities, with raw noise."""
    step = ltxkern.res2s_steps([1.0, 0.93])[0]

    def both(dtype: torch.dtype = BF16) -> list[Tensor]:
        return [empty(*shape, dtype=dtype) for shape in (LATENT, AUDIO)]

    given: dict[str, Any] = {"noise_stats": [empty(1, 3, dtype=F64) for _ in range(2)]}
    if masked:
        given |= {"mask": [empty(*shape[:-1], 1, dtype=F32) for shape in (LATENT, AUDIO)], "clean": both()}
    return [
        partial(ltxkern.res2s_midpoint, both(), both(), both(F64), step, **given, compute_dtype=compute),
        partial(ltxkern.res2s_advance, both(compute), both(), both(), both(F64), step, **given),
    ]


def merge(ranks: int, dtype: torch.dtype = BF16) -> Call:
    shapes = [(384, 4096)] * ranks, [(4096, 384)] * ranks
    factors = [[empty(*shape, dtype=dtype) for shape in side] for side in shapes]
    return partial(ltxkern.merge_lora_, empty(4096, 4096, dtype=dtype), *factors, [0.7, -0.4][:ranks])


def two_adds(dtype: torch.dtype) -> Call:
    return partial(ltxkern.dual_add, *(empty(4096, 4096, dtype=dtype) for _ in range(3)))


def block(*rows: int, by_rows: bool) -> list[Call]:
    """The elementwise ops of a transformer block; `rows`: leading dims of its scales, shifts and gates."""
    x, y = empty(*TOKENS, 4096), empty(*TOKENS, 4096)
    gate, scale, shift, scale2, shift2 = (empty(*rows, 4096) for _ in range(5))
    index = {"rows": empty(*TOKENS, dtype=torch.int64) if by_rows else None}
    return [
        partial(ltxkern.rms_norm_modulate, x, scale, shift, **index),
        partial(ltxkern.gated_residual_rms_norm_modulate, x, y, gate, scale, shift, **index),
        partial(ltxkern.gated_residual_rms_norm_modulate_twice, x, y, gate, scale, shift, scale2, shift2, **index),
        partial(ltxkern.gated_residual, x, y, gate, **index),
    ]


def rotation(cos: torch.Tensor, sin: torch.Tensor, **more: Any) -> Call:
    """Queries and keys of the video, by these tables."""
    q, k, *weights = empty(*TOKENS, 4096), empty(*TOKENS, 4096), empty(4096), empty(4096)
    return partial(ltxkern.qk_norm_rope, q, k, *weights, cos, sin, **more)


def attention() -> list[Call]:
    return [
        partial(ltxkern.head_gate, empty(*TOKENS, 32, 128), empty(*TOKENS, 32)),
        rotation(*(empty(1, 32, TOKENS[1], 64, dtype=F32) for _ in range(2))),
    ]


def rotation_by_rows() -> Call:
    cos, sin = empty(16 + 34 + 60, 683, 2, dtype=F32).unbind(-1)
    return rotation(cos, sin, rows=empty(1, 3, TOKENS[1], dtype=torch.int32), heads=32)


# Calls of production size, by the name of their row in the baseline.
PRODUCTION: dict[str, list[Call]] = {
    "group_norm-8x45x80": [upsampler(512, 8, 45, 80)],
    "group_norm-16x180x320": [upsampler(512, 16, 180, 320)],
    "group_norm-1024-16x34x60-full": [upsampler(1024, 16, 34, 60, full=True)],
    "group_norm-1024-16x34x60-last-full": [upsampler(1024, 16, 34, 60, last=True, full=True)],
    "group_norm-fp32-8x45x80": [upsampler(512, 8, 45, 80, dtype=F32)],
    "group_norm-single-512-8x8x8": [upsampler(512, 8, 8, 8, full=True)],
    "pixel_norm-128": [decoder(128, 9, 272, 480)],
    "pixel_norm-1024": [decoder(1024, 9, 68, 120)],
    "pixel_norm-128-last": [decoder(128, 9, 272, 480, last=True)],
    "pixel_norm-1024-last": [decoder(1024, 9, 68, 120, last=True)],
    "noise-32640x128": noise(*LATENT),
    "noise-128x16x34x60": noise(1, 128, 16, 34, 60),
    "noise-small": noise(1, 126, 32, dtype=F32),
    "guidance-bf16": [guidance(BF16)],
    "guidance-fp64": [guidance(F64)],
    "half-steps": half_steps(F64),
    "half-steps-masked": half_steps(F64, masked=True),
    "half-steps-fp32": half_steps(F32),
    "sde-step": [
        partial(ltxkern.res2s_sde_step, empty(*LATENT, dtype=F64), empty(*LATENT), 0.93, 0.6, empty(*LATENT, dtype=F64))
    ],
    "merge-bf16": [merge(1)],
    "merge-bf16-2": [merge(2)],
    "merge-fp32": [merge(1, F32)],
    "dual-add-bf16": [two_adds(BF16)],
    "dual-add-fp32": [two_adds(F32)],
    "block-4096": [*block(1, 1, by_rows=False), *attention()],
    "block-by-rows-4096": [*block(2, by_rows=True), rotation_by_rows()],
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


def compiled(call: Call) -> list[tuple[str, bytes]]:
    """(kernel name, cubin) of everything that a call would launch."""
    found: list[tuple[str, bytes]] = []
    stock = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__.strip("_"), kernel.asm["cubin"]))
        return kernel

    JITFunction.run = compile_only
    try:
        with ltxkern.use_backend("triton"):
            call()
    finally:
        JITFunction.run = stock
    return found


def target(arch: int) -> None:
    """Triton compiles for this architecture from now on, and serves what no device holds."""
    triton.runtime.driver.set_active(NamedTarget(arch))
    dispatch.unavailable = lambda backend: None
    dispatch._waiting = lambda backend: False
    tier.refuse_elsewhere = lambda args: None


def resources(cubin: bytes, disassemble: bool) -> dict[str, int]:
    """Registers and stack bytes of a cubin, and its 128-bit global accesses, which take a second of nvdisasm."""
    usage = told(cubin, "--dump-resource-usage")
    row = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    report = {"registers": row["REG"], "stack": row["STACK"] + row["LOCAL"]}
    if disassemble:
        sass = told(cubin, "-c", "-ndf", by="nvdisasm")
        report["loads128"] = len(re.findall(r"\bLDG(?:STS)?(?:\.\w+)*\.128\b", sass))
        report["stores128"] = len(re.findall(r"\bSTG(?:\.\w+)*\.128\b", sass))
    return report


def main() -> None:
    path, *names = sys.argv[1:]
    report: dict[str, dict[str, int]] = {}
    for arch in [int(name) for name in names] or ARCHITECTURES:
        target(arch)
        full = arch == FULL_ARCHITECTURE
        for name in PRODUCTION if full else CORE:
            for kernel, cubin in (launch for call in PRODUCTION[name] for launch in compiled(call)):
                key = f"sm_{arch} {name} {kernel}"
                report[f"{key} 2" if key in report else key] = resources(cubin, full)
    Path(path).write_text(json.dumps(report, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
