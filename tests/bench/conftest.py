"""Makes the modules of bench/ importable, as its scripts see them, and those of this folder; roofs that need no measuring."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "bench"), str(HERE)]


@pytest.fixture(autouse=True)
def quick_roofs(monkeypatch):
    import timing

    monkeypatch.setattr(timing, "copy_roof", lambda device, settings: 1e9)
    monkeypatch.setattr(timing, "gemm_roof", lambda device, dtype, settings: 1e12)
