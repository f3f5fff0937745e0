"""Batches: reading items, resuming, per-item errors, the command in one process, and Ray workers on a CPU."""

from pathlib import Path
from typing import Any

import pytest

from ltxkern.commands.batch_items import MANIFEST, Item, Manifest, Outcome, attempt, digest, pending, read_items
from tests.commands.typed import write


def test_items_are_lines(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a"}, "", {"prompt": "b", "name": "kite.2", "num-frames": 9})
    first, second = read_items(path)
    assert (first.name, first.line, first.options, first.error) == ("00001", 1, {"prompt": "a"}, None)
    assert (second.name, second.line, second.options) == ("kite.2", 3, {"prompt": "b", "num_frames": 9})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{prompt}", "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ({"prompt": "b", "name": "../up"}, "line 2: name must be letters, digits, dots and dashes"),
        ({"prompt": "b", "name": 7}, "line 2: name must be letters"),
        ({"prompt": "b", "name": "00001"}, "line 2: the name '00001' is taken"),
    ],
)
def test_a_bad_line_spoils_no_other(tmp_path: Path, line: Any, words: str) -> None:
    first, second = read_items(write(tmp_path, {"prompt": "a"}, line))
    assert first.error is None
    assert second.error is not None
    assert words in second.error


def test_files_without_items(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        read_items(write(tmp_path, "", " "))


def done(item: Item, folder: Path, content: str = "result") -> Outcome:
    output = folder / f"{item.name}.mp4"
    output.write_text(content)
    return Outcome(item.name, "done", digest(item, {}), output.name, len(content), 1.0)


def test_what_is_done_does_not_run_again(tmp_path: Path) -> None:
    items = [Item(name, 1, {"prompt": name}) for name in ("a", "b", "c", "d", "e")]
    manifest = Manifest(tmp_path)
    for item in items[:4]:
        manifest.add(done(item, tmp_path))
    manifest.add(Outcome("b", "failed", digest(items[1], {}), error="later"))
    (tmp_path / "c.mp4").write_text("trunc")
    (tmp_path / "d.mp4").unlink()
    assert [item.name for item in pending(items, Manifest(tmp_path), {})] == ["b", "c", "d", "e"]
    changed = [Item("a", 1, {"prompt": "other"})]
    assert list(pending(changed, Manifest(tmp_path), {})) == changed
    assert list(pending(items[:1], Manifest(tmp_path), {"steps": 3})) == items[:1]


def test_a_manifest_that_was_cut_off(tmp_path: Path) -> None:
    items = [Item(name, 1, {}) for name in ("a", "b", "c")]
    for item in items[:2]:
        Manifest(tmp_path).add(done(item, tmp_path))
    path = tmp_path / MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    manifest = Manifest(tmp_path)
    assert [item.name for item in pending(items, manifest, {})] == ["b", "c"]
    manifest.add(done(items[2], tmp_path))
    assert [item.name for item in pending(items, Manifest(tmp_path), {})] == ["b"]


def test_errors_of_an_item_are_its_outcome(tmp_path: Path) -> None:
    def fails(item: Item) -> Path:
        raise ValueError("no such picture")

    item = Item("a", 1, {})
    outcome = attempt(item, "d", fails, (ValueError,))
    assert (outcome.status, outcome.error) == ("failed", "ValueError: no such picture")
    with pytest.raises(ValueError, match="no such picture"):
        attempt(item, "d", fails, (OSError,))
    spoilt = attempt(Item("a", 1, {}, "line 1 is not JSON"), "d", fails, ())
    assert (spoilt.status, spoilt.error) == ("failed", "line 1 is not JSON")
