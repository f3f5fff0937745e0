"""Each op's list of kernels, and what happens with an extension that was built before one of them was written."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

import ltxkern
from ltxkern import dispatch, inventory
from ltxkern.compiled import (
    combine_guidance,
    dual_add,
    extension,
    group_norm_silu,
    merge_lora,
    normalize_noise,
    pixel_norm_silu,
    qk_norm_rope,
    res2s,
    rows,
)
from ltxkern.compiled.steps import Launch, Zero
from ltxkern.compiled.tensors import DeviceLimits
from ltxkern.ops.res2s_step import res2s_steps
from tests.ops.contract import noise

LAUNCHES = (combine_guidance, dual_add, merge_lora, normalize_noise, qk_norm_rope, res2s, rows)
needs_extension = pytest.mark.skipif(
    extension.unavailable("cpu") is not None, reason=f"OLDER BUILDS NOT TESTED: {extension.unavailable('cpu')}"
)


@pytest.fixture
def build_without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the extension look like a build without one CPU kernel."""

    def remove(kernel: str) -> None:
        present = frozenset(extension.module().cpu_kernels())
        assert kernel in present
        monkeypatch.setattr(extension, "_registered", lambda tier: present - {kernel})
        for op in dispatch._registry.values():
            monkeypatch.setattr(op, "_present", {})

    return remove


@needs_extension
@pytest.mark.parametrize("kernel", ["pixel_norm_silu<bf16>", "pixel_norm_silu<f32>"])
def test_an_older_build_is_refused_before_the_call(build_without: Callable[[str], None], kernel: str) -> None:
    x = noise(1, 4, 3)
    build_without(kernel)
    reason = ltxkern.capabilities()["pixel_norm_silu"]["cpu"]
    assert reason is not None
    assert kernel in reason
    assert "rebuild" in reason
    assert ltxkern.capabilities()["group_norm_silu"]["cpu"] is None
    torch.testing.assert_close(ltxkern.pixel_norm_silu(x), ltxkern.reference.pixel_norm_silu(x, 1e-8, None))
    with ltxkern.use_backend("cpu"), pytest.raises(ltxkern.BackendError, match=r"cpu: ltxkern\._C was built without"):
        ltxkern.pixel_norm_silu(x)


@needs_extension
def test_the_lists_are_those_of_this_build() -> None:
    assert {kernel for kernels in inventory.CPU.values() for kernel in kernels} == set(
        extension.module().cpu_kernels()
    ), "csrc/cpu and ltxkern/inventory.py differ"


def test_every_compiled_backend_has_a_list() -> None:
    # The CPU merge is torch's own products in chunks: no kernel of ours.
    for name, op in dispatch._registry.items():
        assert (name in inventory.CUDA) == ("cuda" in op._backends), name
        assert (name in inventory.CPU) == ("cpu" in op._backends and name != "merge_lora_"), name


