"""Writes the table of what each backend serves into README.md: `python docs/tables.py`; with --check it only compares.

The ops' own declarations are asked about CPU tensors that say they lie on a GPU: no GPU is needed and nothing runs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ltxkern.dispatch import Op  # noqa: E402
from ltxkern.trust.permitted import BACKENDS  # noqa: E402
from ltxkern.verify.cases import MAIN, OpCase  # noqa: E402

BEGIN, END = "<!-- backends: begin, written by docs/tables.py -->", "<!-- backends: end -->"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
ON_GPU = ("cuda", "nvrtc", "triton")


@dataclass(frozen=True)
class Asked(Exception):  # noqa: N818 - no error: it carries what a public function hands to its op
    """The op that a call reached, and the arguments that it reached it with."""

    op: Op
    given: Any


@dataclass(frozen=True)
class Row:
    """One op in one layout: for each backend the reason of each dtype, None where it is served."""

    op: str
    layout: str
    reasons: dict[str, dict[str, str | None]]


def dense(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Without gaps, the last dim innermost."""
    return torch.empty(*shape, dtype=dtype)


def channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Without gaps, the channels innermost."""
    tensor = dense(shape, dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def strided(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Every second element of a wider tensor."""
    return dense((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]


LAYOUTS = {"contiguous": dense, "channels-last": channels_last, "strided": strided}
# Beyond the small cases of the tests: what bounds a kernel.
BOUNDS = {
    "more than 1024 channels": OpCase("pixel_norm_silu", "x: B 1025 T; weight: 1025"),
    "rows wider than 16384": OpCase("rms_norm_modulate", "x scale: B T 2049W; shift: B 1 2049W"),
    "rounding=reference": OpCase(
        "merge_lora_", "weight: T W; lora_a: 2 W; lora_b: T 2", others={"rounding": "reference"}
    ),
}


def reached(case: OpCase, layout: str, dtype: torch.dtype) -> Asked | None:
    """Op and arguments of a call, or None where the public function takes no such dtype."""

    def recorded(op: Op, args: Any, out: Any = None) -> None:
        raise Asked(op, args)

    def each(op: Op, calls: Sequence[Any], check_memory: object) -> None:
        raise Asked(op, calls[0])

    tensors = {name: LAYOUTS[layout](value.shape, value.dtype) for name, value in case.tensors(dtype).items()}
    with mock.patch.object(Op, "__call__", recorded), mock.patch.object(Op, "run_each", each):
        try:
            case.run(tensors)
        except Asked as asked:
            return asked
        except TypeError as error:
            if str(dtype) not in str(error):
                raise
            return None
    raise AssertionError(f"{case} reached no op")


def refusal(asked: Asked, backend: str) -> str | None:
    """Why a backend declines, in its own words, were its device there."""
    if backend == "torch":
        return None
    if (declared := asked.op._backends.get(backend)) is None:
        return f"{asked.op.name} has no {backend} kernel"
    with mock.patch.object(Tensor, "is_cuda", backend in ON_GPU, create=True):
        return declared.refuse(asked.given)


def rows_of(case: OpCase, name: str = "") -> Iterator[Row]:
    """One row for every layout that the call can have."""
    for layout in ["contiguous"] if name else LAYOUTS:
        if layout == "channels-last" and not case.op.endswith("norm_silu"):
            continue
        asked = {label: reached(case, layout, dtype) for label, dtype in DTYPES.items()}
        taken = {label: found for label, found in asked.items() if found is not None}
        yield Row(
            case.op,
            name or layout,
            {backend: {label: refusal(found, backend) for label, found in taken.items()} for backend in BACKENDS},
        )


def shortened(reason: str) -> str:
    """A reason without the strides of the tensor that happened to be asked about."""
    return re.sub(r"^.* has strides \([\d, ]*\): ", "", reason)


def cell(rows: Sequence[Row], backend: str, notes: list[str]) -> str:
    """What a backend serves of one op: "yes", or what it does not, with numbers of notes."""
    refused: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for dtype, reason in row.reasons[backend].items():
            if reason is not None:
                refused.setdefault(shortened(reason), []).append((row.layout, dtype))
    if not refused:
        return "yes"
    parts = []
    for reason, cases in refused.items():
        if reason not in notes:
            notes.append(reason)
        layouts, dtypes = dict.fromkeys(layout for layout, _ in cases), dict.fromkeys(dtype for _, dtype in cases)
        everywhere = len(layouts) == len([row for row in rows if row.layout in LAYOUTS])
        parts.append(f"not {', '.join(dtypes if everywhere else layouts)} [{notes.index(reason) + 1}]")
    return "; ".join(parts)


def table() -> str:
    """The table in Markdown, with its notes."""
    lines = [
        "| op | dtypes | layouts | " + " | ".join(BACKENDS) + " |",
        "|---" * (3 + len(BACKENDS)) + "|",
    ]
    notes: list[str] = []
    for case in MAIN:
        rows = list(rows_of(case))
        layouts = ", ".join(row.layout for row in rows)
        for bound, bounded in BOUNDS.items():
            rows += rows_of(bounded, bound) if bounded.op == case.op else []
        dtypes = " ".join(rows[0].reasons["torch"])
        cells = " | ".join(cell(rows, backend, notes) for backend in BACKENDS)
        lines.append(f"| `{case.op}` | {dtypes} | {layouts} | {cells} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write README.md anew, or only compare; 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where README.md is out of date"
    )
    only_check = parser.parse_args(arguments).check
    hopper = mock.Mock(multi_processor_count=132, shared_memory_per_block_optin=232448)
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=hopper),
        mock.patch("ltxkern.compiled.extension.unserved", return_value=None),
    ):
        written = table()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    new = f"{before}{BEGIN}\n{written}\n{END}{after}"
    if only_check:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
