"""The measured part of the group_norm_silu ladder: each version, the gain its bytes predict, the gain that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from record import Record, Results
from report import duration, markdown_table, size

OP = "group_norm_silu"


@dataclass(frozen=True)
class Rung:
    """One version: provider name, passes over the activation without and with a residual, and the idea in some words."""

    provider: str
    units: float
    units_with_residual: float
    idea: str


RUNGS = (
    Rung("torch eager", 5, 8, "three or four ops, each through memory"),
    Rung("torch eager, in-place SiLU", 5, 8, "the same traffic, one tensor fewer to allocate"),
    Rung("torch.compile", 3, 4, "statistics, then one fused pass"),
    Rung("ltxkern triton", 3, 4, "the same two passes, chunks that keep the whole chip busy"),
    Rung("ltxkern cpu", 2, 3, "chunk statistics and application while a group lies in cache"),
    Rung("ltxkern nvrtc", 3, 4, "the CUDA source compiled on the user's machine"),
    Rung("ltxkern cuda", 3, 4, "the CUDA source; two units where a group stays on the chip"),
)


def ladder_section(all_results: dict[str, Results]) -> str:
    """One table per results file and case; nothing that is not in a file."""
    parts = []
    for name, results in all_results.items():
        rows = [record for record in results.records if record.op == OP]
        if not rows:
            continue
        machine = results.machine
        parts.append(
            f"### {machine.get('gpu') or machine['cpu']}, {machine['revision']}\n\n"
            f"File `bench/results/{name}`, {machine['date']}, `{machine['command']}`.\n"
        )
        for key in dict.fromkeys((record.case, record.dtype) for record in rows):
            case = [record for record in rows if (record.case, record.dtype) == key]
            parts.append(f"{key[0]}, {key[1]}, {size(case[0].bytes)} at least:\n\n{_table(case)}\n")
    return "\n".join(parts or ["Nothing measured yet.\n"])


def _table(records: list[Record]) -> str:
    by_provider = {record.provider: record for record in records}
    residual = "residual" in records[0].case
    base = by_provider.get("torch eager")
    lines = []
    for rung in RUNGS:
        record = by_provider.get(rung.provider)
        if record is None or base is None:
            continue
        first, units = (
            (RUNGS[0].units_with_residual, rung.units_with_residual) if residual else (RUNGS[0].units, rung.units)
        )
        lines.append(
            [
                rung.provider,
                rung.idea,
                f"{units:g}",
                f"{first / units:.2f}x",
                f"{base.median_us / record.median_us:.2f}x",
                duration(record.median_us),
                f"{record.percent_of_roof:.0f}",
            ]
        )
    return markdown_table(("version", "idea", "passes", "predicted", "measured", "median", "% roof"), lines)
