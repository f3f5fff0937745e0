"""Figures quoted in README and docs, checked against the results files: `python bench/quoted.py`.

A measured figure is followed by a comment that names where it stands:
`3.1x <!-- result: FILE.json#OP.CASE.DTYPE/PROVIDER/METRIC -->`.
METRIC is a field of the row (`percent_of_roof`, `gb_per_s`, `launches`), a time (`median_us`, `median_ms`, `median_s`; also min,
p20, p80, floor), or `ratio:BASELINE`. The figure must equal the row's to the digits that are quoted. A line with a time, a
rate or a speed-up and no such comment is an error, unless it says `<!-- not measured: WHY -->`: sums of bytes, predictions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report import Record, read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
GENERATED = ("performance.md", "predicted.md", "predicted-switch.md")

MARKER = re.compile(r"(?P<figure>-?\d[\d,]*(?:\.\d+)?)\s*[^\d<]{0,24}<!-- result: (?P<file>[^#\s]+)#(?P<row>.+?) -->")
ANY_MARKER = re.compile(r"<!-- (result: .+?|not measured: .+?) -->")
FIGURE = re.compile(
    r"(?<![\w.])\d[\d,.]*(?:\s?(?:us|µs|ms|GB/s|TB/s|TFLOP/s|% of (?:the )?roof|times (?:faster|slower|as fast|as long))\b|x(?!\w))"
)
BLOCK = re.compile(r"<!-- ladder: (?P<edge>begin|end) -->")  # between them a report writes from results files
SCALES = {"us": 1.0, "ms": 1e-3, "s": 1e-6}


@dataclass(frozen=True)
class Fault:
    """One quoted figure that the results do not bear out."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def value_of(record: Record, metric: str) -> float:
    """A metric of a row in the unit that its name says.

    Raises:
        KeyError: the row has no such metric.
    """
    if metric.startswith("ratio:"):
        return record.ratios[metric.removeprefix("ratio:")]
    name, _, unit = metric.rpartition("_")
    if name in ("median", "min", "p20", "p80", "floor") and unit in SCALES:
        return float(getattr(record, f"{name}_us")) * SCALES[unit]
    value = getattr(record, metric, None)
    if not isinstance(value, (int, float)):
        raise KeyError(metric)
    return float(value)


def find(reference_file: str, row: str, results: Path) -> tuple[Record, str]:
    """The row and metric that a marker names.

    Raises:
        KeyError: no such file, row or provider.
    """
    path = results / reference_file
    if not path.exists():
        raise KeyError(f"no results file {reference_file}")
    key, _, rest = row.partition("/")
    provider, _, metric = rest.rpartition("/")
    for record in read_json(path).records:
        if f"{record.op}.{record.case}.{record.dtype}" == key and record.provider == provider:
            return record, metric
    raise KeyError(f"{reference_file} has no row {key} of {provider!r}")


def faults_in(path: Path, results: Path = RESULTS) -> list[Fault]:
    """Every wrong, unknown or unmarked figure of one document."""
    faults = []
    generated = False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        edge = BLOCK.search(line)
        if edge is not None:
            generated = edge["edge"] == "begin"
        if generated:
            continue
        marked = list(MARKER.finditer(line))
        if line.count("<!-- result:") != len(marked):
            faults.append(Fault(path, number, "a result comment without a figure right before it"))
        for match in marked:
            figure = match["figure"].replace(",", "")
            digits = len(figure.partition(".")[2])
            try:
                record, metric = find(match["file"], match["row"], results)
                value = value_of(record, metric)
            except KeyError as error:
                faults.append(Fault(path, number, str(error.args[0])))
                continue
            if round(value, digits) != float(figure):
                faults.append(Fault(path, number, f"quotes {figure}, {match['file']} says {value:.{digits + 2}f}"))
        if FIGURE.search(line) and not ANY_MARKER.search(line):
            figure_text = FIGURE.search(line)
            assert figure_text is not None
            faults.append(Fault(path, number, f"{figure_text[0]!r} names no results file"))
    return faults


def documents(root: Path = ROOT) -> list[Path]:
    """README, CONTRIBUTING and docs, without what is generated whole."""
    found = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if path.exists() and path.name not in GENERATED]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the documents named, or all."""
    paths = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)] or documents()
    faults = [fault for path in paths for fault in faults_in(path)]
    print("\n".join(map(str, faults)) or f"every figure of {len(paths)} documents stands in a results file")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
