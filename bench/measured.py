"""Measured figures beside the predictions of the same calls; one that is far from its prediction needs its reason, in EXPLAINED."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cards import CARDS
from kernel_sources import digest
from model import Prediction
from report import Record, markdown_table, read_folder

# Points of the copy roof from which a difference has to be explained.
FAR = 15
Key = tuple[str, str, str, str]


class Figure(NamedTuple):
    """Percent of the roof, and whether the kernel's code is still what it was of."""

    percent: float
    as_it_is: bool


# By op, case, dtype and tier, and by the card's title; several where several runs have the call.
Figures = Mapping[Key, Mapping[str, Sequence[Figure]]]
# Why a measured figure is far from its prediction, by the card's title, op, case, dtype and tier.
_PIECES = (
    "not measured why; it goes with short pieces far from each other, which memory and address translation may serve slower and "
    "the model does not know: {}; {}"
)
_PIXELS = (
    "the CUDA tier, with pieces of 512 and 256 bytes, reached 88 in that run, and channels-last, where the bytes of a program lie "
    "side by side, this tier reached 99"
)
EXPLAINED: dict[tuple[str, str, str, str, str], str] = {
    (
        "H200",
        "group_norm_silu",
        "ltx2_upsampler_post_720p_channels_last",
        "bf16",
        "triton",
    ): "not explained yet: by the counts neither issue (345 of 1,031 us), the second cache (515) nor latency (199) binds. A "
    "program takes 256 of the 1,024 bytes of a position, a warp of the CUDA tier, which reached 62 in that run, 512",
    (
        "H200",
        "group_norm_silu",
        "ltx2_upsampler_pre_720p",
        "bf16",
        "triton",
    ): "the host was slower than the GPU: calls took 229 to 254 us, the fastest 192 (58 %), those of the CUDA tier 198 to 200; the "
    "same kernels reached 61 at four times the size",
    ("H200", "pixel_norm_silu", "vae_frame_128", "bf16", "triton"): _PIECES.format(
        "a program takes 128 bytes of each of 128 channels that lie 32 MB apart, and took 1,762 us in shared memory by count, "
        "which is 1,004 since",
        _PIXELS,
    ),
    ("H200", "pixel_norm_silu", "vae_frame_256", "bf16", "triton"): _PIECES.format(
        "a program takes 64 bytes of each of 256 channels that lie 8 MB apart", _PIXELS
    ),
    (
        "H200",
        "qk_norm_rope",
        "stage1_cross",
        "bf16",
        "cuda",
    ): "timed with launches of a cold host, which the timer no longer does; the same kernel by NVRTC reached 82 % in that run",
}
# GroupNorm's kernels in runs that force each, by their names there: whether channels-last calls, else contiguous ones, have it as
# the CUDA tier's own.
_FORCED = {"two passes": False, "one launch": True}
# Calls whose kernel at a revision is gone, by tier.
_GONE = {
    *(
        ("df8da9e3f6", "cuda", "group_norm_silu", case)
        for case in ("hunyuan_vae", "ltx2_upsampler_post_720p", "ltx2_upsampler_pre_720p")
    ),
    *(("6a632ac4e5", tier, "qk_norm_rope", "stage2_video_by_row") for tier in ("cuda", "triton")),
}
# What figures of kernels that are gone say of the model.
OF_KERNELS_GONE = """
Figures of kernels that are gone stand beside no prediction. Those of `qk_norm_rope` at `stage2_video_by_row`, 73 % of the roof
(CUDA) and 52 % (Triton) on an H200 at 6a632ac4e5, had been predicted at 90 and 86: a load of a warp that falls on three rows of the
tables was taken to pass as 128 bytes in a row do. By the addresses of its threads, as such loads are counted now, it takes 6 or 7
clocks. The same kernels are then predicted at 77 (CUDA) and 51 (Triton 3.6, which ran there: its code has 198 clocks of the first
cache and of shared memory for 16 bytes where that of 3.7, which this page counts, has 90, and would be at 85). The kernels that
took their place are predicted at 89, Triton's at 78 with 3.6.
"""


def _tier_of(record: Record, revision: str) -> str | None:
    """The tier that would run a record's kernel today; None where it is no kernel of ours, or gone."""
    if record.provider in _FORCED:
        return "cuda" if _FORCED[record.provider] == record.case.endswith("channels_last") else None
    tier = record.provider.removeprefix("ltxkern ")
    gone = (revision, tier, record.op, record.case) in _GONE
    return None if gone or tier == record.provider else tier


def read(folder: Path) -> Figures:
    """What the results files of a folder have of the cards that are predicted, by kernels that are still there."""
    found: dict[Key, dict[str, list[Figure]]] = {}
    for results in read_folder(folder).values():
        title = next((card.title for card in CARDS.values() if card.title in results.machine.get("gpu", "")), None)
        for record in results.records if title is not None else ():
            if (tier := _tier_of(record, results.machine["revision"])) is not None:
                key = record.op, record.case, record.dtype, tier
                as_it_is = results.machine.get("sources", {}).get(f"{tier} {record.op}") == digest(tier, record.op)
                found.setdefault(key, {}).setdefault(title, []).append(Figure(record.percent_of_roof, as_it_is))
    return found


def cell(figures: Figures, key: Key) -> str:
    """The figures of a call, as its row has them; a star behind those of other code than today's."""
    of_call = figures.get(key, {})
    return " ".join(
        f"{title}: {one.percent:.0f}{'' if one.as_it_is else '*'}" for title in of_call for one in of_call[title]
    )


def far_ones(predictions: Sequence[Prediction], figures: Figures) -> str:
    """A row for every figure that is more than FAR points from its prediction.

    Raises:
        ValueError: EXPLAINED has no reason for one.
    """
    lines = []
    for one in predictions:
        title = CARDS[one.card].title
        for percent, _ in figures.get((one.op, one.case, one.dtype, one.tier), {}).get(title, ()):
            if abs(percent - one.percent_of_roof) <= FAR:
                continue
            call = (title, one.op, one.case, one.dtype, one.tier)
            if call not in EXPLAINED:
                raise ValueError(
                    f"EXPLAINED in bench/measured.py must say why {' '.join(call)} reached {percent:.0f} % of the roof where "
                    f"{one.percent_of_roof:.0f} % were predicted, more than {FAR} points apart; it has no reason for it"
                )
            lines.append([*call, f"{one.percent_of_roof:.0f}", f"{percent:.0f}", EXPLAINED[call]])
    header = ("card", "op", "case", "dtype", "tier", "predicted", "measured", "why")
    return markdown_table(header, lines) if lines else "None."
