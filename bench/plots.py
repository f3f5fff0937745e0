"""Plots of one results file as SVG: rate over size under the copy roof, percent of roof, speed-up over eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import Record, Results

SPECIAL = ("dit", "lora_switch", "hq", "patch")
# One colour per provider in every plot; further baselines stand in the tables.
COLOURS = {
    "torch eager": "#9a9a9a",
    "torch.compile": "#f2a33a",
    "ltxkern cuda": "#1b5fa8",
    "ltxkern nvrtc": "#6fb1e0",
    "ltxkern triton": "#2a9d6f",
    "ltxkern cpu": "#8a2f62",
    "ltxkern torch": "#cdb8d8",
}
MARKERS = "osD^v<>PX*hp"


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # The same input gives the same file, so that a regenerated page shows only what was measured anew.
    matplotlib.rcParams["svg.hashsalt"] = "ltxkern"
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)


def write_plots(stem: str, results: Results, folder: Path) -> list[str]:
    """Write the plots of one machine that have something to show; paths relative to the docs folder."""
    records = [record for record in results.records if record.op not in SPECIAL and record.provider in COLOURS]
    if not any(record.provider.startswith("ltxkern") for record in records):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{results.machine.get('gpu') or results.machine['cpu']}, {results.machine['revision']}"
    names = [f"{stem}-{kind}.svg" for kind in ("roofline", "percent-of-roof", "speed-up")]
    moving = [record for record in records if not record.flops]
    if moving:
        _roofline(moving, results.roofs, title, folder / names[0])
    _bars(records, "percent_of_roof", f"percent of roof: {title}", folder / names[1])
    _bars(records, "speed-up", f"times faster than torch eager: {title}", folder / names[2])
    return [f"{folder.name}/{name}" for name in names[0 if moving else 1 :]]


def _roofline(shown: list[Record], roofs: dict[str, float], title: str, path: Path) -> None:
    """Colour says who, marker says which op."""
    plot = pyplot()
    figure, axes = plot.subplots(figsize=(9, 5.5))
    markers = dict(zip(dict.fromkeys(record.op for record in shown), MARKERS, strict=False))
    for record in shown:
        style = {"color": COLOURS[record.provider], "alpha": 0.85, "markersize": 6}
        axes.plot(record.bytes, record.gb_per_s, markers[record.op], **style)
    handles = [
        plot.Line2D([], [], color=colour, linewidth=5, label=name)
        for name, colour in COLOURS.items()
        if any(record.provider == name for record in shown)
    ]
    handles += [
        plot.Line2D([], [], color="black", marker=marker, linestyle="", label=op) for op, marker in markers.items()
    ]
    if "copy" in roofs:
        handles.append(axes.axhline(roofs["copy"] / 1e9, color="black", linewidth=1, label="copy roof, same run"))
    axes.set(xscale="log", yscale="log", xlabel="bytes that one call must move", ylabel="GB/s of those bytes")
    axes.set_title(title, fontsize="medium")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize="small")
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(handles=handles, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def _bars(records: list[Record], metric: str, title: str, path: Path) -> None:
    plot = pyplot()
    keys = list(dict.fromkeys((r.op, r.case, r.dtype) for r in records))
    # Eager is the unit of the speed-up and has no bar there.
    names = dict.fromkeys(record.provider for record in records)
    providers = [name for name in names if metric != "speed-up" or name != "torch eager"]
    by_key = {record.key: record for record in records}
    figure, axes = plot.subplots(figsize=(9, 1.8 + 0.11 * len(keys) * (len(providers) + 1)))
    height = 0.8 / max(1, len(providers))
    for index, provider in enumerate(providers):
        found = {place: by_key[(*key, provider)] for place, key in enumerate(keys) if (*key, provider) in by_key}
        positions = [place + (index + 0.5) * height for place in found]
        values = [
            record.percent_of_roof if metric == "percent_of_roof" else record.ratios.get("torch eager", 1.0)
            for record in found.values()
        ]
        axes.barh(positions, values, height, label=provider, color=COLOURS[provider])
    labels = [f"{op} {case} {dtype}" for op, case, dtype in keys]
    axes.set_yticks([place + 0.4 for place in range(len(keys))], labels, fontsize="small")
    for place in range(1, len(keys)):
        if keys[place][0] != keys[place - 1][0]:
            axes.axhline(place - 0.1, color="black", linewidth=0.4)
    axes.invert_yaxis()
    axes.axvline(100 if metric == "percent_of_roof" else 1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.grid(True, axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("% of the roof" if metric == "percent_of_roof" else "median of torch eager / median")
    axes.set_title(title, fontsize="medium", pad=28)
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncol=max(1, len(providers)), frameon=False)
    _save(figure, path)
