"""Counts of one transformer block: what is a launch and what it moves; ours at both stages, which may only fall, and diffusers'."""

import json
from collections import Counter
from dataclasses import replace

import bench_dit
import dit_count
import pytest
import torch
from quoted import RESULTS
from report import read_json

import ltxkern
from ltxkern.pipeline.model.fusions import use_side_by_side
from ltxkern.pipeline.model.transformer import predict_velocity, predict_velocity_batched

TOKENS, WIDTH = 64, dit_count.WIDTH
UNIT = TOKENS * WIDTH * 2


class Block(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self):
        return self.function()


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def count(function):
    block = Block(function)
    return dit_count.count_block(block, block, TOKENS)


X, ROW, WEIGHT = meta(1, TOKENS, WIDTH), meta(1, 1, WIDTH), meta(WIDTH, WIDTH)
ROW_BYTES = WIDTH * 2
HEADS = X.unflatten(2, (32, 128)).transpose(1, 2)


def test_a_forward_is_predicted_from_flops_bytes_and_small_launches():
    def block():
        torch.nn.functional.linear(X, WEIGHT, ROW[0, 0])
        torch.nn.functional.scaled_dot_product_attention(HEADS, HEADS, HEADS)
        return [X + X, ROW + ROW, X.float()]

    found = count(block)
    rates = dit_count.Rates(products=2.0, attention=4.0, bytes=8.0, launch=3.0)
    products, attention = 2 * TOKENS * WIDTH * WIDTH, 4 * TOKENS * TOKENS * WIDTH
    assert found.predicted(rates) == (48 * (products / 2 + attention / 4), 48 * (5 * UNIT / 8 + 3))
    assert found.wide_passes == 1


@pytest.mark.parametrize(
    ("function", "launches", "moved"),
    [
        (lambda: X + X, 1, 2 * UNIT),  # one tensor, read once
        (lambda: X + meta(1, TOKENS, WIDTH), 1, 3 * UNIT),
        (lambda: X * ROW, 1, 2 * UNIT + ROW_BYTES),
        (lambda: X * ROW.expand(1, TOKENS, WIDTH), 1, 2 * UNIT + ROW_BYTES),
        (lambda: X.view(TOKENS, WIDTH).t()[:5].detach().unflatten(0, (5, 1)), 0, 0),
        (lambda: X.mul_(2), 1, 2 * UNIT),
        (lambda: X.copy_(ROW.expand_as(X)), 1, UNIT + ROW_BYTES),
        (lambda: X.float(), 1, 3 * UNIT),
        (lambda: X.new_zeros(1, TOKENS, WIDTH), 1, UNIT),
        (lambda: X.new_empty(1, TOKENS, WIDTH), 0, 0),
        (lambda: torch.nn.functional.linear(X, WEIGHT, ROW[0, 0]), 1, 0),
        (lambda: torch.nn.functional.scaled_dot_product_attention(HEADS, value=HEADS, key=HEADS), 1, 0),
        (lambda: torch.nn.functional.rms_norm(X, (WIDTH,), ROW[0, 0]), 1, 2 * UNIT + ROW_BYTES),
        (lambda: ltxkern.gated_residual(X, meta(1, TOKENS, WIDTH), ROW), 1, 3 * UNIT + ROW_BYTES),
        (lambda: ltxkern.rms_norm_modulate(X, ROW, ROW), 1, 2 * UNIT + ROW_BYTES),
        (lambda: ltxkern.rms_norm_modulate(X, ROW, ROW, out=X), 1, 2 * UNIT + ROW_BYTES),
        (lambda: [X + X, X * 2], 2, 4 * UNIT),
    ],
)
def test_a_launch_moves_what_its_kernel_has_to(function, launches, moved):
    found = count(function)
    assert (len(found.launches), found.elementwise_bytes) == (launches, moved)
    assert found.video_tensors == moved / UNIT
    assert found.video_passes == (launches if moved else 0)


