"""A run as data (JSON, CSV) and as tables for people, with the machine above them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
COLUMNS = (
    "case", "dtype", "provider", "median", "min", "p20..p80", "bytes", "GB/s", "% roof", "vs eager", "vs compile",
    "launches", "extra mem", "error", "timer",
)  # fmt: skip
# The slowest and the fastest copy of a machine left alone are closer than this.
SHARED_MEMORY = 1.2


@dataclass(frozen=True)
class Record:
    """One provider on one case. Times in microseconds, sizes in bytes, errors relative to the fp64 result."""

    op: str
    case: str
    shape: list[int]
    dtype: str
    provider: str
    median_us: float
    min_us: float
    p20_us: float
    p80_us: float
    samples: int
    timer: str = "wall"
    buffers: int = 1
    bytes: int = 0
    flops: int = 0
    gb_per_s: float = 0.0
    floor_us: float = 0.0
    percent_of_roof: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)
    launches: int | None = None
    peak_extra_bytes: int | None = None
    error_rms: float | None = None
    error_max: float | None = None
    composition_error_rms: float | None = None
    bit_equal: bool | None = None
    contract: str = ""
    compile_s: float | None = None
    load: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the same measurement on another day has in common with this one."""
        return self.op, self.case, self.dtype, self.provider


@dataclass(frozen=True)
class Results:
    """One run: machine, roofs, settings, rows, what was left out and what was wrong."""

    machine: dict[str, Any]
    roofs: dict[str, float]
    settings: dict[str, Any]
    records: list[Record]
    skipped: list[dict[str, str]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)


def write_whole(data: Any, path: Path) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def write_json(results: Results, path: Path) -> None:
    """Write a results file; a run writes it again after every op."""
    write_whole({"schema": SCHEMA, **asdict(results)}, path)


def read_json(path: Path) -> Results:
    """Read a results file.

    Raises:
        ValueError: not JSON, or another schema.
    """
    return _results(path, _content(path))


def read_folder(folder: Path) -> dict[str, Results]:
    """Every results file of a folder by name; what else a proof on a GPU leaves there names its stage, and has no rows.

    Raises:
        ValueError: as `read_json`, of any other file.
    """
    found = {path: _content(path) for path in sorted(folder.glob("*.json"))}
    return {path.name: _results(path, data) for path, data in found.items() if not _of_stage(data)}


def _of_stage(data: Any) -> bool:
    return isinstance(data, dict) and "stage" in data


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a results file: {error}") from error


def _results(path: Path, data: Any) -> Results:
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}: measure again with this revision")
    records = [Record(**row) for row in data.pop("records")]
    return Results(records=records, **data)


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Write the rows alone, one column per field, ratios as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Record)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for record in records:
            row = asdict(record)
            row["shape"] = "x".join(map(str, record.shape))
            row["ratios"] = json.dumps(record.ratios)
            writer.writerow(row)


def duration(microseconds: float) -> str:
    """A time with a unit that keeps three figures."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.3g} s"
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


def size(count: float) -> str:
    """A byte count with a decimal unit."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count:.0f} B"


def error_text(record: Record) -> str:
    """The contract as seen: the same bits as the torch composition, or the RMS error against fp64 beside the composition's."""
    if record.bit_equal:
        return "exact"
    if record.error_rms is None:
        return "-"
    own = record.composition_error_rms
    return f"rounded {record.error_rms:.1e}" + (f" ({record.error_rms / own:.2f}x)" if own else "")


