"""The compiled tier's plumbing: instruction sets, raw addresses, refusals, and the package without the extension."""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ltxkern
from ltxkern import dispatch, sources
from ltxkern.compiled import extension
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled.steps import Argument, pack
from ltxkern.ops.group_norm_silu import Arguments
from tests.ops.contract import noise
from tests.processes import ROOT, python
from tests.serving import needs_cpu_kernels


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-c", script, status=None, **environment)


@needs_cpu_kernels
def test_an_unknown_instruction_set_is_named() -> None:
    done = run("import ltxkern; print(ltxkern.capabilities()['group_norm_silu']['cpu'])", LTXKERN_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "LTXKERN_CPU_ISA must be base, avx2 or avx512, got sse9" in done.stderr


@needs_cpu_kernels
def test_raw_addresses_give_the_same_bits() -> None:
    x, weight = noise(1, 6, 37), noise(6, seed=1)
    plain, raw = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    case = group_norm.describe(plain, Arguments(x, weight, weight, 3, 1e-5, None, None), limits=None)
    program = extension.module().CpuProgram(group_norm.ARGUMENTS)
    for call in group_norm.cpu_calls(case):
        program.add_call(call.kernel, *pack(call.parameters))
    program(plain, x, weight, weight, None, None, None)
    program.raw(1, [raw.data_ptr(), x.data_ptr(), weight.data_ptr(), weight.data_ptr(), 0, 0, 0])
    assert torch.equal(plain, raw)
    with pytest.raises(TypeError, match="takes 7 addresses"):
        program.raw(1, [0])


@needs_cpu_kernels
def test_meta_tensors_and_wrong_arguments_are_refused() -> None:
    program = extension.module().CpuProgram(1)
    with pytest.raises(KeyError, match="no CPU kernel"):
        program.add_call("no_such_kernel<f32>", b"", [])
    with pytest.raises(TypeError, match="takes 1 tensors"):
        program()
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)):
        program("not a tensor")


def test_parameters_are_eight_byte_fields() -> None:
    packed, relocations = pack({"x": Argument(2, 16), "y": None, "size": -3, "eps": 0.5})
    assert packed == bytes(16) + (-3).to_bytes(8, "little", signed=True) + bytes.fromhex("000000000000e03f")
    assert relocations == [(0, 2, 16)]


@pytest.fixture
def other_sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package has other sources than the extension was built from."""

    def ask_again() -> None:
        extension._extension_missing.cache_clear()
        dispatch.unavailable.cache_clear()

    for op in dispatch._registry.values():
        monkeypatch.setattr(op, "_present", {})
    monkeypatch.setattr(sources, "packaged", lambda: "0" * 64)
    ask_again()
    yield
    monkeypatch.undo()
    ask_again()


@needs_cpu_kernels
def test_an_extension_of_other_sources_is_refused_before_the_call(
    other_sources: None, caplog: pytest.LogCaptureFixture
) -> None:
    words = r"ltxkern\._C was built from other sources .*: rebuild it: .*pip install \. .*setup\.py build_ext --inplace"
    x = noise(1, 4, 3)
    with caplog.at_level(logging.WARNING, "ltxkern"):
        for row in ltxkern.capabilities().values():
            for tier in ("cpu", "cuda"):
                assert re.match(words, row[tier] or "") or "has no" in (row[tier] or "")
        torch.testing.assert_close(ltxkern.pixel_norm_silu(x), ltxkern.reference.pixel_norm_silu(x, 1e-8, None))
        with pytest.raises(ltxkern.BackendError, match=words), ltxkern.use_backend("cpu"):
            pass
        with pytest.raises(ltxkern.BackendError, match=words), ltxkern.use_backend("cpu", "cuda"):
            ltxkern.pixel_norm_silu(x)
    assert len(caplog.records) == 1
    assert re.match(words, caplog.messages[0])


@needs_cpu_kernels
def test_the_extension_knows_its_sources() -> None:
    assert extension.module().source_digest == sources.packaged() == sources.digest(ROOT / "csrc")


def test_the_digest_is_of_names_and_contents_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (first, second):
        shutil.copytree(ROOT / "csrc", folder)
    wanted = sources.digest(first)
    source = second / "include" / "ltxkern" / "rows.cuh"
    text = source.read_bytes()
    source.write_bytes(text.replace(b"\n", b"\r\n"))
    (second / "README.md").write_text("Kernels")
    os.utime(source, (0, 0))
    assert sources.digest(second) == wanted
    source.write_bytes(text + b"// A comment.\n")
    assert sources.digest(second) != wanted
    source.write_bytes(text)
    assert sources.digest(second) == wanted
    source.rename(source.with_name("row.cuh"))
    assert sources.digest(second) != wanted


def test_the_package_works_without_the_extension() -> None:
    script = (
        "import sys; sys.modules['ltxkern._C'] = None\n"
        "import torch, ltxkern\n"
        "y = ltxkern.group_norm_silu(torch.ones(1, 4, 3), None, None, 2)\n"
        "assert ltxkern.backends()[-1] == 'torch' and 'cpu' not in ltxkern.backends()\n"
        "print(ltxkern.capabilities()['group_norm_silu']['cpu'])"
    )
    done = run(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ltxkern._C" in done.stdout


def test_a_switched_off_backend_says_so() -> None:
    done = run(
        "import ltxkern; print(ltxkern.capabilities()['group_norm_silu']['cpu'])", LTXKERN_DISABLE="group_norm_silu:cpu"
    )
    assert "switched off" in done.stdout


ASKED = """
import os, torch, ltxkern
from ltxkern import dispatch
from ltxkern.compiled import driver
asked = []
driver.no_device = lambda: asked.append(1) or "no device, said the test"
x = torch.ones(3, 4)
def candidates():
    ltxkern.pixel_norm_silu(x)
    return dispatch.registered()["pixel_norm_silu"]._present[None]
"""


def test_calls_on_the_cpu_ask_no_device() -> None:
    """Until CUDA is in use; then what was found out before is forgotten, and so it is in a forked process."""
    script = ASKED + (
        "first = candidates(); assert not asked and not {'cuda', 'nvrtc', 'triton'} & set(first)\n"
        "assert dispatch.unavailable('triton') == 'no device, said the test'; assert asked\n"
        "driver.no_device = lambda: None\n"
        "assert dispatch.unavailable('triton')\n"
        "for call, _ in torch.cuda._queued_calls: call()\n"
        "assert dispatch.unavailable('triton') is None and 'triton' in candidates()\n"
        "driver.no_device = lambda: 'forked'\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if dispatch.unavailable('triton') == 'forked' and candidates() == first else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0 and 'triton' in candidates()\n"
    )
    done = run(script, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("entry", ["no_such_op:cpu", "gpu"])
def test_a_wrong_entry_of_what_is_switched_off_is_an_error(entry: str) -> None:
    done = run("import torch, ltxkern; ltxkern.pixel_norm_silu(torch.ones(1, 4, 3))", LTXKERN_DISABLE=f"torch,{entry}")
    assert done.returncode != 0
    assert f"LTXKERN_DISABLE={entry}: unknown" in done.stderr


@needs_cpu_kernels
def test_receipts_name_the_backend() -> None:
    with ltxkern.use_backend("cpu"):
        ltxkern.pixel_norm_silu(torch.ones(1, 4, 3))
    assert "cpu" in ltxkern.dispatch.served()["pixel_norm_silu"]
