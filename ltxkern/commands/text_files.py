"""Paths and text files as people write them: ~ for the home folder, byte order marks, UTF-16; and the YAML of --config."""

from __future__ import annotations

import argparse
import codecs
import difflib
import os
from pathlib import Path
from typing import Any

_MARKS = {  # the longer first: UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def path_text(text: str) -> str:
    """A path, or what begins with one, with ~ as the home folder."""
    return os.path.expanduser(text)


def home_in_paths(parser: argparse.ArgumentParser) -> None:
    """Give `path_text` to every option whose metavar names a file or folder."""
    for action in parser._actions:
        if action.type is None and str(action.metavar).startswith(("PATH", "FILE", "DIR", "FOLDER")):
            action.type = path_text


def read_text(path: str | Path, name: str) -> str:
    """The text of a file, without byte order mark.

    Args:
        path: ~ is the home folder.
        name: what errors call the file.

    Raises:
        ValueError: there is no such file, or a line of it is in another encoding than the file's mark says (UTF-8 without one).
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ValueError(f"{name}: there is no file {path}")
    content = file.read_bytes()
    encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        before, zero, _ = content.decode(encoding).partition("\0")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, errors="ignore")
        wrong = f"byte {error.object[error.start]:#04x} does not belong to {encoding.removesuffix('-sig').upper()}"
    else:
        if not zero:
            return before
        wrong = "a zero byte, as in UTF-16 without a byte order mark"
    raise ValueError(f"{name}: {path}, line {before.count(chr(10)) + 1}: {wrong}: save the file as UTF-8")


def read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Values of a YAML file as defaults of a command's options; dashes and underscores are alike, null is not given.

    Raises:
        ValueError: the file is missing, in another encoding, no mapping, names an unknown option, or has a value of the wrong type.
    """
    import yaml

    text = read_text(path, "config")
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"config {path}{where}: not valid YAML ({reason})") from error
    except (ValueError, RecursionError) as error:  # a date that is none, lists within lists without end
        raise ValueError(f"config {path}: not valid YAML ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected a mapping of options to values, got {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions or name in ("help", "config"):
            close = difflib.get_close_matches(name, actions, n=1)
            hint = f": did you mean {close[0].replace('_', '-')}?" if close else ""
            raise ValueError(f"config {path}: unknown option {key}{hint}")
        if name in values:
            raise ValueError(f"config {path}: {name} is there twice")
        if value is not None:
            values[name] = _config_value(actions[name], key, value, path)
    return values


def _config_value(action: argparse.Action, key: str, value: Any, path: str) -> Any:
    """A YAML value as the option takes it; numbers, texts and switches are not turned into one another."""
    if isinstance(action.default, list):
        items = value if isinstance(value, list) else [value]
        # argparse reads a default that is a text as it reads the command line, but not the texts of a list
        read = action.type if callable(action.type) else str
        return [read(_typed(str, key, item, path)) for item in items if item is not None]
    if isinstance(action, argparse._StoreTrueAction):
        return _typed(bool, key, value, path)
    if isinstance(value, list) and action.type is None:
        return ",".join(str(_typed(int, key, item, path)) for item in value)
    if action.type not in (None, int, float, path_text):
        return str(value)
    if action.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _typed(str if action.type in (None, path_text) else action.type, key, value, path)


def _typed(kind: Any, key: str, value: Any, path: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"config {path}: {key} must be {names[kind]}, got {value!r}")
    return value
