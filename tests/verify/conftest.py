"""Dispatch as a fresh process has it, with a user's cache of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ltxkern import dispatch
from ltxkern.trust import backends as trust
from ltxkern.trust import proofs
from ltxkern.trust.permitted import BACKENDS


@contextmanager
def fresh_dispatch(cache: Path) -> Iterator[None]:
    """No op has served and no proof has been read; the user's cache is this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LTXKERN_CACHE", str(cache))
        for cached in (proofs.stored, trust.probing):
            cached.cache_clear()
        for name, op in dispatch.registered().items():
            patch.setattr(op, "_trust", trust.Trust(name, op._backends, BACKENDS))
            for attribute, value in (("_present", {}), ("receipts", set()), ("captured", set())):
                patch.setattr(op, attribute, value)
            op._known.forget()
        yield
        for op in dispatch.registered().values():
            op._known.forget()
    for cached in (proofs.stored, trust.probing):
        cached.cache_clear()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Path]:
    """Dispatch as a fresh process has it; its cache folder."""
    with fresh_dispatch(tmp_path):
        yield tmp_path
