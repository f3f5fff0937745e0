"""Peak memory of a piece of work from shapes alone: it runs on the meta device, where tensors have sizes and no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class AllocationTrace(TorchDispatchMode):
    """Follows the storages of all tensors made within the block.

    Works on every device. What a kernel allocates and frees within itself is not seen, but for torch's own CPU convolutions.

    Args:
        cpu_kernels: count the unfolded input that torch's CPU convolution would make of a meta tensor.

    Attributes:
        live: bytes of the storages that exist now and were made within.
        peak: largest value of `live`.
    """

    def __init__(self, *, cpu_kernels: bool = False) -> None:
        super().__init__()
        self._cpu_kernels = cpu_kernels
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # An argument's storage was there before, or is known already.
        before = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        if self._cpu_kernels and func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.live + result.nbytes + unfolded_bytes(result, *args))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in before:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        nbytes = storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= nbytes
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def unfolded_bytes(output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> int:
    """Bytes of the unfolded input that torch's CPU convolution allocates; 0 where oneDNN serves the shapes.

    Args:
        output, x, weight, bias: of the convolution, on any device.
        settings: stride, padding, dilation, transposed, output_padding, groups.
    """
    # Expanded scalars: the choice looks at device, dtype and sizes, and no memory is taken.
    twins = [torch.empty((), dtype=t.dtype).expand(t.shape) if t is not None else None for t in (x, weight, bias)]
    chosen = torch._C._select_conv_backend(*twins, *settings)
    if chosen.name not in ("Slow2d", "Slow3d"):
        return 0
    kernel = weight.shape[2:].numel()
    return 0 if kernel == 1 else x.shape[0] * x.shape[1] * kernel * output.shape[2:].numel() * x.itemsize


class _FlashAttention(TorchFunctionMode):
    """On the meta device torch would pick the attention that writes out all scores; devices use one that does not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _flash_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    # The logarithm of the sum of scores, which the kernels write beside the output.
    query.new_empty(query.shape[:-1], dtype=torch.float32)
    return output


@torch.no_grad()
def peak_bytes(work: Callable[[], Any], *, cpu_kernels: bool = False) -> int:
    """Peak bytes of what `work` allocates, its result included; run it on tensors of the meta device.

    Attention counts its output and its row sums, as the flash kernels allocate them.
    """
    with AllocationTrace(cpu_kernels=cpu_kernels) as trace, _FlashAttention():
        work()
    return trace.peak
