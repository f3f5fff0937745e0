"""Writes what each op brings into the pages of docs/stacks: `python docs/stacks.py`; with --check it only compares.

Bytes are counted by bench/dit_count.py at one shape of the op's benchmark: of the composition that models run, and of the op. The
ratio is that of the op's median over the composition's in a committed measurement on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import dit_count  # noqa: E402

MEASURED = ROOT / "bench" / "results" / "cpu-amd-epyc-2t-fed3dcc9d0.json"
BEGIN, END = "<!-- ops: {}; written by docs/stacks.py -->", "<!-- ops: end -->"
BLOCK = re.compile(r"<!-- ops: ([\w ]+); written by docs/stacks\.py -->\n.*?<!-- ops: end -->", re.DOTALL)


class Shown(NamedTuple):
    """An op at a case of its benchmark, and what it takes the place of."""

    suite: str
    case: str
    replaces: str


OPS = {
    "group_norm_silu": Shown("group_norm_silu", "ltx23_upsampler_low", "GroupNorm, SiLU"),
    "pixel_norm_silu": Shown("pixel_norm_silu", "vae_tile_512", "RMS or PixelNorm over channels, SiLU"),
    "rms_norm_modulate": Shown("rms_norm_modulate", "video_1k_tokens", "RMSNorm, scale and shift"),
    "gated_residual_rms_norm_modulate": Shown(
        "rms_norm_modulate", "video_1k_tokens_gated", "gated residual, RMSNorm, scale and shift"
    ),
    "gated_residual": Shown("gated_residual", "video_1k_tokens", "gated residual"),
    "head_gate": Shown("gated_residual", "video_1k_tokens_head_gate", "gate of each attention head"),
    "qk_norm_rope": Shown("qk_norm_rope", "video_1k_tokens", "RMSNorm and rotation of queries and keys"),
    "res2s_midpoint": Shown("res2s", "stage1_midpoint", "first half of a sampler step"),
    "res2s_advance": Shown("res2s", "stage1_advance", "second half of a sampler step"),
}


class Called(torch.nn.Module):
    """A function as a module, for the counter."""

    def __init__(self, function: Any, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.function, self.args = function, args

    def forward(self) -> Any:
        return self.function(*self.args)


def moved(function: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the launches of one call."""
    module = Called(function, args)
    return dit_count.count_block(module, module, 1).elementwise_bytes


def row(op: str, records: list[dict[str, Any]]) -> str:
    """A line of the table."""
    shown = OPS[op]
    suite = importlib.import_module(f"bench_{shown.suite}").SUITE
    (case,) = [case for case in suite.cases if case.name == shown.case]
    call = suite.prepare(case, torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(0))
    before, after = (moved(function, call.args) for function in (call.composition, call.op))
    name = shown.suite, shown.case, "ltxkern cpu"
    (measured,) = [one for one in records if (one["op"], one["case"], one["provider"]) == name]
    shape = " x ".join(map(str, case.shape))
    source = f"{MEASURED.name}#{shown.suite}.{shown.case}.{measured['dtype']}/ltxkern cpu/ratio:torch eager"
    speed = f"{measured['ratios']['torch eager']:.1f}x <!-- result: {source} -->"
    return f"| `{op}` | {shown.replaces} | {shape} | {before / 1e6:.1f} MB | {after / 1e6:.1f} MB | {speed} |"


def tables(text: str, rows: dict[str, str]) -> str:
    """A page with its table written anew."""
    head = "| op | in the place of | shape, bf16 | moved before | moved by the op | speed on a CPU |\n|---|---|---|---|---|---|"

    def written(match: re.Match[str]) -> str:
        lines = "\n".join(rows[op] for op in match[1].split())
        return f"{BEGIN.format(match[1])}\n{head}\n{lines}\n{END}"

    return BLOCK.sub(written, text)


def main(given: list[str] | None = None) -> str | None:
    """Write the pages, or compare them and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    check = parser.parse_args(given).check
    torch.set_num_threads(1)
    records = json.loads(MEASURED.read_text())["records"]
    with torch.no_grad():
        rows = {op: row(op, records) for op in OPS}
    stale = []
    for page in [*sorted((ROOT / "docs" / "stacks").glob("*.md")), ROOT / "integrations" / "comfyui" / "README.md"]:
        text = page.read_text()
        if (new := tables(text, rows)) != text:
            stale.append(page.name)
            if not check:
                page.write_text(new)
    return f"out of date: {', '.join(stale)}: python docs/stacks.py" if check and stale else None


if __name__ == "__main__":
    sys.exit(main())