def row(record: Record) -> list[str]:
    """Cells of one record in the order of `COLUMNS`."""

    def ratio(name: str) -> str:
        return f"{record.ratios[name]:.2f}x" if name in record.ratios else "-"

    return [
        record.case,
        record.dtype,
        record.provider,
        duration(record.median_us),
        duration(record.min_us),
        f"{duration(record.p20_us)}..{duration(record.p80_us)}",
        size(record.bytes),
        f"{record.gb_per_s:.1f}",
        f"{record.percent_of_roof:.0f}",
        ratio("torch eager"),
        ratio("torch.compile"),
        "-" if record.launches is None else str(record.launches),
        "-" if record.peak_extra_bytes is None else size(record.peak_extra_bytes),
        error_text(record),
        record.timer,
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns padded, so that it reads as plain text too."""
    widths = [max(len(str(line[i])) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def machine_lines(machine: dict[str, Any], roofs: dict[str, float], *, cold: bool = True) -> list[str]:
    """The machine and its roofs in words, and whether the rows were measured on rotated buffers."""
    lines = [f"Machine: {machine['gpu'] if 'gpu' in machine else machine['cpu']}, {machine['threads']} CPU threads"]
    if "gpu" in machine:
        clocks = machine.get("clocks_seen", {})
        seen = ", ".join(f"{key} {low:.0f} to {high:.0f}" for key, (low, high) in clocks.items()) or "not read"
        lines.append(
            f"GPU: sm_{machine['compute_capability'].replace('.', '')}, {machine['sms']} SMs, {size(machine['gpu_bytes'])}, "
            f"driver {machine['driver']}, CUDA {machine['cuda']}; seen: {seen}"
        )
    lines.append(
        f"Software: ltxkern {machine['ltxkern']} at {machine['revision']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"Python {machine['python']}; backends {', '.join(machine['backends'])}"
    )
    lines.append(
        f"Run: {machine['date']}, `{machine['command']}`, host load {machine['load_at_start']} at the start, "
        f"malloc mmap threshold {machine['allocator']}"
    )
    for name, value in roofs.items():
        unit = "TFLOP/s" if name.startswith("gemm") else "GB/s"
        lines.append(f"Roof {name}: {value / (1e12 if unit == 'TFLOP/s' else 1e9):.4g} {unit}, measured in this run")
    low, high = machine.get("copy_roof_seen", (1.0, 1.0))
    if high > SHARED_MEMORY * low:
        lines.append(
            f"CAUTION: the copy ran at {low / 1e9:.4g} to {high / 1e9:.4g} GB/s in the course of the run: others used the memory, "
            "and `% roof` (against the fastest copy) and times vary with them"
        )
    if cold:
        lines.append("Cold cache: every call takes the next of several buffers whose sum exceeds the last-level cache.")
    return lines


def lines_of(results: Results) -> list[str]:
    """`machine_lines` of a run; whole models (one buffer) are not called cold."""
    cold = not results.records or any(record.buffers > 1 for record in results.records)
    return machine_lines(results.machine, results.roofs, cold=cold)


def op_section(op: str, results: Results) -> str:
    """Heading, table and left-out providers of one op."""
    rows = [record for record in results.records if record.op == op]
    lines = [f"## {op}", "", markdown_table(COLUMNS, [row(record) for record in rows]) if rows else "No rows."]
    reasons = {}
    for skip in results.skipped:
        if skip["op"] == op:
            reasons.setdefault((skip["provider"], skip["reason"]), []).append(skip["case"])
    for (provider, reason), cases in reasons.items():
        lines.append(f"- {provider or 'case'} left out on {', '.join(cases)}: {reason}")
    for failure in results.failures:
        if failure["op"] == op:
            lines.append(f"- FAILED on {failure['case']}: {failure['error']}")
    notes = sorted({f"{record.case}, {record.provider}: {record.note}" for record in rows if record.note})
    lines += [f"- {note}" for note in notes]
    compiled = [record for record in rows if record.compile_s is not None]
    if compiled:
        total = sum(record.compile_s or 0.0 for record in compiled)
        lines.append(f"- torch.compile took {total:.1f} s for {len(compiled)} shapes, not counted in its times.")
    return "\n".join(lines)


def full_report(results: Results) -> str:
    """The whole run as Markdown."""
    ops = list(dict.fromkeys([r.op for r in results.records] + [s["op"] for s in results.skipped + results.failures]))
    parts = ["# Benchmark report", "", *[f"- {line}" for line in lines_of(results)], ""]
    for op in ops:
        parts += [op_section(op, results), ""]
    return "\n".join(parts)
