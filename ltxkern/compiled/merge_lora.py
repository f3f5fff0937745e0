"""How each compiled tier merges LoRAs: torch's addmm, a tile kernel on tensor or plain cores, or the chain of the official rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ltxkern.compiled.programs import THREADS, program
from ltxkern.compiled.steps import Argument, Launch, Parameter, nested
from ltxkern.compiled.tensors import CUDA_NAMES, PARAM_CODES, aligned16
from ltxkern.layout import ceil_div

if TYPE_CHECKING:
    from ltxkern.ops.merge_lora import Arguments

# LoRAs of one launch (kLoras in csrc/include/ltxkern/merge_lora.cuh): more could not share one rounding.
LORAS = 4
# Weights of a block, in rows and in columns: of the kernel on plain cores, and of that on tensor cores.
TILE = 64
TENSOR_TILE = 128
# Up to this rank, of all LoRAs together, the products cost less on plain cores than reading and writing the weight.
#
# Predicted, not measured, for 4096 x 4096 float8 at rank 384 on an H200: 12.9 GFLOP and 40 MB, so at least 16 us at 790 TFLOP/s
# and 13 us at 3.0 TB/s. mma.sync reaches about two thirds of the first, 24 us; plain cores need 190 us at their peak of 67 TFLOP/s.
# With tiles of 128 x 128, 201 MB of factors cross from L2: 37 us at 5.5 TB/s, and that bounds the kernel. A block of 256 threads
# holds 64 sums a thread: two blocks of at most 128 registers a thread share a multiprocessor, so that one writes weights while the
# other multiplies.
SMALL_RANK = 16
# Bytes of a rounded delta on a CPU that are still in its cache when they are added to the weight.
CPU_CHUNK = 4 << 20
CODES = {**PARAM_CODES, torch.float8_e4m3fn: 4}
HALVES = (torch.float16, torch.bfloat16)
HALF_NAMES = {CODES[half]: CUDA_NAMES[half] for half in HALVES}
Composition = Callable[..., None]


class Case(NamedTuple):
    """Everything of a call that its launch depends on; one entry of codes, ranks and scales a LoRA."""

    type_code: int
    rows: int
    columns: int
    strides: tuple[int, int]
    codes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    stochastic: bool
    seed: int


def kernel_of(case: Case) -> tuple[str, int]:
    """The kernel of a case, and its tile: tensor cores where all factors are fp16 or all bf16 and the ranks are not small.

    Other factors would have to be rounded for the tensor cores. These cut sums off where they hold no more bits: for fp32 weights,
    and for several LoRAs, whose scales differ, every 32 ranks are added to totals outside of them.
    """
    codes = {code for pair in case.codes for code in pair}
    if len(codes) > 1 or not codes <= HALF_NAMES.keys() or sum(case.ranks) <= SMALL_RANK:
        return "ltxk::merge_lora", TILE
    sum_steps = len(case.ranks) > 1 or case.type_code == CODES[torch.float32]
    half = HALF_NAMES[codes.pop()]
    return f"ltxk::merge_lora_tensor_cores<{half}, {str(sum_steps).lower()}>", TENSOR_TILE


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """One block of 256 threads a tile of the weight."""
    kernel, tile = kernel_of(case)
    tiles = ceil_div(case.columns, tile)
    row_stride, column_stride = case.strides
    parameters: dict[str, Parameter] = {
        **{"weight": Argument(0), "type": case.type_code, "rows": case.rows, "columns": case.columns},
        **{"row_stride": row_stride, "column_stride": column_stride, "column_tiles": tiles},
    }
    for index in range(LORAS):
        name = f"lora[{index}]"
        if index < len(case.ranks):
            a, b, (a_type, b_type) = Argument(1 + 2 * index), Argument(2 + 2 * index), case.codes[index]
            rank, scale = case.ranks[index], case.scales[index]
            parameters |= nested(name, a=a, b=b, a_type=a_type, b_type=b_type, rank=rank, scale=scale)
        else:
            parameters |= nested(name, a=None, b=None, a_type=0, b_type=0, rank=0, scale=0.0)
    parameters |= {"count": len(case.ranks), "stochastic": int(case.stochastic), "seed": case.seed}
    return [Launch(kernel, (ceil_div(case.rows, tile) * tiles,), threads, parameters)]


def describe(args: Arguments) -> Case:
    """The case of contiguous factors."""
    weight, stochastic = args.weight, args.rounding == "stochastic"
    return Case(
        type_code=CODES[weight.dtype],
        rows=weight.shape[0],
        columns=weight.shape[1],
        strides=(weight.stride(0), weight.stride(1)),
        codes=tuple((CODES[a.dtype], CODES[b.dtype]) for a, b in zip(args.lora_a, args.lora_b, strict=True)),
        ranks=tuple(a.shape[0] for a in args.lora_a),
        scales=tuple(map(float, args.scale)),
        stochastic=stochastic,
        # Only there does it count: layers of one shape share a program otherwise.
        seed=args.seed if stochastic else 0,
    )


@contextmanager
def full_precision_reduction() -> Iterator[None]:
    """Products of the block add their parts in fp32, whatever the process allows otherwise."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction
    settings.allow_fp16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction = before


