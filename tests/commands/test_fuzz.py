"""Two thousand broken inputs to every reader: taken or refused in words, within the memory and the time that are stated."""

from pathlib import Path

import pytest

from tools.fuzz import FuzzError, feed, fuzz
from tools.fuzz_targets import Target, targets

INPUTS = 250


def test_every_reader(tmp_path: Path) -> None:
    counted = {target.name: fuzz(target, INPUTS, seed=2) for target in targets(tmp_path)}
    assert len(counted) >= 8
    assert sum(found.inputs for found in counted.values()) >= 2000
    assert all(found.taken < found.inputs for found in counted.values()), counted


def broken(data: bytes) -> None:
    if data == b"loop":
        while True:
            pass
    if data == b"large":
        bytearray(2**40)
    raise KeyError(data)


@pytest.mark.parametrize(
    ("data", "words"), [(b"loop", "more than 0.1 s"), (b"large", "MemoryError"), (b"x", "KeyError: b'x'")]
)
def test_what_no_input_may_do_is_told(monkeypatch: pytest.MonkeyPatch, data: bytes, words: str) -> None:
    from hypothesis import strategies as st

    monkeypatch.setattr("tools.fuzz.SECONDS", 0.1)
    target = Target("broken", st.just(data), (data,), broken, mutations=0)
    with pytest.raises(FuzzError, match=words):
        fuzz(target, 1, seed=1)
    assert feed(Target("whole", st.just(data), (data,), bytes), data)
