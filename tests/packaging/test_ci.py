"""What CI must not skip: there, a tool that is missing is a failure."""

import importlib.util
import os

import pytest

NEEDED = ("triton", "diffusers", "transformers", "av", "pybind11", "hypothesis", "grimp")


@pytest.mark.skipif(not os.environ.get("CI"), reason="only CI promises these packages")
@pytest.mark.parametrize("package", NEEDED)
def test_ci_has_what_the_tests_need(package: str) -> None:
    assert importlib.util.find_spec(package) is not None, f"{package} is missing: tests would be skipped silently"


@pytest.mark.skipif(not os.environ.get("CI"), reason="only CI promises a compiled extension")
def test_ci_has_the_cpu_kernels() -> None:
    import ltxkern

    assert "cpu" in ltxkern.backends(), ltxkern.capabilities()["group_norm_silu"]["cpu"]
