"""What a release's archives must hold: faults of an sdist or a wheel, in words, without installing it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomllib

SIZE_LIMIT = 8 << 20
HEADERS = "csrc/include/ltxkern"
SOURCES = "ltxkern/sources.py"
# What the extension may ask of the system: no torch, no CUDA library, no driver.
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|libgomp|ld-linux-x86-64)\.so")
BUILT = re.compile(r"\.(so|pyd|o|a|pyc|cubin)(\.|$)|__pycache__")


def project(tree: Path) -> dict[str, Any]:
    """The [project] table of a tree's pyproject.toml."""
    return tomllib.loads((tree / "pyproject.toml").read_text())["project"]


def platform_tag(kind: str, name: str, floor: str) -> str:
    """The tag that a wheel built by this interpreter has to carry: of manylinux that in its file name, where that is recent enough.

    Its extension asks for the glibc `floor`, but of a system that old it may ask too much: auditwheel looks at libstdc++ as well.
    """
    if kind == "pure":
        return "py3-none-any"
    version = sysconfig.get_config_var("py_version_nodot")
    machine = sysconfig.get_platform().removeprefix("linux-")
    least = tuple(map(int, floor.split("."))) if floor else (2, 5)
    found = re.search(rf"-manylinux_(\d+)_(\d+)_{machine}\.whl$", name)
    major, minor = max(least, (int(found[1]), int(found[2]))) if found else least
    return f"cp{version}-cp{version}-manylinux_{major}_{minor}_{machine}"


def sdist_faults(path: Path, tree: Path) -> list[str]:
    """What is wrong with a source archive of `tree`: files left out, files that were built, wrong metadata."""
    about = project(tree)
    prefix = f"{about['name']}-{about['version']}/"
    faults = [] if path.name == f"{prefix[:-1]}.tar.gz" else [f"is called {path.name}, not {prefix[:-1]}.tar.gz"]
    with tarfile.open(path) as archive:
        names = {member.name.removeprefix(prefix) for member in archive.getmembers() if member.isfile()}
        info = archive.extractfile(f"{prefix}PKG-INFO")
        text = info.read().decode() if info else ""
    wanted = {
        str(file.relative_to(tree))
        for room in ("ltxkern", "csrc")
        for file in (tree / room).rglob("*")
        if file.is_file()
    }
    wanted |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"}
    faults += [f"lacks {name}" for name in sorted(wanted - names) if not BUILT.search(name)]
    faults += [f"holds the built file {name}" for name in sorted(names) if BUILT.search(name)]
    return faults + metadata_faults(text, tree)


def metadata_faults(text: str, tree: Path, local: str = "") -> list[str]:
    """What of the metadata a package index would refuse, or differs from pyproject.toml and the README."""
    about, found = project(tree), message_from_string(text)
    readme = (tree / "README.md").read_text()
    expected = {
        "Name": about["name"],
        "Version": about["version"] + local,
        "Summary": about["description"],
        "License-Expression": about["license"],
        "Requires-Python": about["requires-python"],
        "Description-Content-Type": "text/markdown",
    }
    faults = [f"{key} is {found[key]!r}, not {value!r}" for key, value in expected.items() if found[key] != value]
    if found.get_payload().strip() != readme.strip():
        faults.append("the long description is not README.md")
    files = set(found.get_all("License-File", []))
    faults += [f"License-File does not name {name}" for name in about["license-files"] if name not in files]
    spaceless = {value.replace(" ", "") for value in found.get_all("Requires-Dist", [])}
    faults += [
        f"Requires-Dist lacks {name}" for name in about["dependencies"] if name.replace(" ", "") not in spaceless
    ]
    return faults


