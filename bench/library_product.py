"""The model's floor of a library's product: of the merges that the CUDA tier hands to torch, whose machine code nobody here counts.

Bytes, factors read again and FLOP of every launch, with the share of the card's rates that such a product is assumed to reach.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import bench_merge_lora
import model
from cards import Card
from cases import Case
from ltxkern.compiled.merge_lora import PRODUCT_RANK
from ltxkern.layout import ceil_div
from ltxkern.ops.merge_lora import reference_rows
from model import Counted, Launched, Limit, Prediction

# Assumed, not measured: of the rate of a large product, and of that of a copy, what a product of a short inner extent reaches.
SHARE = 0.8
# Assumed: a block's part of the result, and that of two blocks of a cluster that read their factors together.
TILE, PAIR = (128, 256), (256, 256)
WITH_CLUSTERS = ("sm_90", "sm_100")
HALF = 2
COUNTED = Counted(None, None, None)


def takes(case: Case) -> bool:
    """Whether the CUDA tier leaves a merge of factors in a 16-bit weight's dtype to torch; else it has a kernel for it."""
    if case.options.get("reference"):
        return True
    return case.options.get("loras", 1) == 1 and not case.options.get("float8") and case.options["rank"] > PRODUCT_RANK


def tile_of(card: Card) -> tuple[int, int]:
    """Rows and columns of the result for which a card's blocks read their factors once."""
    return PAIR if card.architecture in WITH_CLUSTERS else TILE


def factor_bytes(rows: int, columns: int, rank: int, tile: tuple[int, int]) -> int:
    """What all tiles of a product ask of its factors."""
    return ceil_div(rows, tile[0]) * ceil_div(columns, tile[1]) * sum(tile) * rank * HALF


def _limits(card: Card, memory: int, through: int, flops: int = 0) -> list[Limit]:
    share = SHARE if flops else 1.0
    return [
        Limit("bytes", memory / (card.roof * share) * 1e6),
        Limit("L2", through / model.l2_rate(card) * 1e6),
        Limit("library product", flops / (card.matrix_rate * SHARE) * 1e6),
        Limit("launch", model.LAUNCH_US + card.latency_ns / 1e3),
    ]


def launches_of(case: Case, card: Card) -> Iterator[Launched]:
    """One addmm_; by the official rule, of every chunk of rows, B times the scale, the product, and its sum with the weight."""
    (all_rows, columns), rank = case.shape, case.options["rank"]
    reference = case.options.get("reference")
    weight = torch.empty(case.shape, dtype=torch.bfloat16, device="meta")
    rows = reference_rows(weight, rank) if reference else all_rows
    kept = card.l2_bytes // 2
    for top in range(0, all_rows, rows):
        part = min(rows, all_rows - top)
        a, b, result = rank * columns * HALF, part * rank * HALF, part * columns * HALF
        flops, asked = 2 * part * columns * rank, factor_bytes(part, columns, rank, tile_of(card))
        if not reference:
            memory, through = a + b + 2 * result, asked + 2 * result
            yield Launched(_limits(card, memory, through, flops), memory, through)
            continue
        # What a launch wrote, the next one finds in half of the second cache.
        steps = (
            (2 * b, 2 * b, 0),
            (a + max(0, b - kept) + result, asked + result, flops),
            (2 * result + max(0, result - kept), 3 * result, 0),
        )
        yield from (Launched(_limits(card, *step), *step[:2]) for step in steps)


def predictions(card: Card, floors: dict[str, tuple[int, int]]) -> list[Prediction]:
    """Of all production merges that go to the library, in the dtypes that the op runs in."""
    suite = bench_merge_lora.SUITE
    return [
        model.of_call(
            (suite.op, case.name, dtype, "cuda"),
            *(card, floors[f"{suite.op} {case.name} {dtype}"], list(launches_of(case, card)), COUNTED),
        )
        for case in suite.cases
        for dtype in suite.dtypes
        if case.size != "small" and takes(case)
    ]
