"""`ltxkern lora FILE`: what a LoRA file is: layout, rank, alpha, modules, what it was trained on, whether it fits."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltxkern.pipeline.files.lora_file import LoRAFile
    from ltxkern.pipeline.files.lora_kinds import Change

_TRAINED_ON = re.compile(
    r"base_?model|architecture|model_?version|sd_model|trigger|title|dataset|resolution", re.IGNORECASE
)
_SHOWN, _LISTED = 120, 40
KINDS = {
    "LoRAFactors": "low-rank",
    "HadamardProduct": "Hadamard product (LoHa)",
    "KroneckerProduct": "Kronecker product (LoKr)",
    "Difference": "plain difference",
    "ScaledDifference": "bias of a LoRA",
    "Decomposed": "weight decomposition (DoRA)",
    "Sum": "sum of two",
}


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "lora",
        help="tell what a LoRA file is, and whether it fits",
        description="Layout, rank, alpha, modules and training of a LoRA file, from its header; status 2 where it does not fit.",
    )
    parser.add_argument(
        "file", nargs="?", help="a .safetensors file, a folder with one, or owner/name[/file] of the hub"
    )
    parser.add_argument(
        "--model", help="file, folder or hub id (downloaded) to fit it to (default: the published LTX-2.3 transformer)"
    )
    parser.add_argument("--layouts", action="store_true", help="list the layouts that are known by name")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the description; status 2 where the file does not fit."""
    from ltxkern.pipeline.files.lora_file import describe_lora_file
    from ltxkern.pipeline.files.lora_kinds import misfits
    from ltxkern.pipeline.files.lora_layout import LAYOUTS, parameter_shapes, published_shapes

    if arguments.layouts:
        for layout in LAYOUTS:
            key = layout.module.format(f"<{layout.names} module>")
            print(f"{key}{layout.a}, {layout.b}{f', {layout.alpha}' if layout.alpha else ''}: {layout.writer}")
        return 0
    if arguments.file is None:
        raise ValueError("file: expected a LoRA file, or --layouts")
    shapes = published_shapes()
    if arguments.model:
        from ltxkern.pipeline.files.found import FoundModel

        shapes = parameter_shapes(FoundModel.of(arguments.model).transformer_shapes)
    found = describe_lora_file(arguments.file, transformer=shapes)
    changes = found.changes()
    print("\n".join(describe(found, changes)))
    problems = misfits(changes, shapes)
    print(f"fits {arguments.model or 'LTX-2.3'}: {'; '.join(['no', *problems]) if problems else 'yes'}")
    return 2 if problems else 0


def describe(found: LoRAFile, changes: dict[str, Change]) -> list[str]:
    """One line for each thing that a header tells."""
    from ltxkern.pipeline.files.lora_kinds import Decomposed, Sum
    from ltxkern.pipeline.files.lora_layout import layouts_of

    parts = [part for change in changes.values() for part in (change.changes if isinstance(change, Sum) else (change,))]
    inner = [part.inner if isinstance(part, Decomposed) else part for part in parts]
    example = next(iter(next(iter(found.targets.values())).values())).tensor.key
    writers = [layout.writer for layout in layouts_of(found.written, found.header.tensors)]
    alphas = ("none" if change.alpha is None else f"{change.alpha:g}" for change in inner)
    told = list(dict.fromkeys(statement.where for statement in found.said))
    if any("alpha" in parts for parts in found.targets.values()):
        told.insert(0, "its tensors")
    modules = (re.sub(r"[.]\d+[.]", ".N.", target, count=1) for target in changes)
    lines = [
        f"{found.path}: {found.nbytes / 1e6:.1f} MB",
        f"layout: {' or '.join(writers) or 'none of the table, understood all the same'}; {example}",
        f"changes: {_counted(KINDS[type(change).__name__] for change in changes.values())}",
        f"rank: {_counted(str(change.rank) for change in inner if change.rank is not None)}",
        f"alpha: {_counted(alphas)}; told by {' and '.join(told) or 'nothing, so the scale is 1'}",
        f"modules: {len(changes)}: {_counted(modules)}",
    ]
    if found.left_out:
        lines.append(f"left out: {len(found.left_out)} keys of the text connectors or a text encoder")
    trained = {key: str(value) for key, value in found.header.metadata.items() if _TRAINED_ON.search(key)}
    lines += [f"trained on: {key} {value[:_SHOWN]}" for key, value in sorted(trained.items())] or [
        "trained on: not told"
    ]
    return lines


def _counted(values: Any) -> str:
    counts = Counter(values).most_common()
    more = f" and {len(counts) - _LISTED} more kinds" if len(counts) > _LISTED else ""
    return (", ".join(f"{value} x {count}" for value, count in counts[:_LISTED]) or "none") + more
