"""One measured row and one results file, as data: written and read as JSON, written as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1


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
    timer: str
    buffers: int
    bytes: int
    flops: int
    gb_per_s: float
    floor_us: float
    percent_of_roof: float
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


def write_json(results: Results, path: Path) -> None:
    """Write a results file, whole or not at all: a run writes it again after every op."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, **asdict(results)}, indent=1) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Results:
    """Read a results file.

    Raises:
        ValueError: not JSON, or another schema.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a results file: {error}") from error
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
