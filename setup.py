"""Build of the extension module: setuptools calls CMake and Ninja; everything static is in pyproject.toml.

LTXKERN_BUILD=auto (default) builds what the machine can: CUDA and CPU kernels with nvcc, CPU kernels with a C++ compiler, a pure
Python package with neither. cuda and cpu insist; none builds nothing. TORCH_CUDA_ARCH_LIST chooses the CUDA architectures.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cuda", "cpu", "none")
NAMED_ARCHITECTURES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0+PTX",
    "Blackwell+Tegra": "10.0;10.3;11.0;12.0+PTX",
}


def build_mode() -> str:
    mode = os.environ.get("LTXKERN_BUILD", "auto").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(f"LTXKERN_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def cuda_architectures(text: str) -> str | None:
    """CMake's architecture list from TORCH_CUDA_ARCH_LIST, or None where it is empty ("All" and "Common" mean our own list).

    Entries are separated by ";", "," or spaces: "9.0", "9.0a", "9.0+PTX" or the name of a generation ("Hopper").
    """
    for name, numbers in sorted(NAMED_ARCHITECTURES.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"(?i)\b{re.escape(name)}\b(?!\+Tegra)", numbers, text)
    entries = [entry for entry in re.split(r"[;,\s]+", text.strip()) if entry]
    if not entries or [entry.lower() for entry in entries] in (["all"], ["common"]):
        return None
    result: list[str] = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)*", entry, flags=re.IGNORECASE)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: cannot read {entry!r}; expected e.g. '9.0', '8.0;9.0+PTX' or one of "
                f"{', '.join(NAMED_ARCHITECTURES)}"
            )
        number = match[1] + match[2] + match[3].lower()
        if int(match[1]) < 8:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {entry} is too old; ltxkern's CUDA kernels need 8.0 or newer")
        for kind in ["real", "virtual"] if match[4] else ["real"]:
            if f"{number}-{kind}" not in result:
                result.append(f"{number}-{kind}")
    return ";".join(result)


def has_compiler() -> bool:
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in ([named[0]] if named else ["c++", "g++", "clang++"]))


class BuildPy(build_py):
    """Ships beside the package the headers, which the NVRTC tier compiles on the user's machine, and the digest of all sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "ltxkern" / "csrc" / "ltxkern"
        target.mkdir(parents=True, exist_ok=True)
        for header in sorted((ROOT / "csrc" / "include" / "ltxkern").glob("*.cuh")):
            shutil.copy2(header, target / header.name)
        digest = subprocess.check_output([sys.executable, str(ROOT / "ltxkern" / "sources.py")])
        (target.parent / "sources.sha256").write_bytes(digest)


class BuildExt(build_ext):
    """Configures and builds with CMake; in mode auto a failure of CUDA leads to CPU kernels, of C++ to pure Python."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        mode = build_mode()
        attempts = {"auto": ["AUTO", "OFF"], "cuda": ["ON"], "cpu": ["OFF"]}[mode]
        for attempt in attempts:
            try:
                self._cmake(target, attempt)
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                if mode != "auto":
                    raise
                self.warn(f"building ltxkern._C with LTXKERN_CUDA={attempt} failed: {error}")
            else:
                return
        self.warn("ltxkern._C could not be built: the package works in pure Python (LTXKERN_BUILD=cpu shows the error)")

    def _cmake(self, target: Path, cuda: str) -> None:
        import pybind11

        build = Path(
            os.environ.get(
                "LTXKERN_BUILD_DIR", ROOT / "build" / f"native-{sys.implementation.cache_tag}-{cuda.lower()}"
            )
        )
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLTXKERN_CUDA={cuda}",
            # Looked for anew: that of an isolated build went with its environment.
            "-UCMAKE_MAKE_PROGRAM",
        ]
        architectures = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        configure.append(
            f"-DLTXKERN_CUDA_ARCHITECTURES={architectures}" if architectures else "-ULTXKERN_CUDA_ARCHITECTURES"
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        built = next(build.glob("_C*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced in one step: a process that has the old file open keeps it.
        partial = target.with_suffix(".partial")
        shutil.copy2(built, partial)
        subprocess.run(["strip", "--strip-unneeded", str(partial)], check=False)
        partial.replace(target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {built: source for built, source in super().get_output_mapping().items() if Path(built).exists()}


def extensions() -> list[Extension]:
    mode = build_mode()
    if mode == "none" or (mode == "auto" and not has_compiler()):
        return []
    return [Extension("ltxkern._C", sources=[])]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
