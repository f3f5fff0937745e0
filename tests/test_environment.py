"""Facts about the machine: what is installed, what is not, and the processor."""

import importlib.metadata
import os

import pytest

from ltxkern.environment import PACKAGES, environment, package_versions


def test_versions_of_what_is_there_and_none_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "av":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = package_versions()
    assert tuple(found) == PACKAGES
    assert found["av"] is None
    assert found["numpy"] == real("numpy")


def test_the_machine() -> None:
    facts = environment()
    assert facts["cores"] == os.cpu_count()
    assert facts["processor"]
    assert "torch" in facts["backends"]
