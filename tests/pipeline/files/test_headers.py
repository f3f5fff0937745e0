"""Headers of safetensors files: what is read of them, and files that are none or are cut off."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.checkpoint import CheckpointError, load_component, load_lora
from ltxkern.pipeline.files.headers import StoredTensor, listed, read_header


def test_broken_files(official: dict[str, Path], tmp_path: Path) -> None:
    whole = official["checkpoint"].read_bytes()
    cases = {
        "cut": (whole[: len(whole) // 2], r"truncated, expected \d+ bytes, got \d+"),
        "header": (whole[:1000], "cut off in its header"),
        "empty": (b"", "not a safetensors file"),
        "text": (b"this is a text file, not weights" * 9, "not a safetensors file"),
        "pointer": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "but a git-LFS pointer in place of the file",
        ),
        "page": (b"\n<!DOCTYPE html><html><body>sign in</body></html>" * 20, "but an HTML page in place of the file"),
        "gguf": (b"GGUF\3\0\0\0" + bytes(99), "but a GGUF file, which is not read here"),
        "pickle": (b"PK\3\4" + bytes(99), "but a zip archive"),
        "answer": (b"Invalid username or password.", "but a text that begins 'Invalid username or password.'"),
        "long": (whole + bytes(8), "8 bytes follow its last tensor"),
        "deep": ((200_000).to_bytes(8, "little") + b"[" * 200_000, "its header is not readable"),
        "json": ((16).to_bytes(8, "little") + b'["no", "object"]', "not a safetensors file"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_header(path)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_component(path, "vocoder")
        with pytest.raises(CheckpointError, match=message):
            load_lora(path)


def test_a_first_word_that_would_be_a_header_of_gigabytes(tmp_path: Path) -> None:
    """The mark and version of GGUF read as a length that a large file has; nothing of it may be read into memory."""
    path = tmp_path / "ltx-Q8_0.safetensors"
    with path.open("wb") as file:
        file.write(b"GGUF\3\0\0\0")
        file.truncate(20 * 2**30)
    with pytest.raises(CheckpointError, match="but a GGUF file, which is not read here"):
        read_header(path)


def described(*tensors: tuple[str, Any, list[Any], list[Any]]) -> str:
    """The header's text, in which a name may be there twice."""
    entries = (
        f"{json.dumps(name)}: {json.dumps({'dtype': dtype, 'shape': shape, 'data_offsets': offsets})}"
        for name, dtype, shape, offsets in tensors
    )
    return "{" + ", ".join(entries) + "}"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (described(("a", "F32", [3], [0, 8])), r"damaged, a \(3,\) in 8 bytes"),
        (described(("a", "F32", [2], [8, 0])), r"damaged, a \(2,\) in -8 bytes"),
        (described(("a", "F32", [2], [-8, 0]), ("b", "F32", [2], [0, 8])), r"damaged, a \(2,\) at bytes -8 to 0"),
        (described(("a", "F32", [-1, -2], [0, 8])), r"damaged, a \(-1, -2\) at bytes 0 to 8"),
        (described(("a", "F32", [2.0], [0, 8])), r"damaged, a \(2.0,\)"),
        (described(("a", True, [2], [0, 8])), "damaged, a of dtype True"),
        (described(("a", "BOOL", [True], [0, 1]), ("b", "U8", [7], [1, 8])), r"damaged, a \(True,\)"),
        (described(("a", "F32", [2], [0, 8]), ("b", "F16", [2], [4, 8])), "damaged, b overlaps .* by 4 bytes"),
        (described(("a", "F16", [2], [0, 4]), ("b", "F16", [1], [6, 8])), "damaged, b follows a hole of 2 bytes"),
        (described(("a", "F16", [2], [4, 8])), "damaged, a follows a hole of 4 bytes"),
        (described(("a", "F32", [2**61], [0, 8])), r"damaged, a \(2305843009213693952,\) in 8 bytes"),
        (described(("a", "F32", [0, 10**30], [0, 0]), ("b", "F32", [2], [0, 8])), "damaged, a"),
        (described(("a", "F32", [2**62] * 99, [0, 8])), r"damaged, a \(46116860"),
        (described(("a", "F4", [65], [0, 8])), r"damaged, a \(65,\) in 8 bytes"),
        (described(("a", "F32", [2**40], [0, 2**42])), r"truncated, expected 4398046511\d+ bytes"),
        (described(("a", "F32", [1], [0, 4]), ("a", "F32", [1], [4, 8])), "header is not readable: a is there twice"),
        ('{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', "dtype is there twice"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', "header is not readable"),
        ('{"__metadata__": {"a": 3}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "not readable"),
    ],
)
def test_a_header_that_is_not_of_its_bytes(tmp_path: Path, header: str, words: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(CheckpointError, match=words):
        read_header(path)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for name in ("first", "second one"):
        save_file({name: torch.zeros(1)}, path)
        assert list(read_header(path).tensors) == [name]


def test_what_a_header_says(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(4, dtype=torch.uint8)}
    save_file(tensors, path, {"config": '{"depth": 2}', "note": "not {json"})
    header = read_header(path)
    assert list(header.tensors) == ["a", "b"]
    assert header.tensors["b"] == StoredTensor(path, "b", "BF16", (2, 3))
    assert [tensor.nbytes for tensor in header.tensors.values()] == [4, 12]
    assert header.config == {"depth": 2}
    assert header.metadata["note"] == "not {json"


def test_long_lists_of_keys_are_cut() -> None:
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert listed(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"


def test_a_file_that_is_overwritten_at_once_is_read_again(tmp_path):
    path = tmp_path / "a.safetensors"
    for name in ("first", "other"):
        save_file({name: torch.zeros(2)}, path)
        os.utime(path, ns=(time.time_ns(), (now := time.time_ns()) - now % 1_000_000_000))
        assert list(read_header(path).tensors) == [name]
