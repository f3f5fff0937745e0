"""The cards that predictions are made for, by data sheets and published microbenchmarks; nothing here was measured by us."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ltxkern.compiled.tensors import DeviceLimits

MIB = 1 << 20


@dataclass(frozen=True)
class Card:
    """One card.

    Args:
        name: as `--card` takes it.
        title: as people write it.
        architecture: of the machine code that runs on it.
        multiprocessors: of the card.
        clock_ghz: under load.
        bandwidth: bytes a second of its memory, by the data sheet.
        copy_share: of that, what a copy moves; reads and writes counted.
        l2_bytes: of its second cache.
        warps: resident ones of a multiprocessor, at most.
        shared_bytes: shared memory of a multiprocessor, 1 KiB a block included; a block may ask for 1 KiB less.
        double_lanes: threads of which a multiprocessor finishes an fp64 instruction in a clock.
        latency_ns: of a load from memory under load.
        matrix_rate: FLOP a second of a large bf16 product.
        source: where its figures stand.
    """

    name: str
    title: str
    architecture: str
    multiprocessors: int
    clock_ghz: float
    bandwidth: float
    copy_share: float
    l2_bytes: int
    warps: int
    shared_bytes: int
    double_lanes: int
    latency_ns: float
    matrix_rate: float
    source: str

    @property
    def roof(self) -> float:
        """Bytes a second that a copy moves."""
        return self.bandwidth * self.copy_share

    @property
    def limits(self) -> DeviceLimits:
        """What the launch heuristics ask of it."""
        return DeviceLimits(self.multiprocessors, self.shared_bytes - 1024)


_H100 = Card(
    *("h100", "H100", "sm_90", 132, 1.755, 3.35e12, 0.90, 50 * MIB, 64, 228 << 10, 64, 600, 790e12),
    "NVIDIA H100 and H200 data sheets; clock and cache: table 3 of PMC10448217; "
    "copy share: an earlier review's roofs of 3.0 and 4.2 TB/s",
)
CARDS = {
    card.name: card
    for card in (
        _H100,
        replace(_H100, name="h200", title="H200", bandwidth=4.8e12, copy_share=0.875),
        Card(
            *("b200", "B200", "sm_100", 148, 1.755, 8.0e12, 0.875, 126 * MIB, 64, 228 << 10, 64, 700, 1700e12),
            "NVIDIA HGX B200 data sheet; multiprocessors, and a clock like an H100's: Chips and Cheese on the B200; "
            "copy share as an H200's",
        ),
        Card(
            *("rtx4090", "RTX 4090", "sm_80"),
            *(128, 2.52, 1.008e12, 0.92, 72 * MIB, 48, 100 << 10, 2, 450, 150e12),
            "NVIDIA Ada architecture white paper; it runs the code of sm_80; copy share assumed",
        ),
        Card(
            *("rtx5090", "RTX 5090", "sm_120"),
            *(170, 2.407, 1.792e12, 0.90, 96 * MIB, 48, 100 << 10, 2, 450, 190e12),
            "NVIDIA RTX Blackwell architecture white paper; copy share assumed",
        ),
    )
}


def card_named(name: str) -> Card:
    """A card by its name, in any case and with or without blanks.

    Raises:
        ValueError: there is none.
    """
    found = CARDS.get("".join(name.lower().split()).replace("-", ""))
    if found is None:
        raise ValueError(f"--card must be one of {', '.join(CARDS)}, got {name!r}")
    return found
