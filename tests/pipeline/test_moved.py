"""Module names of the version before: each leads to the module of today, and says so."""

import importlib
import importlib.util
import sys

import pytest

from ltxkern.pipeline.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_module_of_today(old: str, new: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=new):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == new == module.__spec__.name


def test_a_name_that_never_was_is_not_found() -> None:
    assert importlib.util.find_spec("ltxkern.pipeline.devise") is None
