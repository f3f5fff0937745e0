"""Batches: reading items, resuming, per-item errors, the command in one process, and Ray workers on a CPU."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ltxkern.commands.batch import item_arguments
from ltxkern.commands.batching.items import MANIFEST, Item, Manifest, Outcome, attempt, digest, pending, read_items
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
        ("[" * 100_000, "line 2 is not JSON that can be read: maximum recursion"),
        ('{"prompt": "b", "seed": ' + "9" * 5000 + "}", "line 2 is not JSON that can be read: Exceeds the limit"),
        ('{"prompt": "b", "num-frames": 9, "num_frames": 17}', "line 2 is not JSON that can be read: num_frames is there twice"),
        ("[1]", "line 2 must be an object"),
        ({"prompt": "b", "name": "../up"}, "line 2: name must be letters, digits, dots and dashes"),
        ({"prompt": "b", "name": 7}, "line 2: name must be letters"),
        ({"prompt": "b", "name": "00001"}, "line 2: the name '00001' is taken"),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@given(prompts=st.lists(st.text(), min_size=1, max_size=5), end=st.sampled_from(["\n", "\r\n"]))
@example(prompts=["first\u2028second", "one\u2029two", "a\u0085b", "\ufeff"], end="\n")
@settings(deadline=None)
def test_any_prompt_comes_back(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, prompts: list[str], end: str
) -> None:
    """A line ends at a newline only; marks at the start of the file, and of a file behind another, are no text."""
    path = tmp_path_factory.mktemp("items") / "p.jsonl"
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + end for prompt in prompts)
    path.write_bytes((text + "\ufeff" + text).encode(encoding))
    assert [item.options.get("prompt") for item in read_items(path)] == prompts * 2


def test_null_is_not_given(tmp_path: Path) -> None:
    line = {"prompt": "a", "name": None, "seed": None, "negative_prompt": None, "image": None, "colour": None}
    (item,) = read_items(write(tmp_path, line))
    assert (item.name, item.error) == ("00001", None)
    given = item_arguments(argparse.Namespace(seed=3, image=["kept.png"]), item.options)
    assert (given.seed, given.image, given.negative_prompt, given.prompt) == (3, ["kept.png"], None, "a")
    assert item_arguments(argparse.Namespace(image=["kept.png"]), {"image": [None]}).image == []


def test_a_line_knows_home_and_fractions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/at/home")
    options = {"image": ["~/a.png:8:0.5", "~/b.png"], "frame_rate": "30000/1001"}
    given = item_arguments(argparse.Namespace(image=[]), options)
    assert given.image == ["/at/home/a.png:8:0.5", "/at/home/b.png"]
    assert given.frame_rate == 30000 / 1001
    with pytest.raises(ValueError, match="such as 24000/1001, got 24:1"):
        item_arguments(argparse.Namespace(image=[]), {"frame_rate": "24:1"})


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