def calls() -> list[tuple[str, Callable[[], Any]]]:
    """Calls of every op that share no shape class: vector and scalar accesses, every dtype, with and without options."""
    halves = [torch.float16, torch.bfloat16, torch.float32]
    step = res2s_steps([0.9, 0.5, 0.2])[0]
    made: list[tuple[str, Callable[[], Any]]] = []
    for width in (16, 7):
        for dtype in (*halves, torch.float64):
            a, b, c = (noise(1, 6, width, dtype=dtype, seed=seed) for seed in range(3))
            made += [
                ("normalize_noise", partial(ltxkern.normalize_noise, a)),
                ("channelwise_normalize", partial(ltxkern.channelwise_normalize, a)),
                ("noise_statistics", partial(ltxkern.noise_statistics, a)),
                ("combine_guidance", partial(ltxkern.combine_guidance, a, b, cfg_scale=3.0, rescale_scale=0.5)),
                ("dual_add", partial(ltxkern.dual_add, a[:, :5], b[:, :5], c[:, :5])),
                ("res2s_sde_step", partial(ltxkern.res2s_sde_step, a, b, 0.8, 0.5, c)),
            ]
            for wide in (torch.float32, torch.float64):
                made += [
                    ("res2s_midpoint", partial(ltxkern.res2s_midpoint, a, b, c, step, compute_dtype=wide)),
                    ("res2s_advance", partial(ltxkern.res2s_advance, a.to(wide), b, b, c, step)),
                ]
        for dtype in halves:
            a, b = noise(2, 6, 2 * width, dtype=dtype), noise(2, 6, 2 * width, dtype=dtype, seed=1)
            row, table = b[:, :1], noise(1, 2, 6, width // 2 or 1)
            q = noise(1, 6, 4 * (width // 2), dtype=dtype)
            weight = noise(q.shape[-1], dtype=dtype)
            made += [
                ("rms_norm_modulate", partial(ltxkern.rms_norm_modulate, a, row, row)),
                (
                    "gated_residual_rms_norm_modulate",
                    partial(ltxkern.gated_residual_rms_norm_modulate, a, b, row, row, row),
                ),
                ("gated_residual", partial(ltxkern.gated_residual, a, b, row)),
                ("head_gate", partial(ltxkern.head_gate, a[None], a[None, ..., 0])),
                ("qk_norm_rope", partial(ltxkern.qk_norm_rope, q, q, weight, weight, table, table)),
            ]
    for dtype, weight_dtype, rank in (
        (torch.float32, torch.float32, 4),
        *((half, weight, 65) for half in halves[:2] for weight in (torch.float32, torch.float8_e4m3fn)),
    ):
        weight, a, b = noise(8, 8).to(weight_dtype), noise(rank, 8, dtype=dtype), noise(8, rank, dtype=dtype)
        made.append(("merge_lora_", partial(ltxkern.merge_lora_, weight, a, b)))
    return made


@needs_extension
@pytest.mark.parametrize("tier", ["cuda", "cpu"])
def test_launches_name_only_listed_kernels(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of real calls, made but not run."""
    named: set[str] = set()

    def planned(_: str, steps: Callable[[Any], Sequence[Any]], case: Any, arguments: int) -> Callable[..., None]:
        named.update(step.kernel for step in steps(case) if not isinstance(step, Zero))
        return lambda *tensors: None

    for launch in LAUNCHES:
        monkeypatch.setattr(launch, "planned", planned)
    monkeypatch.setattr(merge_lora, "SMALL_RANK", 64)
    lists = inventory.CPU if tier == "cpu" else inventory.CUDA
    seen: set[str] = set()
    for op, call in calls():
        if op not in lists:
            continue
        named.clear()
        monkeypatch.setitem(dispatch._registry[op]._kernels, "cpu", dispatch._registry[op]._backends[tier].load())
        with ltxkern.use_backend("cpu"):
            call()
        assert named, f"{op} made no launch"
        assert named <= set(lists[op]), f"{op}: {named - set(lists[op])} are not in ltxkern/inventory.py"
        seen |= named
    norms = {kernel for op in ("group_norm_silu", "pixel_norm_silu") for kernel in lists[op]}
    assert seen == {kernel for kernels in lists.values() for kernel in kernels} - norms


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norm_launches_name_only_listed_kernels(dtype: torch.dtype, last: bool) -> None:
    limits = DeviceLimits((9, 0), 132, 232448, 50 << 20)
    for shape in ((1, 64, 8), (1, 64, 7), (1, 64, 1 << 20), (1, 8, (1 << 20) + 1)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        group = group_norm_silu.Case(dtype, 1, shape[1], shape[2], 4, 1e-5, last, True, False, 0, 0, False, 0)
        pixel = pixel_norm_silu.Case(dtype, 1, shape[1], shape[2], 1e-8, last, True, 0)
        steps, _ = group_norm_silu.choose(group, limits)
        names = {step.kernel for step in steps if isinstance(step, Launch)}
        assert names <= set(inventory.CUDA["group_norm_silu"]), x.shape
        launch = pixel_norm_silu.columns(pixel) if last else pixel_norm_silu.rows(pixel, limits.shared_bytes)
        assert launch.kernel in inventory.CUDA["pixel_norm_silu"]
        assert {call.kernel for call in group_norm_silu.cpu_calls(group)} <= set(inventory.CPU["group_norm_silu"])
        assert {call.kernel for call in pixel_norm_silu.cpu_calls(pixel)} <= set(inventory.CPU["pixel_norm_silu"])
