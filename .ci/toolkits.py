"""The CUDA toolkits that a release is built with: one of CUDA 13, and of CUDA 12 for drivers older than 580."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# By major version, the least release: the first of its major that knows all architectures of CMakeLists.txt.
LEAST = {13: (13, 0), 12: (12, 8)}


class Toolkit(NamedTuple):
    """A compiler and its release."""

    nvcc: Path
    release: tuple[int, int]

    @property
    def tag(self) -> str:
        """The local version of its wheel: cu128."""
        return "cu{}{}".format(*self.release)


def _release_of(nvcc: Path) -> tuple[int, int] | None:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


def installed(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Every nvcc here: the one that a build takes by itself, then those of /usr/local/cuda-*."""
    named = environment.get("CUDACXX") or shutil.which("nvcc", path=environment.get("PATH"))
    return [*([Path(named)] if named else []), *sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"))]


def chosen(
    compilers: Iterable[Path], release_of: Callable[[Path], tuple[int, int] | None] = _release_of
) -> list[Toolkit]:
    """One toolkit a major version, newest major first; of several the first that is not too old."""
    found: dict[int, Toolkit] = {}
    for nvcc in compilers:
        release = release_of(nvcc)
        if release is not None and release[0] in LEAST and release >= LEAST[release[0]]:
            found.setdefault(release[0], Toolkit(nvcc, release))
    return [found[major] for major in LEAST if major in found]


def unbuilt(toolkits: Iterable[Toolkit]) -> list[str]:
    """What a release lacks for want of a toolkit, in words."""
    drivers = {13: "580 and newer", 12: "525 to 575"}
    have = {toolkit.release[0] for toolkit in toolkits}
    return [
        f"no wheel for CUDA {major} (drivers {drivers[major]}) was built: there is no nvcc {least}.{point} here"
        for major, (least, point) in LEAST.items()
        if major not in have
    ]
