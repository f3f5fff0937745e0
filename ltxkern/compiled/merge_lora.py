"""How each compiled tier merges LoRAs: torch's addmm, a tile kernel on tensor or plain cores, or the chain of the official rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ltxkern.compiled.programs import THREADS, limits_of, program
from ltxkern.compiled.steps import Argument, Launch, Parameter, nested
from ltxkern.compiled.tensors import CUDA_NAMES, PARAM_CODES, DeviceLimits, aligned16
from ltxkern.layout import ceil_div

if TYPE_CHECKING:
    from ltxkern.ops.merge_lora import Arguments

# LoRAs of one launch (kLoras in csrc/include/ltxkern/merge_lora.cuh): more could not share one rounding.
LORAS = 4
# Weights of a block, in rows and in columns: of the kernel on plain cores.
TILE = 64
# Of that on tensor cores (csrc/include/ltxkern/merge_lora_tensor_cores.cuh): rows of a tile, ranks of a step, and steps in shared
# memory where they do not stay there.
MMA_ROWS, MMA_RANKS, MMA_STAGES = 256, 64, 2
# Up to this rank, of all LoRAs together, the products cost less on plain cores than reading and writing the weight.
SMALL_RANK = 16
# Up to this one the kernel on tensor cores takes what torch's own product could take as well.
#
# Predicted, not measured, for 4096 x 4096 weights on an H200. bf16: 86 and 80 % of the copy roof at ranks 32 and 128 against 72 and
# 70 of addmm_, and at 384 no more than addmm_, which was measured at 50. float8 at 384: 47 %, for 12.9 GFLOP take 16 us at
# 790 TFLOP/s, of which mma.sync reaches about two thirds. 201 MB of factors would cross from L2 with tiles of 128 x 128, 37 us at
# 5.5 TB/s; strips of 256 rows, whose part of B stays in shared memory, ask for 54.
PRODUCT_RANK = 128
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
    in_eights: bool
    limits: DeviceLimits | None = None


def half_of(case: Case) -> str | None:
    """The type of factors that tensor cores take, all fp16 or all bf16 and of no small rank; others would have to be rounded."""
    codes = {code for pair in case.codes for code in pair}
    if len(codes) > 1 or not codes <= HALF_NAMES.keys() or sum(case.ranks) <= SMALL_RANK:
        return None
    return HALF_NAMES[codes.pop()]


def common_parameters(
    case: Case, column_tiles: int, scales: Sequence[float], order: Sequence[int]
) -> dict[str, Parameter]:
    """Those of both kernels, of LoRAs in an order and with these scales."""
    row_stride, column_stride = case.strides
    parameters: dict[str, Parameter] = {
        **{"weight": Argument(0), "type": case.type_code, "rows": case.rows, "columns": case.columns},
        **{"row_stride": row_stride, "column_stride": column_stride, "column_tiles": column_tiles},
    }
    for place in range(LORAS):
        name = f"lora[{place}]"
        if place < len(order):
            k = order[place]
            a, b, (a_type, b_type) = Argument(1 + 2 * k), Argument(2 + 2 * k), case.codes[k]
            parameters |= nested(name, a=a, b=b, a_type=a_type, b_type=b_type, rank=case.ranks[k], scale=scales[place])
        else:
            parameters |= nested(name, a=None, b=None, a_type=0, b_type=0, rank=0, scale=0.0)
    return parameters | {"count": len(order), "stochastic": int(case.stochastic), "seed": case.seed}


def on_plain_cores(case: Case, threads: int) -> Launch:
    """One block a tile of the weight."""
    tiles = ceil_div(case.columns, TILE)
    parameters = common_parameters(case, tiles, case.scales, range(len(case.ranks)))
    return Launch("ltxk::merge_lora", (ceil_div(case.rows, TILE) * tiles,), threads, parameters)


def on_tensor_cores(case: Case, half: str, threads: int) -> Launch:
    """One block a multiprocessor, on tiles one behind the other of as few strips of rows as may be.

    Tensor cores cut sums off where they hold no more bits: for fp32 weights every 32 ranks are added to totals outside of them. The
    sums of several LoRAs, the smallest scale first so that none overflows, are multiplied by its share of the next one's.
    """
    assert case.limits is not None
    order = sorted(range(len(case.scales)), key=lambda k: abs(case.scales[k]))
    scales = [one / after for one, after in pairwise([*(case.scales[k] for k in order), 1.0])]
    sum_steps = case.type_code == CODES[torch.float32]
    columns = 64 if sum_steps else 128
    steps = sum(ceil_div(rank, MMA_RANKS) for rank in case.ranks)
    a_bytes, slot_bytes = MMA_STAGES * MMA_RANKS * columns * 2, MMA_ROWS * MMA_RANKS * 2
    # What is asked for never takes the place of what is being multiplied.
    held, slots, stages = steps, max(steps, MMA_STAGES), 0
    if a_bytes + slots * slot_bytes > case.limits.shared_bytes:
        held = slots = (case.limits.shared_bytes - a_bytes) // slot_bytes - MMA_STAGES
        stages = MMA_STAGES
    column_tiles = ceil_div(case.columns, columns)
    tiles = ceil_div(case.rows, MMA_ROWS) * column_tiles
    walk = ceil_div(tiles, case.limits.multiprocessors)
    parameters = common_parameters(case, column_tiles, scales, order)
    parameters |= {"tiles": tiles, "walk": walk, "held": held, "slots": slots}
    parameters |= {"in_eights": int(case.in_eights and not case.stochastic)}
    kernel = f"ltxk::merge_lora_tensor_cores<{half}, {str(sum_steps).lower()}>"
    return Launch(kernel, (ceil_div(tiles, walk),), threads, parameters, a_bytes + (slots + stages) * slot_bytes)


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """One launch of blocks of 256 threads: on tensor cores where they take the factors."""
    half = half_of(case)
    return [on_plain_cores(case, threads) if half is None else on_tensor_cores(case, half, threads)]


def describe(args: Arguments, limits: DeviceLimits | None) -> Case:
    """The case of contiguous factors."""
    weight, stochastic = args.weight, args.rounding == "stochastic"
    eight = 8 * weight.dtype.itemsize
    dense = weight.stride(1) == 1 and not weight.stride(0) % 8 and not weight.shape[1] % 8
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
        in_eights=dense and not weight.data_ptr() % min(16, eight),
        limits=limits,
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
    """CUDA: the official chain by torch, addmm for one LoRA of large rank and a 16-bit weight's dtype, else a tile kernel."""
    if args.rounding == "reference":
        composition(*args)
        return
    if args.rounding == "single" and args.lora_a[0].shape[0] > PRODUCT_RANK and one_product(args):
        with full_precision_reduction():
            _add_product(args)
        return
    weight = args.weight
    args = args._replace(lora_a=[a.contiguous() for a in args.lora_a], lora_b=[b.contiguous() for b in args.lora_b])
    pairs: list[Any] = [factor for pair in zip(args.lora_a, args.lora_b, strict=True) for factor in pair]
    target = weight.detach()
    if weight.dtype == torch.float8_e4m3fn:
        target = target.view(torch.uint8)
    program(tier, device_steps, describe(args, limits_of(tier, weight)), 1 + len(pairs))(target, *pairs)


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
