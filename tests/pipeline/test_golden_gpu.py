"""The golden numbers with every CUDA backend forced in turn: whole runs, the transformer, the upsampler, the sampler's loops.

The single ops are held to their golden numbers on every backend by golden_ops.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern import dispatch
from ltxkern.patch import patch
from ltxkern.pipeline.sampling.res2s import res2s_sample
from ltxkern.verify.report import device_of
from tests.pipeline import golden_hq, golden_sampler, golden_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="GOLDEN NUMBERS NOT TESTED ON A GPU: no CUDA device"),
]
over_backends = pytest.mark.parametrize("backend", ["cuda", "nvrtc", "triton"])


@contextmanager
def forced(backend: str, *ops: str) -> Iterator[str]:
    """The device to run on, with this backend first, in fp32 throughout; afterwards the backend must have served these ops."""
    if (reason := dispatch.unavailable(backend)) is not None:
        pytest.skip(reason)
    for op in dispatch._registry.values():
        op.receipts.clear()
    with ltxkern.use_backend(backend, "torch"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield device_of(backend)
    served = dispatch.served()
    assert all(backend in served.get(op, ()) for op in ops), served


def to(device: str, value: Any) -> Any:
    """Tensors in a nest of dicts and lists, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to(device, item) for key, item in value.items()}
    return [to(device, item) for item in value] if isinstance(value, list) else value


@over_backends
@pytest.mark.parametrize("name", golden_hq.runs())
def test_whole_run(backend: str, name: str) -> None:
    ops = (
        "group_norm_silu",
        "res2s_midpoint",
        "res2s_advance",
        "combine_guidance",
        "rms_norm_modulate",
        "qk_norm_rope",
    )
    with forced(backend, *ops) as device:
        golden_hq.whole_run(name, device)


@over_backends
def test_upsampler(backend: str) -> None:
    golden = golden_transformer.GOLDEN
    with torch.no_grad(), forced(backend, "group_norm_silu") as device:
        module = deepcopy(golden_transformer.upsampler())
        patch(module)
        found = module.to(device)(golden["upsampler/in"].to(device)).cpu()
    torch.testing.assert_close(
        found, golden["upsampler/out_f32"], rtol=0, atol=2 * golden_transformer.UPSAMPLER_TOLERANCE
    )


def on(device: str, denoiser: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A denoiser that computes on the CPU, as the recorded one did, for latents on a device."""

    def moved(latents: dict[str, Tensor], sigma: float, **at: Any) -> dict[str, Tensor]:
        return to(device, denoiser(to("cpu", dict(latents)), sigma, **at))

    return moved


@over_backends
def test_loop_with_recorded_noise(backend: str) -> None:
    recorded = {match[1] for match in golden_sampler.matching(r"loop/case/(\w+)/noise_[va]")}
    cases = [(name, meta) for name, meta in golden_sampler.loop_cases() if name in recorded]
    with forced(backend, "res2s_midpoint", "res2s_advance") as device:
        for name, meta in cases:
            dtype = golden_sampler.DTYPES[meta.get("model_dtype", "f32")]
            given = golden_sampler.start_of(name, meta, dtype)
            noise = {
                key: [to(device, draw) for draw in golden_sampler.golden()[f"loop/case/{name}/noise_{key[0]}"]]
                for key in given["latents"]
            }
            for key in ("latents", "masks", "clean"):
                if key in given:
                    given[key] = to(device, given[key])
            result = res2s_sample(on(device, golden_sampler.Analytic(meta["den"])), **given, noise=noise)
            golden_sampler.check_result(name, dtype, to("cpu", dict(result)))
