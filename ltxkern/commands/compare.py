"""`ltxkern compare`: how far two outputs are apart, picture and sound."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "compare",
        help="score one output against another",
        description="PSNR and SSIM per frame, relative L2 and cosine of the sound, or of the latents of two .safetensors files.",
    )
    parser.add_argument("a", metavar="FILE", help="reference: .mp4 or .safetensors")
    parser.add_argument("b", metavar="FILE", help="of the same kind")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON as well")
    parser.add_argument(
        "--no-perceptual", action="store_true", help="leave LPIPS and CLIP out even where they are installed"
    )
    parser.add_argument("--no-audio", action="store_true", help="compare the pictures of two mp4 files alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the JSON."""
    from ltxkern.compare import compare_outputs

    comparison = compare_outputs(
        arguments.a, arguments.b, perceptual=not arguments.no_perceptual, audio=not arguments.no_audio
    )
    print(comparison.table())
    if arguments.json is not None:
        Path(arguments.json).write_text(comparison.to_json() + "\n")
    return 0
