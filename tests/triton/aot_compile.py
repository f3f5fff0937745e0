"""Compiles every Triton launch at production shapes for several architectures without a GPU, and reads what the cubins need.

Run as a script, without TRITON_INTERPRET: `python aot_compile.py OUT.json [arch ...]`. The ops run on meta tensors; a driver
that only names a target makes Triton compile what they would launch, with the real argument specialisation, and launch nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from problems import Case
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton_cases import PRODUCTION_CASES

import ltxkern
from ltxkern import dispatch
from ltxkern import triton as tier

ARCHITECTURES = (80, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def compiled(case: Case, device: str, dtype: torch.dtype) -> Iterator[tuple[str, bytes]]:
    """(kernel name, cubin) of everything that a case would launch."""
    found: list[tuple[str, bytes]] = []
    stock = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__.strip("_"), kernel.asm["cubin"]))
        return kernel

    problem = case.make(device, dtype)
    JITFunction.run = compile_only
    try:
        with ltxkern.use_backend("triton"):
            problem.call(problem.outputs())
    finally:
        JITFunction.run = stock
    yield from found


def target(arch: int) -> None:
    """Triton compiles for this architecture from now on, and serves what no device holds."""
    triton.runtime.driver.set_active(NamedTarget(arch))
    dispatch.unavailable = lambda backend: None
    tier.refuse_elsewhere = lambda args: None


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
        target(arch)
        full = arch == FULL_ARCHITECTURE
        for name in PRODUCTION_CASES if full else CORE:
            cases, dtype = PRODUCTION_CASES[name]
            for kernel, cubin in (launch for case in cases for launch in compiled(case, "meta", dtype)):
                key = f"sm_{arch} {name} {kernel}"
                report[f"{key} 2" if key in report else key] = resources(cubin, full)
    Path(path).write_text(json.dumps(report, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
