"""Plots of one results file as SVG: rate over size under the copy roof, percent of roof, speed-up over eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from record import Record, Results

SPECIAL = ("dit", "lora_switch", "hq")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same input gives the same file, so that a regenerated page shows only what was measured anew.
    matplotlib.rcParams["svg.hashsalt"] = "ltxkern"
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)


def write_plots(stem: str, results: Results, folder: Path) -> list[str]:
    """Write the plots of one machine; paths relative to the docs folder."""
    records = [record for record in results.records if record.op not in SPECIAL]
    if not records:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{results.machine.get('gpu') or results.machine['cpu']}, {results.machine['revision']}"
    names = [f"{stem}-{kind}.svg" for kind in ("roofline", "percent-of-roof", "speed-up")]
    _roofline(records, results.roofs, title, folder / names[0])
    _bars(records, "percent_of_roof", f"percent of roof: {title}", folder / names[1])
    _bars(records, "speed-up", f"times faster than torch eager: {title}", folder / names[2])
    return [f"{folder.name}/{name}" for name in names]


def _roofline(records: list[Record], roofs: dict[str, float], title: str, path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for provider in dict.fromkeys(record.provider for record in records):
        rows = [record for record in records if record.provider == provider and not record.flops]
        axes.plot([r.bytes for r in rows], [r.gb_per_s for r in rows], "o", label=provider, alpha=0.7)
    if "copy" in roofs:
        axes.axhline(roofs["copy"] / 1e9, color="black", linewidth=1, label="copy roof, same run")
    axes.set(xscale="log", yscale="log", xlabel="bytes that one call must move", ylabel="GB/s", title=title)
    axes.legend(fontsize="small")
    _save(figure, path)


def _bars(records: list[Record], metric: str, title: str, path: Path) -> None:
    pyplot = _pyplot()
    keys = list(dict.fromkeys((r.op, r.case, r.dtype) for r in records))
    # Eager is the unit of the speed-up and has no bar there; further baselines stand in the tables.
    shown = ("torch.compile",) if metric == "speed-up" else ("torch eager", "torch.compile")
    names = dict.fromkeys(record.provider for record in records)
    providers = [name for name in names if name in shown or name.startswith("ltxkern")]
    by_key = {record.key: record for record in records}
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.11 * len(keys) * (len(providers) + 1)))
    height = 0.8 / max(1, len(providers))
    for index, provider in enumerate(providers):
        positions, values = [], []
        for place, key in enumerate(keys):
            record = by_key.get((*key, provider))
            if record is None:
                continue
            value = record.percent_of_roof if metric == "percent_of_roof" else record.ratios.get("torch eager", 1.0)
            positions.append(place + index * height)
            values.append(value)
        axes.barh(positions, values, height, label=provider)
    labels = [f"{op} {case} {dtype}" for op, case, dtype in keys]
    axes.set_yticks([place + 0.4 for place in range(len(keys))], labels, fontsize="small")
    axes.invert_yaxis()
    axes.axvline(100 if metric == "percent_of_roof" else 1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
    _save(figure, path)
