"""A digest of the C++ and CUDA sources: the build compiles it into the extension, which serves only a package of the same sources.

The build runs this file alone, before there is torch: `python ltxkern/sources.py` writes the digest of the checkout.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
TREE = PACKAGE.parent / "csrc"
# What a wheel, which has not all of the sources, brings instead: the digest of those that it was built from.
RECORD = PACKAGE / "csrc" / "sources.sha256"
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")


def digest(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """SHA-256 over names and contents of a folder's sources; place, dates and line endings of a checkout do not count."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in suffixes}
    total = hashlib.sha256()
    for name, path in sorted(paths.items()):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def packaged() -> str:
    """The digest of this package's sources."""
    return RECORD.read_text().strip() if RECORD.is_file() else digest(TREE)


@functools.cache
def build() -> str:
    """One digest of all that decides what a kernel gives: the C++ and CUDA sources, the ops, their launches, Triton's kernels."""
    parts = [packaged(), *(digest(PACKAGE / room, (".py",)) for room in ("ops", "compiled", "triton"))]
    parts.append(hashlib.sha256((PACKAGE / "layout.py").read_bytes()).hexdigest())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


if __name__ == "__main__":
    sys.stdout.write(digest(TREE))
