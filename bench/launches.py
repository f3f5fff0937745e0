"""The launches of a call on a card that is not here: a tier's own launch code runs on tensors without memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ltxkern
from cards import Card
from cases import DTYPES, Call, Case, Suite, count_bytes, floor_bytes, result_of
from ltxkern import dispatch, ops
from ltxkern.compiled import extension, group_norm_silu, merge_lora, pixel_norm_silu, programs
from ltxkern.compiled.steps import Launch, Step, grid3, pack
from sass import operand_address


class Kernel(NamedTuple):
    """One kernel launch: its parameters as bytes, the operands at `sass.operand_address`, and the bytes of each."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: bytes
    operands: tuple[int, ...]
    numbers: Mapping[str, int]
    indices: tuple[int, ...] = ()
    cubin: bytes | None = None


class Prepared(NamedTuple):
    """A call, and the least bytes that it must move."""

    call: Call
    floor: int


META = torch.device("meta")


def prepare(suite: Suite, case: Case, dtype: str) -> Prepared:
    """A case on tensors without memory."""
    call = suite.prepare(case, DTYPES[dtype], META, None)  # type: ignore[arg-type]
    with ltxkern.use_backend("torch"):
        outputs = result_of(call, call.args, call.composition(*call.args))
    return Prepared(call, floor_bytes(call, outputs))


@contextmanager
def _served(card: Card) -> Iterator[pytest.MonkeyPatch]:
    """Every tier is there and serves tensors without memory, on this card."""
    from ltxkern import triton as tier

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "unavailable", lambda backend: None)
        patch.setattr(dispatch, "_waiting", lambda backend: False)
        for op in dispatch._registry.values():
            patch.setattr(op, "_present", {})
        patch.setattr(programs, "refuse_device", lambda tier, tensor: None)
        for module in (group_norm_silu, merge_lora, pixel_norm_silu):
            patch.setattr(module, "limits_of", lambda tier, x: card.limits)
        patch.setattr(ops.pixel_norm_silu, "device_limits", lambda index: card.limits)
        patch.setattr(tier, "refuse_elsewhere", lambda args: None)
        yield patch


def of_cuda(call: Call, card: Card) -> list[Kernel]:
    """The launches of the prebuilt CUDA tier; none where it hands a call to torch."""
    found: list[Kernel] = []

    def builder(tier: str) -> Callable[[Sequence[Step], int], Callable[..., None]]:
        return lambda steps, arguments: lambda *tensors: found.extend(_kernels(steps, tensors))

    programs.made_once.cache_clear()
    with _served(card) as patch, ltxkern.use_backend("cuda"):
        patch.setattr(extension, "program_builder", builder)
        call.op(*call.args)
    programs.made_once.cache_clear()
    return found


def of_two_passes(call: Call, card: Card) -> list[Kernel]:
    """The launches of a channels-last GroupNorm that takes the statistics first, whatever its launch module would choose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm_silu, "waits_on_chip", lambda case: False)
        group_norm_silu._chosen.cache_clear()
        try:
            return of_cuda(call, card)
        finally:
            group_norm_silu._chosen.cache_clear()


_INDICES = (torch.int32, torch.int64)


def _kernels(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> Iterator[Kernel]:
    sizes = tuple(0 if tensor is None else count_bytes(tensor) for tensor in tensors)
    memory = [
        None if tensor is None else (tensor.untyped_storage()._cdata, tensor.storage_offset()) for tensor in tensors
    ]
    indices = tuple(i for i, tensor in enumerate(tensors) if tensor is not None and tensor.dtype in _INDICES)
    for step in steps:
        if isinstance(step, Launch):
            template, relocations = pack(step.parameters)
            block = bytearray(template)
            for slot, index, offset in relocations:
                # What two operands share, as queries and keys their tables, is one in memory.
                address = 0 if tensors[index] is None else operand_address(memory.index(memory[index])) + offset
                block[8 * slot : 8 * slot + 8] = address.to_bytes(8, "little")
            numbers = {name: value for name, value in step.parameters.items() if isinstance(value, int)}
            yield Kernel(
                step.kernel, grid3(step.grid), step.block, step.shared_bytes, bytes(block), sizes, numbers, indices
            )


class _Target:
    """The part of a driver that Triton's compiler asks for."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u32": 4, "u64": 8, "fp32": 4, "f32": 4, "fp64": 8, "f64": 8}


def of_triton(call: Call, card: Card) -> list[Kernel]:
    """What the Triton tier would launch, compiled for the card's architecture."""
    import triton
    from triton.runtime.jit import JITFunction

    found: list[Kernel] = []
    stock = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made = stock(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        blocks = grid(given) if callable(grid) else grid
        found.append(_triton_kernel(made, given, (*blocks, 1, 1)[:3]))
        return made

    with _served(card) as patch, ltxkern.use_backend("triton"):
        patch.setattr(JITFunction, "run", compile_only)
        triton.runtime.driver.set_active(_Target(card.architecture))
        call.op(*call.args)
    return found


def _triton_kernel(made: Any, given: dict[str, Any], grid: tuple[int, int, int]) -> Kernel:
    parameters, sizes, indices = bytearray(), [], []
    for name, kind in made.src.signature.items():
        value = given.get(name)
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") else _SIZES[kind]
        parameters += bytes(-len(parameters) % size)
        if kind.startswith("*"):
            parameters += operand_address(len(sizes)).to_bytes(8, "little")
            if isinstance(value, Tensor) and value.dtype in _INDICES:
                indices.append(len(sizes))
            sizes.append(count_bytes(value) if isinstance(value, Tensor) else 0)
        elif isinstance(value, float):
            parameters += struct.pack("<d" if size == 8 else "<f", value)
        else:
            parameters += (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
    # Two pointers to scratch memory that these kernels do not use.
    parameters += bytes(-len(parameters) % 8 + 16)
    data = made.metadata
    return Kernel(
        made.name.strip("_"),
        grid,
        32 * data.num_warps,
        data.shared,
        bytes(parameters),
        tuple(sizes),
        {},
        tuple(indices),
        made.asm["cubin"],
    )
