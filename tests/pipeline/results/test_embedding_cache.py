"""Prompt embeddings on disk: found by content, whole or not at all, and made again where they are damaged."""

import logging
import os
from pathlib import Path

import pytest
import torch

from ltxkern.pipeline.model.text import PromptEmbeddings
from ltxkern.pipeline.results.embedding_cache import EmbeddingCache, default_folder, model_revision


def embedding(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return PromptEmbeddings(
        torch.randn(1, 5, 8, generator=generator).to(dtype), torch.randn(1, 5, 3, generator=generator).to(dtype)
    )


class Encoder:
    """Counts what it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts):
        self.calls.append(prompts)
        return [embedding(len(prompt)) for prompt in prompts]


def cache(folder, **changes):
    return EmbeddingCache(folder, **{"model": "gemma", "revision": "1", **changes})


def is_fresh(one):
    """Whether it lies as what was just encoded does: matrix products round by it."""
    return all(part.data_ptr() % 64 == 0 for part in (one.video, one.audio))


def equal(one, other):
    return torch.equal(one.video, other.video) and torch.equal(one.audio, other.audio)


def test_only_what_is_missing_is_encoded_once_and_in_order(tmp_path):
    encode = Encoder()
    first = cache(tmp_path).get(["a", "bb", "a"], encode)
    assert encode.calls == [["a", "bb"]]
    assert equal(first[0], embedding(1))
    assert equal(first[1], embedding(2))
    assert first[2] is first[0]
    second = cache(tmp_path).get(["bb", "ccc", "a"], encode)
    assert encode.calls == [["a", "bb"], ["ccc"]]
    assert [equal(found, embedding(size)) for found, size in zip(second, (2, 3, 1), strict=True)] == [True] * 3
    assert second[0].video.dtype == torch.bfloat16
    assert all(is_fresh(one) for one in (*first, *second))
    assert cache(tmp_path).get([], encode) == []


@pytest.mark.parametrize("changes", [{"model": "other"}, {"revision": "2"}, {"dtype": torch.float32}])
def test_model_revision_and_dtype_tell_entries_apart(tmp_path, changes):
    cache(tmp_path).store("a", embedding(1))
    assert cache(tmp_path).load("a") is not None
    assert cache(tmp_path, **changes).load("a") is None


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "no digest", "text"])
def test_a_damaged_entry_is_made_again(tmp_path, damage, caplog):
    store = cache(tmp_path)
    store.store("a", embedding(1))
    path = store.path("a")
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content = bytearray()
    elif damage == "cut":
        content = content[:-3]
    elif damage == "flipped":
        content[-1] ^= 64
    elif damage == "no digest":
        content = content.replace(b"digest", b"tsegid")
    else:
        content = bytearray(b"not a tensor file at all")
    path.write_bytes(bytes(content))
    encode = Encoder()
    with caplog.at_level(logging.WARNING):
        found = store.get(["a"], encode)
    assert encode.calls == [["a"]]
    assert equal(found[0], embedding(1))
    assert "made again" in caplog.text
    assert equal(store.load("a"), embedding(1))


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, content):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).store("a", embedding(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_costs_the_entry_only(tmp_path, caplog):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert equal(cache(folder).get(["a"], Encoder())[0], embedding(1))
    assert "not kept" in caplog.text


def test_a_folder_that_is_a_file_costs_the_entry_only(tmp_path, caplog):
    folder = tmp_path / "file"
    folder.write_text("")
    with caplog.at_level(logging.WARNING):
        assert equal(cache(folder).get(["a"], Encoder())[0], embedding(1))
    assert "not kept" in caplog.text


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LTXKERN_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "embeddings"
    monkeypatch.delenv("LTXKERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "ltxkern" / "embeddings"


def test_a_revision_changes_with_the_files(tmp_path):
    (tmp_path / "a").write_text("x")
    before = model_revision(tmp_path)
    assert model_revision(tmp_path) == before
    os.utime(tmp_path / "a", ns=(0, 1))
    changed = model_revision(tmp_path)
    assert changed != before
    (tmp_path / "b").write_text("y")
    assert model_revision(tmp_path) != changed
