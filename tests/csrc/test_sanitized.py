"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer: tests of the shim again, in one subprocess."""

import subprocess

import pytest

from tests.csrc.shim_build import build
from tests.processes import python

# Every case and every kernel of the norms; of the op tests odd sizes, views and in-place calls, in one block size, as fibers decide
# the order.
CASES = (
    "test_kernels_on_shim and (every_case or (group_norm or pixel_norm) and not own_input and (float32 or bfloat16))"
    " or test_ops_on_shim and not norm_silu and (32threads and (bfloat16 or layouts or out or float8 or statistics or modalities)"
    " or 96threads and merge_lora and bfloat16)"
    " or test_merge_lora_tensor_cores and (sizes or bytes or behind or layouts or walk)"
    " or test_switch_lora and bits and bfloat16 and 1.0-2.0 or pixel_norm_into_frames"
)
FILES = [
    f"tests/csrc/{name}.py"
    for name in ("test_kernels_on_shim", "test_ops_on_shim", "test_merge_lora_tensor_cores", "test_switch_lora")
]
SCRIPT = """
import sys
from pathlib import Path
import pytest
from tests.csrc import shim_build
module = shim_build.load(Path(sys.argv[1]))
shim_build.shim = lambda: module
sys.exit(pytest.main([*sys.argv[3:], "-q", "-x", "-p", "no:cacheprovider", "-k", sys.argv[2]]))
"""


def preload() -> str:
    """The sanitizer's runtime and the C++ one, which must come first in an interpreter that was not built with them."""
    names = ("libasan.so", "libstdc++.so")
    return " ".join(subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names)


@pytest.mark.slow
def test_no_access_outside_and_no_undefined_behaviour() -> None:
    module = build(sanitize=True)
    options = {
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    assert " passed" in python("-c", SCRIPT, module, CASES, *FILES, **options).stdout
