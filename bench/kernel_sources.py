"""Which code an op's kernels are of: digests, so that a count or a measurement tells whether it is of the code at hand."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

_INCLUDED = re.compile(r'#include "(ltxkern/[\w.]+)"|from ltxkern\.triton\.(\w+) import')
_LAUNCHES = re.compile(r"from ltxkern\.compiled import (\w+) as launch")


def _files(tier: str, stem: str) -> list[Path]:
    """The kernels of a stem with what they include, and on CUDA the module of their launches."""
    from ltxkern.compiled import nvrtc

    package = Path(nvrtc.__file__).parents[1]
    headers = nvrtc.include_directory()
    if tier == "triton":
        open_ends, known = [package / "triton" / f"{stem}.py"], []
    else:
        open_ends = sorted((headers / "ltxkern").glob(f"{stem}*.cuh"))
        launches = _LAUNCHES.findall((package / "ops" / f"{stem}.py").read_text())
        known = [package / "compiled" / f"{module}.py" for module in launches]
    while open_ends:
        path = open_ends.pop()
        if path in known:
            continue
        known.append(path)
        for header, module in _INCLUDED.findall(path.read_text()):
            open_ends.append(headers / header if header else package / "triton" / f"{module}.py")
    return sorted(known)


@functools.cache
def digest(tier: str, stem: str) -> str:
    """Of the code of a stem on a tier, "cuda" or "triton"; comments and blank lines are none of it."""
    total = hashlib.sha256()
    for path in _files(tier, stem):
        code = re.sub(r"#.*" if path.suffix == ".py" else r"//.*", "", path.read_text())
        lines = [line.rstrip() for line in code.splitlines() if line.strip()]
        total.update("\n".join([path.name, *lines, ""]).encode())
    return total.hexdigest()[:16]


def digests(stems: Iterable[str]) -> dict[str, str]:
    """Of every stem on both tiers, by "cuda combine_guidance" and the like."""
    return {f"{tier} {stem}": digest(tier, stem) for stem in stems for tier in ("cuda", "triton")}
