"""A suite of one tiny case, a run and results on a machine of no name, for the tests of the harness and of its commands."""

import torch
from cases import Call, Case, Suite
from harness import Run
from report import Record, Results
from timing import Settings

CPU = torch.device("cpu")
BRIEF = Settings(rounds=2, warmup_ms=0.01, rep_ms=0.01)
FACTS = {
    "cpu": "Test CPU", "threads": 2, "ltxkern": "0", "revision": "abc123", "torch": "t", "triton": None, "python": "p",
    "backends": ["torch"], "date": "2000-01-01 00:00 UTC", "command": "python bench/run_all.py", "load_at_start": 0.1,
    "allocator": "1",
}  # fmt: skip


def tiny_suite(op, composition=lambda x, y, g: x + y * g, **more):
    """gated_residual by `op`; `more` goes to its calls."""

    def prepare(case, dtype, device, generator):
        x = torch.randn(case.shape, generator=generator).to(dtype)
        args = (x, x + 1, torch.ones(1, 1, case.shape[-1], dtype=dtype))
        return Call(args, op=op, composition=composition, **more)

    return Suite("gated_residual", (Case("tiny", (2, 3, 8), "small"), Case("huge", (1, 1 << 45), "large")), prepare)


def run_for(*backends, **more):
    """A run of these providers alone."""
    wanted = backends or ("torch eager", "torch")
    return Run(**{"device": CPU, "settings": BRIEF, "threads": 1, "backends": wanted, "facts": dict(FACTS)} | more)


def record(provider, median, **changes):
    """A row of a tiny group_norm_silu."""
    times = dict.fromkeys(("median_us", "min_us", "p20_us", "p80_us"), median)
    fields = {"buffers": 2, "bytes": 1000, "gb_per_s": 1.0, "floor_us": 10.0, "percent_of_roof": 1000.0 / median}
    return Record("group_norm_silu", "tiny", [1, 2], "bf16", provider, samples=5, **times | fields | changes)


def results(*records):
    """Of one run."""
    return Results(dict(FACTS), {"copy": 1e9}, {}, list(records))
