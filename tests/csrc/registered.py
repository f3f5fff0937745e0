"""What the text of csrc says of its kernels: the registered names, and the fields of the parameters that each takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KINDS = {"i64": "integer", "double": "double"}


class Field(NamedTuple):
    """One 8-byte field of a parameter struct; `kind` is pointer, integer or double."""

    name: str
    kind: str


class Kernel(NamedTuple):
    """Where a kernel is registered, and its function there without template arguments."""

    source: Path
    function: str


def _lines(path: Path) -> str:
    """The text without comments, continued lines joined."""
    return re.sub(r"//.*", "", path.read_text()).replace("\\\n", "")


def cuda_kernels() -> dict[str, Kernel]:
    """By name, all that csrc/cuda registers; a macro over types and vectors is written out."""
    found: dict[str, Kernel] = {}
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        text = _lines(source)
        for macro, first, second, body in re.findall(r"^#define (\w+)\((\w+), (\w+)\)(.*)", text, re.MULTILINE):
            for one, other in re.findall(rf"^{macro}\((.+), (.+)\)", text, re.MULTILINE):
                text += re.sub(rf"\b{second}\b", other, re.sub(rf"\b{first}\b", one, body))
        names = re.findall(r"LTXK_KERNEL\((.+?)\)", re.sub(r"^#define.*", "", text, flags=re.MULTILINE))
        found |= {name: Kernel(source, name.split("<")[0].removeprefix("ltxk::")) for name in names}
    return found


def cpu_kernels() -> dict[str, Kernel]:
    """By name, all that csrc/cpu registers."""
    return {
        name: Kernel(source, function)
        for source in sorted((CSRC / "cpu").glob("*.cpp"))
        for name, function in re.findall(r'^LTXK_CPU_KERNEL\("(.+)", (\w+).*\)', _lines(source), re.MULTILINE)
    }


def included(source: Path, seen: set[Path] | None = None) -> str:
    """A source's text behind that of all our own files that it includes."""
    seen = set() if seen is None else seen
    text = _lines(source)
    for name in re.findall(r'#include "(.+)"', text):
        path = next((folder / name for folder in (CSRC, CSRC / "include") if (folder / name).is_file()), None)
        if path is not None and path not in seen:
            seen.add(path)
            text = included(path, seen) + text
    return text


def parameter_struct(kernel: Kernel, text: str) -> str:
    """Name of the struct that a kernel takes."""
    by_value = rf"__global__ void .*\b{kernel.function}\((\w+) p\)"
    by_address = rf"void {kernel.function}\(const void\* parameters, int threads\) {{\s*const \w+& p = \*static_cast<const (\w+)\*>"
    (name,) = re.findall(by_value if kernel.source.suffix == ".cu" else by_address, text)
    return str(name)


def fields(text: str, struct: str, prefix: str = "") -> Iterator[Field]:
    """The fields of a struct as they lie in memory: those of its base first, structs and arrays within it by their own fields."""
    (opened,) = re.finditer(rf"\bstruct {struct}(?: : (\w+))? {{", text)
    if opened[1]:
        yield from fields(text, opened[1], prefix)
    end, depth = opened.end(), 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    body = text[opened.end() : end - 1]
    while "{" in body:
        body = re.sub(r"{[^{}]*}", ";", body)
    for statement in filter(None, map(str.strip, body.split(";"))):
        if "(" in statement:
            continue
        declared = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+(?:\[\w+\])?(?:, \w+(?:\[\w+\])?)*)", statement)
        assert declared is not None, f"{struct}: cannot read {statement!r}"
        for name, count in re.findall(r"(\w+)(?:\[(\w+)\])?", declared[3]):
            for place in [name] if not count else [f"{name}[{i}]" for i in range(_number(text, count))]:
                if declared[2]:
                    yield Field(prefix + place, "pointer")
                elif declared[1] in KINDS:
                    yield Field(prefix + place, KINDS[declared[1]])
                else:
                    yield from fields(text, declared[1], f"{prefix}{place}.")


def _number(text: str, name: str) -> int:
    """A literal, or the constant of that name."""
    return int(name) if name.isdigit() else int(re.findall(rf"constexpr int {name} = (\d+);", text)[0])


def parameters(kernel: Kernel) -> list[Field]:
    """The fields that a kernel reads its parameters from."""
    text = included(kernel.source)
    return list(fields(text, parameter_struct(kernel, text)))
