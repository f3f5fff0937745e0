"""The model names what binds, the committed page is what the budget gives, and a measured figure stands beside its prediction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import budget
import model
import predict
import predicted_page
import pytest
from cards import CARDS
from command_line import suites
from report import write_json
from tiny import FACTS, record, results

ROOT = Path(__file__).resolve().parents[2]
BASELINE = budget.read()
# 268 MB read and written, nothing in the way.
ROW = budget.Row(
    *("cuda", "copy made_up bf16", "kernel", 16384, 256, 32, 0, 64, 1 << 24),
    **{
        "issue": 20,
        "mufu": 0,
        "double": 0,
        "lsu": 2,
        "shared": 0,
        "wavefronts": 8,
        "in_flight": 4,
        "waits": 1,
        "near_waits": 0,
    },
    **{"cycles": 100, "reads": {"0": 1 << 28}, "again": 0, "near_again": 0, "window": 0, "writes": 1 << 28},
)
FLOOR = (1 << 29, 0)


@pytest.fixture(scope="module")
def by_card():
    return predict.everywhere(BASELINE)


@pytest.mark.parametrize(
    ("changes", "card", "limit"),
    [
        ({}, "h200", "bytes"),
        ({"issue": 400}, "h200", "issue"),
        ({"mufu": 60}, "h200", "MUFU"),
        ({"double": 120}, "rtx4090", "fp64"),
        ({"wavefronts": 400}, "h200", "shared"),
        ({"wavefronts": 400, "lsu": 100}, "h200", "LSU"),
        ({"again": 1 << 31}, "h200", "L2"),
        ({"near_again": 1 << 31}, "h200", "L2"),
        ({"waits": 40, "warps": 8}, "h200", "latency"),
        ({"packs": 1 << 8, "blocks": 1, "reads": {}, "writes": 4096}, "h200", "launch"),
    ],
)
def test_what_binds_is_named(changes, card, limit) -> None:
    row, floor = ROW._replace(**changes), FLOOR if limit != "launch" else (4096, 0)
    plain, changed = model.predict([ROW], FLOOR, CARDS[card]), model.predict([row], floor, CARDS[card])
    assert changed.limit == limit
    assert plain.percent_of_roof == pytest.approx(97.5, abs=2.5)
    if limit not in ("bytes", "launch"):
        assert changed.time_us > 1.5 * plain.time_us


def test_a_second_launch_reads_from_the_second_cache() -> None:
    small = ROW._replace(reads={"0": 20 << 20}, writes=0)
    after = {left: model.memory_bytes(small, CARDS["h200"], [left]) for left in (20 << 20, 30 << 20)}
    assert after[20 << 20] == 0 < after[30 << 20]


def test_every_production_call_is_predicted_on_both_tiers(by_card) -> None:
    expected = {(suite.op, case.name) for suite in suites() for case in suite.cases if case.size != "small"}
    for found in by_card.values():
        tiers = {tier: {(one.op, one.case) for one in found if one.tier == tier} for tier in budget.TIERS}
        # The others are torch's own product, or refused.
        assert {case for case in expected - tiers["cuda"] if case[0] != "merge_lora"} == set()
        assert {case for case in expected - tiers["triton"] if case[0] != "merge_lora"} == set()
        assert all(0 < one.percent_of_roof <= one.best_percent + 1 <= 101 for one in found)


def test_a_wrong_card_is_answered_with_the_names(capsys) -> None:
    with pytest.raises(SystemExit):
        predict.main(["--card", "h300"])
    assert "--card must be one of h100, h200, b200, rtx4090, rtx5090, got 'h300'" in capsys.readouterr().err


def test_rows_are_written_as_json(tmp_path, capsys) -> None:
    assert predict.main(["--card", "RTX 4090", "--output-json", str(tmp_path / "new" / "rows.json")]) == 0
    assert "not measured" in capsys.readouterr().out
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert len(rows) > 80
    names = {
        "op",
        "case",
        "dtype",
        "tier",
        "percent_of_roof",
        "limit",
        "instructions_per_16_bytes",
        "time_us",
        "bytes",
        "roof",
    }
    assert all(names <= row.keys() and row["kind"] == "prediction" and row["card"] == "rtx4090" for row in rows)


def test_the_committed_page_is_what_the_budget_gives(by_card) -> None:
    expected = predicted_page.page(by_card, ROOT / "bench" / "results")
    assert (ROOT / "docs" / "predicted.md").read_text() == expected, "run python bench/predict.py --docs"
    assert "is a prediction" in expected
    # Every row below its target says why no kernel is above.
    assert "nothing else" not in expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"op": "merge_lora", "products_us": 20.0, "through": 3 << 20, "moved": 1 << 20},
            "10 us of bytes, 20 of products at best; tiles of 128 x 128 take 60 of L2, 7 of issue, 9 of latency; "
            "a cluster's 256 x 256, which no kernel here has, would take 40 us of it and reach 48 at most; the CUDA tier calls",
        ),
        (
            {"best_percent": 80.0},
            "too short: one launch reaches 80 at most; besides 1.0 us in which all blocks wait for one another, "
            "15.0 us of L2; two that need not wait reach 71 at most",
        ),
        (
            {"launches": 2, "launched_percent": 70.0, "limits": {"issue": 9.0, "launch": 2.0}, "time_us": 13.0},
            "before the first result; besides 1.0 us of issue (9.0) that bytes do not hide",
        ),
        (
            {"op": "group_norm_silu", "case": "ltx2_upsampler_post_720p_channels_last", "bytes": 2 * 943718400}
            | {"moved": 3 * 943718400 - 55_000_000},
            "of 944 MB between statistics and result the chip keeps 55. A group alone, 29 MB, lies in pieces of 32 bytes, "
            "one to 1024 of memory",
        ),
        ({}, "nothing else: issue"),
    ],
)
def test_what_keeps_a_call_below_its_target_is_said(changes, reason, by_card) -> None:
    one = next(one for one in by_card["h200"] if one.op == "combine_guidance")
    limits = {"L2": 60.0, "issue": 7.0, "latency": 9.0, "launch": 2.0, "barrier": 1.0, "waves": 0.0}
    plain = {
        "launches": 1,
        "best_percent": 95.0,
        "limit": "issue",
        "products_us": 0.0,
        "time_us": 28.0,
        "limits": limits,
    }
    one = dataclasses.replace(one, **{**plain, "bytes_us": 10.0, **changes})
    assert reason in predicted_page.why(one, 85, on_cuda=one.op != "merge_lora")


def test_blocks_that_all_wait_for_one_another_take_longer() -> None:
    waiting = ROW._replace(kernel=f"{model.WAITING[0]}ltxk::bf16, 8>")
    plain, longer = (model.predict([row], FLOOR, CARDS["h200"]) for row in (ROW, waiting))
    assert longer.time_us == pytest.approx(plain.time_us + 1.24, abs=0.02)


def test_a_measured_figure_stands_beside_its_prediction(tmp_path, by_card) -> None:
    one = next(one for one in by_card["h200"] if one.tier == "triton")
    row = dataclasses.replace(
        record("ltxkern triton", 40.0, percent_of_roof=61.7), op=one.op, case=one.case, dtype=one.dtype
    )
    measured = results(row)
    write_json(dataclasses.replace(measured, machine={**FACTS, "gpu": "NVIDIA H200"}), tmp_path / "m.json")
    (tmp_path / "m-proof.json").write_text('{"stage": "proof", "outcomes": []}')
    lines = [line for line in predicted_page.page(by_card, tmp_path).splitlines() if "H200: 62" in line]
    assert len(lines) == 1
    assert f"| {one.case} " in lines[0]
