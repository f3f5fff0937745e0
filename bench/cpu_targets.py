"""The speed-ups that the CPU kernels owe torch on two cores with AVX-512, measured in one process: `python bench/cpu_targets.py`.

Ratios of the best call of either side over interleaved rounds. Runs on a warm allocator, or on glibc's default one with
--default-allocator. The rows go to --output-json; exit status 1 after a wrong result or a target that is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cases import CASE_SETS
from command_line import finish, parser, relaunch_warm, start_run, suites
from compare import relative_spread
from harness import Run, run_suite
from report import Record, duration, lines_of, markdown_table

OURS, EAGER, COMPILE = "ltxkern cpu", "torch eager", "torch.compile"
PUBLISHED, PUBLISHED_ITERATED, ADDMM = "published order", "published order, 100 iterations", "torch addmm_"


@dataclass(frozen=True)
class Target:
    """How many times faster than a baseline the CPU kernel should be on one case; 1: not slower."""

    op: str
    case: str
    dtype: str
    baseline: str
    ratio: float


TARGETS = (
    Target("group_norm_silu", "ltx2_upsampler_small_out", "fp32", EAGER, 2.3),
    Target("group_norm_silu", "ltx2_upsampler_small_out", "fp32", COMPILE, 1.5),
    Target("group_norm_silu", "ltx2_upsampler_small", "fp32", COMPILE, 1.0),
    Target("group_norm_silu", "ltx2_upsampler_small_out", "bf16", EAGER, 2.0),
    Target("group_norm_silu", "ltx2_upsampler_small_out", "bf16", COMPILE, 1.8),
    Target("group_norm_silu", "ltx2_upsampler_small", "bf16", COMPILE, 1.0),
    Target("res2s", "stage1_step_raw_noise_out", "fp64", PUBLISHED_ITERATED, 40.0),
    Target("res2s", "stage1_step_raw_noise_out", "fp64", PUBLISHED, 8.0),
    Target("normalize_noise", "stage1_video_normalize", "fp64", EAGER, 2.0),
    Target("merge_lora", "video_attn_r384", "bf16", ADDMM, 1.0),
    Target("merge_lora", "video_attn_r384_reference", "bf16", EAGER, 1.0),
)


def measure(run: Run, targets: Sequence[Target]) -> None:
    """Every op's cases in turn, in the dtypes of its targets."""
    by_op = {suite.op: suite for suite in suites()}
    for op, dtype in dict.fromkeys((target.op, target.dtype) for target in targets):
        cases = dict.fromkeys(target.case for target in targets if (target.op, target.dtype) == (op, dtype))
        run.dtypes = (dtype,)
        run_suite(run, by_op[op], ",".join(cases))


def rows_of(targets: Sequence[Target], records: Sequence[Record]) -> tuple[list[list[str]], int]:
    """The table, and how many targets are missed or were not measured."""
    by_key = {record.key: record for record in records}
    rows, missed = [], 0
    for target in targets:
        keys = [(target.op, target.case, target.dtype, provider) for provider in (OURS, target.baseline)]
        ours, baseline = (by_key.get(key) for key in keys)
        start = [target.op, target.case, target.dtype, target.baseline, f"{target.ratio:g}x"]
        if ours is None or baseline is None:
            missed += 1
            rows.append([*start, "-", "-", "-", "not measured"])
            continue
        ratio = baseline.min_us / ours.min_us
        spread = relative_spread(ours) + relative_spread(baseline)
        verdict = "met" if ratio >= target.ratio else "missed"
        if target.ratio == 1 and 1 - spread <= ratio < 1:
            # The same matrix product on either side: the faster of two runs is chance.
            verdict = f"a tie: the rounds vary by {100 * spread:.0f} %"
        missed += verdict == "missed"
        rows.append([*start, duration(ours.min_us), duration(baseline.min_us), f"{ratio:.2f}x", verdict])
    return rows, missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser("The CPU kernels' targets against torch.")
    options.set_defaults(device="cpu", backends=f"{EAGER},{COMPILE},cpu", rounds=5)
    parsed = options.parse_args(arguments)
    if parsed.cases not in CASE_SETS or parsed.dtypes:
        options.error("--cases and --dtypes: the targets name both; measure others with bench_<op>.py")
    relaunch_warm(parsed)
    run = start_run(parsed)
    run.backends = None if run.backends is None else (*run.backends, *{t.baseline for t in TARGETS} - {EAGER, COMPILE})
    measure(run, TARGETS)
    rows, missed = rows_of(TARGETS, run.records)
    header = ("op", "case", "dtype", "baseline", "target", "ltxkern", "baseline", "ratio", "")
    return finish(run, parsed, "\n".join([*lines_of(run.results()), "", markdown_table(header, rows)])) or int(
        missed > 0
    )


if __name__ == "__main__":
    sys.exit(main())
