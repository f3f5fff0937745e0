"""Facts about the machine and the revision, so that no figure travels without them; the GPU's clocks beside a measurement."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernel_sources import digests
from ltxkern.trust.machine import processor, processor_fields

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
SECONDS_BETWEEN = 2.0


def run_quietly(command: list[str]) -> str:
    """Standard output of a command, empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def revision() -> str:
    """Short git revision; "-dirty" where the tracked sources differ from it (results and documents aside)."""
    name = run_quietly(["git", "rev-parse", "--short=10", "HEAD"])
    if not name:
        return "unknown"
    sources = ("ltxkern", "csrc", "bench/*.py")
    changed = run_quietly(["git", "status", "--porcelain", "--untracked-files=no", "--", *sources])
    return f"{name}-dirty" if changed else name


def cpu_name() -> str:
    """Model name of the host's processor."""
    fields = processor_fields()
    if "model name" in fields:
        return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
    return processor()


def best_device() -> torch.device:
    """The current GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_average() -> float:
    """One-minute load of the host."""
    return round(os.getloadavg()[0], 2)


def nvidia_smi_id(device: torch.device) -> str:
    """A GPU as nvidia-smi names it: its UUID, since CUDA_VISIBLE_DEVICES renumbers the others."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(device.index or 0) if uuid is None else f"GPU-{uuid}"


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last cache before memory: L2 of a GPU, the largest cache of a CPU."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20))
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def free_bytes(device: torch.device) -> int:
    """Memory that a benchmark may use on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available.group(1)) << 10 if available else 4 << 30


def without_folder(argument: str) -> str:
    """An argument as it may be published: of an absolute path only the name, for results files are committed."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if value.startswith("/") else argument


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Everything about the machine that a reader needs beside a figure."""
    import ltxkern
    from command_line import suites
    from ltxkern.environment import package_versions

    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "load_at_start": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_versions()["triton"],
        "ltxkern": ltxkern.__version__,
        "backends": ltxkern.backends(),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *map(without_folder, sys.argv[1:])]),
        "allocator": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default"),
        "llc_bytes": last_level_cache(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "gpu_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "sources": digests(suite.op for suite in suites()),
            "driver": run_quietly(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", nvidia_smi_id(device)]
            ),
        }
    return facts


def slug(facts: dict[str, Any]) -> str:
    """Name of a results file: machine and revision."""
    name = facts.get("gpu") or f"cpu {re.sub(r'[(].*', '', facts['cpu'])} {facts['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", f"{name}-{facts['revision']}".lower()).strip("-")


class ClockSampler:
    """Starts nvidia-smi now and then and collects what an earlier one printed; a reading can take a second and is not waited for.

    Args:
        gpu: as `nvidia-smi -i` takes it: a UUID, or an index of the machine (not of CUDA_VISIBLE_DEVICES).
        program: the command, for tests.
        clock: seconds, for tests.
    """

    def __init__(self, gpu: str, program: str = "nvidia-smi", clock: Callable[[], float] = time.monotonic) -> None:
        self._command = [program, f"--query-gpu={','.join(KEYS)}", "--format=csv,noheader,nounits", "-i", gpu]
        self._available = shutil.which(program) is not None
        self._clock = clock
        self._started = float("-inf")
        self._running: subprocess.Popen[str] | None = None

    def poll(self) -> dict[str, float]:
        """What a finished reading saw, empty without one; starts the next where the last began two seconds ago."""
        seen: dict[str, float] = {}
        if self._running is not None and self._running.poll() is not None:
            seen = parse_clocks(self._running.communicate()[0])
            self._running = None
        if self._available and self._running is None and self._clock() - self._started >= SECONDS_BETWEEN:
            self._started = self._clock()
            self._running = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        return seen

    def finish(self) -> dict[str, float]:
        """The last reading, waited for."""
        if self._running is None:
            return {}
        seen = parse_clocks(self._running.communicate()[0])
        self._running = None
        return seen


def parse_clocks(text: str) -> dict[str, float]:
    """The numbers of one line of nvidia-smi; a field it does not support ("[N/A]") is left out."""
    values = [part.strip() for part in text.splitlines()[0].split(",")] if text.strip() else []
    return {key: float(value) for key, value in zip(KEYS, values, strict=False) if re.fullmatch(r"[\d.]+", value)}
