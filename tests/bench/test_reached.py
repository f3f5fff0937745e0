"""The kernels of the production calls are asked by the probe at first use and by `ltxkern verify --quick`: a wrong one is found."""

from collections.abc import Iterable

import budget
import pytest
import torch

from ltxkern import dispatch
from ltxkern.compiled.steps import Launch, Step
from ltxkern.verify import checks, probe
from ltxkern.verify.cases import MAIN, OpCase, Size
from tests.csrc.on_shim import on_shim


def production() -> set[str]:
    """The kernels of the budget, on the architecture of most of its targets."""
    return {row.kernel for row in budget.read().rows["sm_90"] if row.tier == "cuda"}


def reached(calls: Iterable[tuple[OpCase, torch.dtype, Size]], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that calls launch; none runs."""
    monkeypatch.setenv("LTXKERN_SELFCHECK", "off")
    found: set[str] = set()

    def note(steps: list[Step], _: object) -> None:
        found.update(step.kernel for step in steps if isinstance(step, Launch))

    with on_shim(run=note, small_chunks=False), dispatch.use_backend("cpu"):
        for case, dtype, size in {
            (str(case), dtype, size): (case, dtype, size) for case, dtype, size in calls
        }.values():
            case.run(case.tensors(dtype, size))
    return found


def test_the_probe_asks_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = (call for main in MAIN for dtype in main.dtypes for call in probe.probes_of(main.op, "cuda", dtype, True))
    assert production() - reached(calls, monkeypatch) == set()


@pytest.mark.parametrize("level", ["quick", "full"])
def test_verify_asks_every_kernel(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a quick run those of fp16 in its main cases alone."""
    large = (checks.CHUNKS, checks.BLOCKS, probe.WALK)
    plan = [each for each in checks.plan(level) if each.values == "normal" and each.size not in large]
    found = reached(((each.case, each.dtype, each.size) for each in plan), monkeypatch)
    assert {
        kernel for kernel in production() - found if level == "full" or "f16" not in kernel.replace("bf16", "")
    } == set()


@pytest.mark.parametrize(("backend", "on_card"), [("triton", True), ("cpu", False)])
def test_others_are_asked_small_sizes(backend: str, on_card: bool) -> None:
    """Each kind of call is another compilation of Triton's, and none of the CPU's: a process begins sooner without them."""
    (rotated, merged) = (
        {size for *_, size in probe.probes_of(op, backend, torch.bfloat16, on_card)}
        for op in ("qk_norm_rope", "merge_lora_")
    )
    assert rotated == set(probe.SIZES)
    assert merged == {*probe.SIZES, *((probe.WALK,) if on_card else ())}
