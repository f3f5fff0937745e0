"""Building: architecture lists in every syntax, the build modes, and a wheel without CUDA and one without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from ltxkern import sources
from tests.processes import ROOT, not_optimised, python


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = spec_from_file_location("ltxkern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("9.0", "90-real"),
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual"),
        ("8.0 9.0", "80-real;90-real"),
        ("8.0,12.0", "80-real;120-real"),
        ("9.0a", "90a-real"),
        ("10.0f+PTX", "100f-real;100f-virtual"),
        ("Hopper", "90-real;90-virtual"),
        ("Ampere;Hopper", "80-real;86-real;86-virtual;90-real;90-virtual"),
        ("hopper 9.0", "90-real;90-virtual"),
        ("", None),
        ("All", None),
        ("Common", None),
    ],
)
def test_architecture_lists(setup_script: ModuleType, text: str, wanted: str | None) -> None:
    assert setup_script.cuda_architectures(text) == wanted


@pytest.mark.parametrize("text", ["90", "sm_90", "Pascal", "9.0+SASS"])
def test_an_unreadable_list_is_named(setup_script: ModuleType, text: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: cannot read"):
        setup_script.cuda_architectures(text)


def test_old_architectures_are_refused(setup_script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="too old"):
        setup_script.cuda_architectures("7.5")


def test_modes(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTXKERN_BUILD", "none")
    assert setup_script.extensions() == []
    monkeypatch.setenv("LTXKERN_BUILD", "auto")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setup_script.extensions() == []
    monkeypatch.setenv("LTXKERN_BUILD", "cpu")
    assert [extension.name for extension in setup_script.extensions()] == ["ltxkern._C"]
    monkeypatch.setenv("LTXKERN_BUILD", "fast")
    with pytest.raises(SystemExit, match="must be one of auto, cuda, cpu, none"):
        setup_script.extensions()


def build(folder: Path, *arguments: str, **environment: str) -> None:
    """This interpreter on a build, with its own tools first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python(*arguments, folder=folder, PATH=path, MAX_JOBS="2", **environment)


def wheel(tmp_path: Path, **environment: str) -> Path:
    """A wheel from an sdist of this tree, which is unpacked in `source`: nothing is left behind in the tree."""
    tree, source = tmp_path / "tree", tmp_path / "source"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for room in ("ltxkern", "csrc"):
        shutil.copytree(ROOT / room, tree / room, ignore=ignored)
    build(tree, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    next(tmp_path.glob("ltxkern-*/")).rename(source)
    options = ("-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path))
    build(tmp_path, "-m", "pip", "wheel", *options, str(source), **environment)
    return next(tmp_path.glob("*.whl"))


def backend_reason(place: Path, tier: str) -> str:
    """What the package under `place` says of a compiled tier, in a process that sees nothing else of this tree."""
    # An editable installation of this tree would lend its extension to the wheel.
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')];"
        "import torch, ltxkern; from ltxkern.dispatch import unavailable;"
        "ltxkern.group_norm_silu(torch.ones(1, 4, 3), None, None, 2);"
        f"assert {str(place)!r} in ltxkern.__file__; print(unavailable({tier!r}))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LTXKERN_")}
    environment |= {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    return subprocess.check_output([sys.executable, "-c", script], env=environment, cwd=place, text=True).strip()


def installed(built: Path) -> Path:
    """A folder with a wheel's files."""
    place = built.with_name("installed")
    zipfile.ZipFile(built).extractall(place)
    return place


@pytest.mark.slow
def test_pure_python_wheel(tmp_path: Path) -> None:
    built = wheel(tmp_path, LTXKERN_BUILD="none")
    assert built.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(built).namelist()
    assert "ltxkern/csrc/ltxkern/platform.cuh" in names
    assert not [name for name in names if name.endswith(".so")]
    assert "not built" in backend_reason(installed(built), "cpu")


@pytest.mark.slow
def test_cpu_wheel(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    # What an isolated build leaves behind: its ninja is gone with its environment.
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "CMakeCache.txt").write_text("CMAKE_MAKE_PROGRAM:FILEPATH=/gone/bin/ninja\n")
    # Not optimised, which `make setup` is: nothing is computed with it.
    building = {"LTXKERN_BUILD": "cpu", "LTXKERN_BUILD_DIR": str(folder), **not_optimised(tmp_path)}
    built = wheel(tmp_path, **building)
    names = zipfile.ZipFile(built).namelist()
    assert [name for name in names if name.startswith("ltxkern/_C") and name.endswith(".so")]
    assert "ltxkern/csrc/ltxkern/group_norm_silu.cuh" in names
    place, source = installed(built), tmp_path / "source"
    record = place / "ltxkern" / "csrc" / "sources.sha256"
    digest = sources.digest(source / "csrc")
    assert record.read_text() == digest == sources.digest(ROOT / "csrc")
    assert backend_reason(place, "cpu") == "None"
    record.write_text("0" * 64)
    assert "built from other sources" in backend_reason(place, "cpu")
    # The unpacked sdist as a checkout: a comment in a header is enough for an extension that is no longer its own.
    rebuild = partial(build, source, "setup.py", "-q", "build_ext", "--inplace", **building)
    rebuild()
    assert backend_reason(source, "cpu") == "None"
    with (source / "csrc" / "include" / "ltxkern" / "rows_parameters.cuh").open("a") as header:
        header.write("// One more comment.\n")
    assert "built from other sources" in backend_reason(source, "cpu")
    rebuild()
    assert backend_reason(source, "cpu") == "None"
