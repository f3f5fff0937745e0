"""Dispatch as a fresh process has it, with a user's cache of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ltxkern import dispatch, proofs, trust


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The cache folder; no op has served, and no proof has been read."""
    monkeypatch.setenv("LTXKERN_CACHE", str(tmp_path))
    caches = (proofs.stored, trust.probing)
    for cached in caches:
        cached.cache_clear()
    for name, op in dispatch.registered().items():
        monkeypatch.setattr(op, "_trust", trust.Trust(name, op._backends, dispatch.BACKENDS))
        for attribute, value in (("_present", {}), ("receipts", set()), ("captured", set())):
            monkeypatch.setattr(op, attribute, value)
    yield tmp_path
    for cached in caches:
        cached.cache_clear()
