"""Building: architecture lists in every syntax, the build modes, and a wheel without CUDA and one without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


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


def wheel(tmp_path: Path, **environment: str) -> Path:
    """A wheel of this tree, built in a copy so that nothing is left behind."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "ltxkern", source / "ltxkern", ignore=ignored)
    shutil.copytree(ROOT / "csrc", source / "csrc", ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        env=os.environ | {"PATH": path, "MAX_JOBS": "2"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(tmp_path.glob("*.whl"))


def backend_reason(built: Path, tmp_path: Path, tier: str) -> str:
    """What an installed wheel says of a compiled tier, in a process that sees nothing else of this tree."""
    installed = tmp_path / "installed"
    zipfile.ZipFile(built).extractall(installed)
    # An editable installation of this tree would lend its extension to the wheel.
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')];"
        "import torch, ltxkern; from ltxkern.dispatch import unavailable;"
        "ltxkern.group_norm_silu(torch.ones(1, 4, 3), None, None, 2);"
        f"assert {str(installed)!r} in ltxkern.__file__; print(unavailable({tier!r}))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LTXKERN_")}
    environment |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.check_output([sys.executable, "-c", script], env=environment, cwd=tmp_path, text=True).strip()


@pytest.mark.slow
def test_pure_python_wheel(tmp_path: Path) -> None:
    built = wheel(tmp_path, LTXKERN_BUILD="none")
    assert built.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(built).namelist()
    assert "ltxkern/csrc/ltxkern/platform.cuh" in names
    assert not [name for name in names if name.endswith(".so")]
    assert "not built" in backend_reason(built, tmp_path, "cpu")


@pytest.mark.slow
def test_cpu_wheel(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    # What an isolated build leaves behind: its ninja is gone with its environment.
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "CMakeCache.txt").write_text("CMAKE_MAKE_PROGRAM:FILEPATH=/gone/bin/ninja\n")
    built = wheel(tmp_path, LTXKERN_BUILD="cpu", LTXKERN_BUILD_DIR=str(folder))
    names = zipfile.ZipFile(built).namelist()
    assert [name for name in names if name.startswith("ltxkern/_C") and name.endswith(".so")]
    assert "ltxkern/csrc/ltxkern/group_norm_silu.cuh" in names
    assert backend_reason(built, tmp_path, "cpu") == "None"
