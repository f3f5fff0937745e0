"""A record is whole or not there, and one that is not what was written is noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ltxkern.pipeline.work.record import DamagedRecordError, checksum, read_record, write_record


def tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    return {
        "half": base.bfloat16(),
        "part": base[1:3],
        "same part": base[1:3],
        "turned": base.T,
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "one": torch.tensor(7),
    }


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_record(path, tensors(), "run")
    found = read_record(path, "run")
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() % 64 == 0, name  # as a fresh one lies: matrix products round by it
    assert list(tmp_path.iterdir()) == [path]


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "run", "words"),
    [
        (lambda content: content[: len(content) // 2], "run", "cannot be read"),
        (lambda content: b"", "run", "cannot be read"),
        (flip, "run", "checksum"),
        (lambda content: content, "another", "of another run"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage: Callable[[bytes], bytes], run: str, words: str) -> None:
    path = tmp_path / "a.safetensors"
    write_record(path, tensors(), "run")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedRecordError, match=words):
        read_record(path, run)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "b.safetensors", run)


def test_a_full_disk_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_record(path, tensors(), "run")
    before = path.read_bytes()

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="the disk is full"):
        write_record(path, {"one": torch.ones(1)}, "run")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_checksum_is_of_names_shapes_dtypes_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).int()},
        {"a": torch.ones(2, 3)},
    ]
    assert len({checksum(one) for one in [base, *others]}) == 5
    assert checksum({"b": torch.ones(1), "a": torch.zeros(1)}) == checksum({"a": torch.zeros(1), "b": torch.ones(1)})
