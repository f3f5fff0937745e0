"""Predicts the time of every production call on a named card from the static budget; nothing is measured, and no GPU is needed.

`python bench/predict.py --card h200 [--output-json F]` prints a table, `--docs` writes docs/predicted.md and its picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import budget
import library_product
import predicted_page
from cards import CARDS, Card, card_named
from command_line import suites
from model import Prediction, predict
from report import markdown_table, write_whole

ROOT = Path(__file__).resolve().parent.parent


def predictions(card: Card, baseline: budget.Baseline) -> list[Prediction]:
    """Every production call on a card, on each tier that has kernels for it; in the dtypes that the ops run in."""
    calls: dict[tuple[str, str], list[budget.Row]] = {}
    for row in baseline.rows[card.architecture]:
        calls.setdefault((row.case, row.tier), []).append(row)
    dtypes = {suite.op: suite.dtypes for suite in suites()}
    both = {case for case, tier in calls if tier == "triton"} | {case for case, _ in calls if _own(case, dtypes)}
    found = [predict(rows, baseline.floors[case], card) for (case, _), rows in calls.items() if case in both]
    found += library_product.predictions(card, baseline.floors)
    return sorted(found, key=lambda one: (one.op, one.case, one.dtype, one.tier))


def everywhere(baseline: budget.Baseline) -> dict[str, list[Prediction]]:
    """By card, for all whose architecture the budget has."""
    return {card.name: predictions(card, baseline) for card in CARDS.values() if card.architecture in baseline.rows}


def _own(case: str, dtypes: Mapping[str, Sequence[str]]) -> bool:
    """Whether it is in a dtype that its op runs in; the budget has others for the counts alone."""
    op, _, dtype = case.split(" ")
    return dtype in dtypes[op]


def table(found: Sequence[Prediction]) -> str:
    """As the command prints it."""
    header = ("op", "case", "dtype", "tier", "predicted", "% roof", "at best", "limit", "instr / 16 B", "moved / least")
    lines = [
        [
            *(one.op, one.case, one.dtype, one.tier, f"{one.time_us:.1f} us", f"{one.percent_of_roof:.0f}"),
            *(
                f"{one.best_percent:.0f}",
                one.limit,
                predicted_page.number(one.instructions_per_16_bytes, ".0f"),
                f"{one.moved / one.bytes:.2f}",
            ),
        ]
        for one in found
    ]
    return markdown_table(header, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python bench/predict.py`."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--card", help=f"one of {', '.join(CARDS)}")
    options.add_argument("--output-json", type=Path)
    options.add_argument("--docs", action="store_true", help="write docs/predicted.md and docs/predicted.png")
    parsed = options.parse_args(arguments)
    baseline = budget.read()
    if parsed.docs:
        by_card = everywhere(baseline)
        try:
            predicted_page.write(ROOT / "docs", by_card, ROOT / "bench" / "results")
        except ValueError as error:
            options.error(str(error))
        return 0
    if parsed.card is None:
        options.error(f"--card must be one of {', '.join(CARDS)}")
    try:
        card = card_named(parsed.card)
    except ValueError as error:
        options.error(str(error))
    found = predictions(card, baseline)
    print(
        f"Predicted for {card.title}, not measured; copy roof taken as {card.roof / 1e12:.2f} TB/s.\n\n{table(found)}"
    )
    if parsed.output_json is not None:
        write_whole([{**asdict(one), "kind": "prediction"} for one in found], parsed.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