def wheel_faults(path: Path, kind: str, tree: Path, local: str = "") -> list[str]:
    """What is wrong with a wheel of `tree`; kind is pure, cpu or cuda, `local` what its version ends in."""
    about = project(tree)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    stem, tag = f"{about['name']}-{about['version']}{local}", platform_tag(kind, path.name, _floor_of(files))
    faults = [] if path.name == f"{stem}-{tag}.whl" else [f"is called {path.name}, not {stem}-{tag}.whl"]
    info = f"{stem}.dist-info"
    head = message_from_string(files.get(f"{info}/WHEEL", b"").decode())
    if head.get_all("Tag") != [tag]:
        faults.append(f"WHEEL says {head.get_all('Tag')}, not {tag}")
    if head["Root-Is-Purelib"] != ("true" if kind == "pure" else "false"):
        faults.append(f"Root-Is-Purelib is {head['Root-Is-Purelib']}")
    faults += metadata_faults(files.get(f"{info}/METADATA", b"").decode(), tree, local)
    faults += _record_faults(files, f"{info}/RECORD")
    for name in about["license-files"]:
        if files.get(f"{info}/licenses/{name}") != (tree / name).read_bytes():
            faults.append(f"lacks the licence {name}")
    if b"ltxkern = ltxkern.cli:main" not in files.get(f"{info}/entry_points.txt", b""):
        faults.append("does not declare the command ltxkern")
    for source in sorted(path for path in (tree / "ltxkern").rglob("*") if path.is_file()):
        name = str(source.relative_to(tree))
        if not BUILT.search(name) and files.get(name) != source.read_bytes():
            faults.append(f"lacks {name}, or has another")
    for header in sorted((tree / HEADERS).glob("*.cuh")):
        if files.get(f"ltxkern/csrc/ltxkern/{header.name}") != header.read_bytes():
            faults.append(f"lacks the header {header.name}, which NVRTC needs, or has another")
    if files.get("ltxkern/csrc/sources.sha256") != _output(sys.executable, str(tree / SOURCES)).encode():
        faults.append("lacks the digest of the sources, or has another")
    faults += [f"holds {name} besides the package" for name in files if not name.startswith(("ltxkern/", f"{info}/"))]
    return faults + _extension_faults(files, kind, tree)


def _record_faults(files: dict[str, bytes], record: str) -> list[str]:
    rows = {row[0]: row[1] for row in csv.reader(io.StringIO(files.get(record, b"").decode())) if row}
    faults = [f"RECORD does not list {name}" for name in sorted(set(files) - set(rows))]
    for name, digest in rows.items():
        if name == record:
            continue
        found = base64.urlsafe_b64encode(hashlib.sha256(files.get(name, b"")).digest()).rstrip(b"=").decode()
        if digest != f"sha256={found}":
            faults.append(f"RECORD has another hash for {name}")
    return faults


def _extension_faults(files: dict[str, bytes], kind: str, tree: Path) -> list[str]:
    built = sorted(name for name in files if BUILT.search(name))
    wanted = [] if kind == "pure" else [f"ltxkern/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    if built != wanted:
        return [f"holds the built files {built}, not {wanted}"]
    if not wanted:
        return []
    content = files[wanted[0]]
    faults = [f"_C has {len(content)} bytes, the limit is {SIZE_LIMIT}"] if len(content) >= SIZE_LIMIT else []
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(content)
        file.flush()
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", file.name))
        faults += [f"_C needs {name}" for name in needed if not SYSTEM_LIBRARIES.match(name)]
        if not needed:
            faults.append("readelf finds no libraries of _C")
        if kind == "cuda" and (tool := cuobjdump()) is not None:
            # It fails where there is no device code at all.
            listings = ([str(tool), f"--list-{form}", file.name] for form in ("elf", "ptx"))
            shown = "".join(subprocess.run(x, check=False, capture_output=True, text=True).stdout for x in listings)
            for number, form in re.findall(r"(\d+)-(real|virtual)", default_architectures(tree)):
                pattern = rf"sm_{number}\.{'cubin' if form == 'real' else 'ptx'}"
                if not re.search(pattern, shown):
                    faults.append(f"_C has no {form} code for {number}")
    return faults


def default_architectures(tree: Path) -> str:
    """The full architecture list of CMakeLists.txt, which a release is built for; an older nvcc knows a part of it."""
    found = re.search(r"set\(architectures ([\w -]*120-virtual)\)", (tree / "CMakeLists.txt").read_text())
    assert found is not None
    return found[1]


def cuobjdump() -> Path | None:
    """The one that Triton brings, or None."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() else None


def _floor_of(files: dict[str, bytes]) -> str:
    """The glibc that a wheel's extension asks for; "" where it has none."""
    for name, content in files.items():
        if name.endswith(".so"):
            with tempfile.NamedTemporaryFile(suffix=".so") as file:
                file.write(content)
                file.flush()
                return glibc_floor(Path(file.name))
    return ""


def glibc_floor(extension: Path) -> str:
    """The newest glibc version that the extension asks for, e.g. "2.34"."""
    found = re.findall(r"GLIBC_(\d+)\.(\d+)", _output("readelf", "-V", "-W", str(extension)))
    return "{}.{}".format(*max((int(major), int(minor)) for major, minor in found))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