def test_small_tensors_make_no_passes():
    rows = (TOKENS // 2, TOKENS // 4, TOKENS // 4 - 1, TOKENS // 8)  # a quarter is video-sized, one row less is not
    found = count(lambda: [ROW + ROW, *(meta(1, each, WIDTH) * 2 for each in rows)])
    assert found.elementwise_bytes == 2 * ROW_BYTES + 2 * sum(rows) * ROW_BYTES
    assert (found.video_passes, found.video_tensors) == (2, 1.5)
    assert [one[1:] for one in found.sites()] == [(2, 1.5)]


def test_nothing_stays_where_the_forward_fails():
    block = Block(lambda: X + meta(1, 2, 3))
    with pytest.raises(RuntimeError):
        dit_count.count_block(block, block, TOKENS)
    assert "forward" not in vars(block)
    assert torch._C._len_torch_dispatch_stack() == 0


# What one block launches and moves, and what diffusers' own does once patched; a change that saves some lowers these.
MOST = {
    "ltxkern": {"video_passes": 11, "video_tensors": 30.1, "launches": 68, "peak_tensors": 7.0},
    "patch": {"video_passes": 12, "video_tensors": 35.1, "launches": 82, "peak_tensors": 9.1},
}
MOST_BYTES = {"stage1": 2_103_675_536, "stage2": 8_125_326_904}


def test_one_block_at_both_stages(tmp_path, capsys):
    path = tmp_path / "new" / "count.json"
    assert bench_dit.main(["--count", "--output-json", str(path)]) == 0
    written = json.loads(path.read_text())
    rows = {(row["shape"], row["provider"]): row for row in written["rows"]}
    assert sorted(rows) == [(shape, name) for shape in ("stage1", "stage2") for name in ("diffusers", *MOST)]
    assert "(T, 4096) bf16 tensor" in written["definition"]
    for shape in ("stage1", "stage2"):
        ours, theirs = rows[shape, "ltxkern"], rows[shape, "diffusers"]
        for provider, each in MOST.items():
            row = rows[shape, provider]
            for name, most in each.items():
                assert row[name] <= most, (shape, provider, name)
            assert row["video_passes"] <= 17
            assert row["wide_passes"] == 0 < theirs["wide_passes"]
            assert row["beyond_percent"] <= {"stage1": 10, "stage2": 5}[shape]
            assert row["launches"] <= 0.4 * theirs["launches"]
            assert sum(one["video_tensors"] for one in row["sites"]) == pytest.approx(row["video_tensors"], abs=0.2)
        assert ours["elementwise_bytes"] <= MOST_BYTES[shape]
        assert ours["video_tensors"] <= 0.14 * theirs["video_tensors"]
        assert ours["elementwise_bytes"] <= 0.14 * theirs["elementwise_bytes"]
    out = capsys.readouterr().out
    assert all(out.count(f" {provider} ") == 2 for provider in MOST)
    assert "passes" in out


MEASURED = {part: read_json(RESULTS / f"nvidia-h200-df8da9e3f6-{part}.json") for part in ("attention", "block")}


def of_stage(name):
    """The count of a middle block of ours."""
    case = next(case for case in bench_dit.CASES if case.name == name)
    ours = torch.nn.Module.to(bench_dit.without_data(case, 3)[0], dtype=torch.bfloat16).eval()
    inputs, block = bench_dit.inputs_of(case, ours, torch.bfloat16, torch.device("meta")), ours.transformer_blocks[1]
    return dit_count.count_block(block, lambda: predict_velocity(ours, inputs.video, inputs.audio), case.numel)


def test_the_rates_are_those_of_the_results_files():
    rates, attention = dit_count.H200, MEASURED["attention"]
    (cudnn,) = (row for row in attention.records if (row.case, row.provider) == ("32640x32640", "cudnn"))
    assert rates.attention == pytest.approx(cudnn.flops / cudnn.median_us * 1e6, rel=1e-3)
    assert rates.products == pytest.approx(attention.roofs["gemm bf16"], rel=1e-3)
    assert rates.bytes == pytest.approx(0.88 * attention.roofs["copy"], rel=1e-3)


@pytest.mark.parametrize(("stage", "most"), [("stage1", 10), ("stage2", 5)])
def test_the_limits_hold_at_the_rates_of_a_single_block(stage, most):
    """Above them: products and attention were quicker than in long runs, so that all else is a larger part."""
    found, rates = of_stage(stage), dit_count.H200._replace(products=790e12, attention=657e12)
    within, beyond = found.predicted(rates)
    assert 100 * beyond / within <= most


ELEMENTWISE = (
    "rms_norm_modulate_packs",
    "qk_norm_rope_packs",
    "_gate_kernel",
    "gated_residual_packs",
    "aten::_fused_rms_norm",
)


def test_a_measured_block_is_what_the_count_predicts():
    rows = {row.provider: row.median_us / 1e6 for row in MEASURED["block"].records}
    attention = rows["aten::_cudnn_attention_forward"]
    products = rows["aten::addmm"] + rows["aten::_addmm_activation"]
    passes = sum(seconds for name, seconds in rows.items() if any(kernel in name for kernel in ELEMENTWISE))
    as_quoted = [27.7, 22.95, 2.17]  # by docs/run.md
    assert [round(1e3 * each, 2) for each in (attention, products, passes)] == as_quoted
    assert 100 * passes / (attention + products) <= 5
    within, beyond = (each / dit_count.BLOCKS for each in of_stage("stage2").predicted(dit_count.H200))
    assert passes == pytest.approx(beyond, rel=0.05)
    assert rows["one block"] == pytest.approx(within + beyond, rel=0.02)


def test_launches_of_sound_beside_video(monkeypatch):
    """As docs/run.md has them: self-attention with that to the text, then feed-forward; each a launch or its FLOP at least."""
    parts = ["rest"]

    def beside(sound, video):
        parts.append("sound")
        sound()
        parts.append("rest")
        video()

    monkeypatch.setattr(dit_count, "_site", lambda: f"{parts[-1]} {len(parts)}")
    with use_side_by_side(beside):
        found = of_stage("stage2").launches
    sound = [one for one in found if one.site.startswith("sound")]
    assert sorted(Counter(one.site for one in sound).values()) == [4, 21]
    assert len(found) == 68
    rates = dit_count.H200
    seconds = sum(max(rates.launch, one.flops / rates.products) for one in sound)
    assert round(1e3 * dit_count.BLOCKS * seconds, 1) == 4.3


ISOLATED = {"disable_a2v_cross_attn": True, "disable_v2a_cross_attn": True}
LEFT_OUT = {"skip_video_self_attn_blocks": [1]}
# By what a forward of branches is like, per stage-2 block: how it masks the video, its branches, how many go in a batch, and the
# most passes and tensors (of a branch) of it.
BRANCHES = {
    "mask with levels": ("levels", [{}], 1, 11, 30.1),
    # Every token has modulations of its own, which each block makes: 28 tensors of them are written and read.
    "mask without levels": ("mask", [{}], 1, 17, 72.1),
    "guided, one after another": ("", [{}, LEFT_OUT, ISOLATED], 1, 28, 26.1),
    # What is left out costs its own branch a pass.
    "guided, in a batch": ("", [{}, LEFT_OUT, ISOLATED], 3, 13, 31.1),
    "two texts in a batch": ("", [{}, {}], 2, 11, 30.1),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_passes_of_masks_and_branches(name):
    mask, flags, most, passes, tensors = BRANCHES[name]
    case = next(case for case in bench_dit.CASES if case.name == "stage2")
    ours, _ = bench_dit.without_data(case, 3)
    ours = torch.nn.Module.to(ours, dtype=torch.bfloat16).eval()
    inputs = bench_dit.inputs_of(case, ours, torch.bfloat16, torch.device("meta"))
    video = inputs.video
    if mask:
        each = meta(1, case.numel, 1, dtype=torch.float32)
        video = replace(video, mask=each, levels=(0.0, 1.0) if mask == "levels" else None)
    branches = [{"video": video, "audio": inputs.audio} | flag for flag in flags]
    found = dit_count.count_block(
        ours.transformer_blocks[1], lambda: predict_velocity_batched(ours, branches, most=most), case.numel
    )
    assert found.video_passes <= passes
    assert found.video_tensors / len(branches) <= tensors
    assert found.wide_passes == 0


@pytest.mark.parametrize(
    ("case", "dtype", "device"), [("stage2", torch.bfloat16, "meta"), ("small", torch.float32, "cpu")]
)
def test_a_block_holds_less_memory_than_that_of_diffusers(case, dtype, device):
    """In diffusers' leanest form, one timestep for all tokens; on a CPU with what our passes are there."""
    case = next(each for each in bench_dit.CASES if each.name == case)
    if device == "meta":
        ours, theirs = (torch.nn.Module.to(model, dtype=dtype).eval() for model in bench_dit.without_data(case, 3))
    else:
        ours, theirs = bench_dit.build(case, 3, dtype, torch.device(device))
    inputs = bench_dit.inputs_of(case, ours, dtype, torch.device(device))

    def peak(model, call):
        return dit_count.count_block(model.transformer_blocks[1], call, case.numel).peak_bytes

    held = peak(ours, lambda: bench_dit.predict_velocity(ours, inputs.video, inputs.audio))
    by_row, by_token = (
        peak(theirs, bench_dit.diffusers_forward(theirs, inputs, by_token=each)) for each in (False, True)
    )
    assert 0 < held < 0.55 * by_row < 0.55 * by_token


def test_the_peak_counts_what_is_held_at_one_time():
    def block():
        kept = (X + X)[0]
        for _ in range(3):
            kept = kept[:5] * 2  # the one before is held by a view until then
        return kept.add_(1)

    assert count(block).peak_bytes == UNIT + UNIT * 5 // TOKENS
