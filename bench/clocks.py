"""Clocks, temperature and power of the GPU, read beside a measurement without holding it up."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable

KEYS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
SECONDS_BETWEEN = 2.0


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
            seen = parse(self._running.communicate()[0])
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
        seen = parse(self._running.communicate()[0])
        self._running = None
        return seen


def parse(text: str) -> dict[str, float]:
    """The numbers of one line of nvidia-smi; a field it does not support ("[N/A]") is left out."""
    values = [part.strip() for part in text.splitlines()[0].split(",")] if text.strip() else []
    return {key: float(value) for key, value in zip(KEYS, values, strict=False) if re.fullmatch(r"[\d.]+", value)}