def one_product(args: Arguments) -> bool:
    """Whether one addmm merges with one rounding: a 16-bit weight with dense rows, and one LoRA of its dtype."""
    weight, factors = args.weight, (*args.lora_a, *args.lora_b)
    dense = weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]
    same = weight.dtype in HALVES and all(factor.dtype == weight.dtype for factor in factors)
    return len(args.lora_a) == 1 and dense and same


def _add_product(args: Arguments) -> None:
    with torch.no_grad():
        args.weight.addmm_(args.lora_b[0], args.lora_a[0], alpha=args.scale[0])


def run_device(tier: str, composition: Composition, args: Arguments) -> None:
    """CUDA: the official chain by torch, addmm for one large LoRA of a 16-bit weight's dtype, else a tile kernel."""
    if args.rounding == "reference":
        composition(*args)
        return
    if args.rounding == "single" and args.lora_a[0].shape[0] > SMALL_RANK and one_product(args):
        with full_precision_reduction():
            _add_product(args)
        return
    weight = args.weight
    args = args._replace(lora_a=[a.contiguous() for a in args.lora_a], lora_b=[b.contiguous() for b in args.lora_b])
    pairs: list[Any] = [factor for pair in zip(args.lora_a, args.lora_b, strict=True) for factor in pair]
    target = weight.detach()
    if weight.dtype == torch.float8_e4m3fn:
        target = target.view(torch.uint8)
    program(tier, device_steps, describe(args), 1 + len(pairs))(target, *pairs)


def cpu_has_bfloat16_products() -> bool:
    """Whether torch multiplies bf16 matrices with the processor's own instructions; without them it is a hundred times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def run_cpu(composition: Composition, args: Arguments) -> None:
    """CPU: addmm where the processor has bf16 products, else fp32 products in chunks with one rounding."""
    bfloat16 = args.weight.dtype == torch.bfloat16 and cpu_has_bfloat16_products()
    if args.rounding == "single" and bfloat16 and one_product(args):
        _add_product(args)
    else:
        composition(*args)


def run(tier: str, composition: Composition, args: Arguments) -> None:
    """One merge on a tier; `composition` is the op's torch reference."""
    if tier == "cpu":
        run_cpu(composition, args)
    else:
        run_device(tier, composition, args)


# Elements of a row of a weight's checksum in 16 bits (kSwitchTile in csrc/include/ltxkern/switch_lora.cuh), and rows of a block.
SWITCH_TILE = 4096
SWITCH_WALK = 2
SWITCH_TENSORS = ("weight", "delta", "bases", "places", "offsets", "codes", "escapes", "out", "sums")


class Switch(NamedTuple):
    """A part of a weight that goes from one multiple of a product to another."""

    dtype: torch.dtype
    size: int
    first: int
    subtract: float
    add: float


def switch_steps(case: Switch) -> list[Launch]:
    """One launch; a block of 256 threads takes SWITCH_WALK rows of the checksum."""
    parameters: dict[str, Parameter] = {name: Argument(i) for i, name in enumerate(SWITCH_TENSORS)}
    numbers = {"size": case.size, "first": case.first, "walk": SWITCH_WALK}
    parameters |= {**numbers, "subtract": case.subtract, "add": case.add}
    kernel = f"ltxk::switch_lora<{CUDA_NAMES[case.dtype]}>"
    return [Launch(kernel, (ceil_div(case.size, SWITCH_TILE * SWITCH_WALK),), THREADS, parameters)]


def refuse_switch(*tensors: torch.Tensor) -> str | None:
    """Why the kernel does not take a weight, its product and the result."""
    weight = tensors[0]
    if weight.dtype not in HALVES:
        return f"it takes float16 and bfloat16, not {weight.dtype}"
    if weight.numel() % SWITCH_TILE:
        return f"it takes whole rows of {SWITCH_TILE} elements of the checksum, not {weight.numel()} elements"
    if not aligned16(*tensors) or not all(tensor.is_contiguous() for tensor in tensors):
        return "it takes whole vectors of 16 bytes, one behind the other"
    return None


def run_switch(tier: str, case: Switch, *tensors: torch.Tensor | None) -> torch.Tensor:
    """One call on SWITCH_TENSORS but the last; returns what the result adds to its weight's checksum, a pair a block."""
    assert tensors[0] is not None
    blocks = ceil_div(case.size, SWITCH_TILE * SWITCH_WALK)
    sums = torch.empty(blocks, 2, dtype=torch.int64, device=tensors[0].device)
    program(tier, switch_steps, case, len(SWITCH_TENSORS))(*tensors, sums)
    return sums
