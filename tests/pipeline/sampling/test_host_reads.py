"""No op and no step of a sampler loop reads a device value on the host."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ltxkern
from ltxkern import dispatch
from ltxkern.pipeline.sampling.euler import euler_sample
from ltxkern.pipeline.sampling.res2s import res2s_sample
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS
from tests.pipeline.sampling.toy_denoiser import Toy

HOST_READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "allclose")


class NoHostReads(TorchDispatchMode):
    """Refuses every op that reads a device value on the host, boolean indexing included; counts the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.ops.add(name)
        if name in HOST_READS:
            raise AssertionError(f"{func} reads a device value on the host")
        if name.startswith("index"):
            indices = [index for index in args[1] or () if isinstance(index, Tensor)] if len(args) > 1 else []
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise AssertionError(f"{func} with a boolean index reads a device value on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def references_in_sight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The torch references run under the modes of the test instead of behind the opaque ops."""
    with monkeypatch.context() as patch, ltxkern.use_backend("torch"):
        patch.setattr(dispatch, "needs_dispatcher", lambda args: False)
        patch.setattr(dispatch.Signature, "check", lambda *_: None)  # fake tensors have no addresses
        yield


def whole_loop(sample: Callable[..., dict[str, Tensor]], device: str = "cpu") -> dict[str, Tensor]:
    latents = {
        "video": torch.zeros(1, 6, 4, dtype=torch.bfloat16, device=device),
        "audio": torch.zeros(1, 3, 4, dtype=torch.bfloat16, device=device),
    }
    masks = {"video": torch.ones(1, 6, 1, device=device)}
    clean = {"video": torch.zeros(1, 6, 4, dtype=torch.bfloat16, device=device)}
    return sample(Toy(), latents, STAGE_2_SIGMAS, masks=masks, clean=clean, callback=lambda *_: None)


@pytest.mark.parametrize("sample", [res2s_sample, euler_sample])
def test_no_step_reads_a_device_value(sample: Callable[..., dict[str, Tensor]]) -> None:
    """FakeTensorMode has no values: item, tolist, bool and boolean indexing raise in it."""
    with FakeTensorMode(), NoHostReads():
        result = whole_loop(sample)
    assert result["video"].shape == (1, 6, 4)
    assert result["video"].dtype == torch.bfloat16


@pytest.mark.parametrize("sample", [res2s_sample, euler_sample])
def test_no_reference_reads_a_device_value(
    sample: Callable[..., dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with references_in_sight(monkeypatch), FakeTensorMode(), NoHostReads() as seen:
        whole_loop(sample)
    assert not any(op.startswith("res2s") for op in seen.ops)
    assert {"mul", "add"} <= seen.ops


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.mean().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.flatten().tolist(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.zeros((), dtype=x.dtype)),
        lambda x: torch.nonzero(x),
    ],
)
def test_the_guard_sees_host_reads(read: Callable[[Tensor], Any]) -> None:
    def denoiser(latents: Mapping[str, Tensor], sigma: float, **_: Any) -> Mapping[str, Tensor]:
        read(latents["video"].clone())
        return latents

    with FakeTensorMode(), NoHostReads(), pytest.raises(Exception):  # noqa: B017, PT011
        res2s_sample(denoiser, {"video": torch.zeros(1, 6, 4)}, STAGE_2_SIGMAS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sample", [res2s_sample, euler_sample])
def test_no_synchronisation_on_a_gpu(sample: Callable[..., dict[str, Tensor]]) -> None:
    whole_loop(sample, "cuda")  # kernels are loaded here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_loop(sample, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
