"""Contact sheets of the demo's model, prompt above and frames below: python -m tools.demo_model.gallery."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from ltxkern.pipeline.files.hub import DEMO_FOLDER
from ltxkern.pipeline.generator import HQTwoStagePipeline
from tools.demo_model.runs import first_frame, open_model, save_picture
from tools.demo_model.video_vae import FRAMES, HEIGHT, WIDTH
from tools.demo_model.world import Scene, Shape

SHOWN, TEXT_ROWS, GAP = 6, 24, 4
# In the words of a visitor; but for the first, none is a sentence of the grammar as it stands.
PROMPTS = (
    "a red ball bounces on a black background",
    "A big golden ring rolls to the left, in front of a navy wall",
    "tiny green triangle rising on the right, snowy background",
    "a pink square grows against a dark backdrop",
    "on a wooden wall, a turquoise hoop falling on the left hand side",
    "please show me one purple cube that gets smaller, white background",
    "a small orange circle jumps up and down and a small blue square stays still, on black",
)
# First frames that are given, and what shall become of them.
GIVEN = (
    (Scene("black", (Shape("ring", "cyan", "right"),)), "a cyan ring moves right on a black background"),
    (
        Scene("white", (Shape("triangle", "red", "shrink", "large"),)),
        "a large red triangle shrinks on a white background",
    ),
)


def sheet(rows: Sequence[tuple[str, Tensor]], frame: tuple[int, int]) -> Image.Image:
    """One picture of all rows: a sentence, and below it frames of a clip (F, H, W, 3) in [0, 1], evenly over its time.

    Args:
        rows: sentences and clips.
        frame: height and width of a frame on the sheet.
    """
    height, width = frame
    tall = height + TEXT_ROWS + GAP
    page = Image.new("RGB", (SHOWN * (width + GAP) - GAP, len(rows) * tall), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT_ROWS // 2)
    for index, (sentence, clip) in enumerate(rows):
        draw.text((GAP, index * tall + GAP), sentence, fill="black", font=font)
        chosen = clip[torch.linspace(0, len(clip) - 1, SHOWN).round().long()].float().permute(0, 3, 1, 2)
        small = interpolate(chosen, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
        for place, pixels in enumerate((small * 255).round().byte().permute(0, 2, 3, 1)):
            page.paste(Image.fromarray(pixels.numpy()), (place * (width + GAP), index * tall + TEXT_ROWS))
    return page


def from_prompts(pipeline: HQTwoStagePipeline, prompts: Sequence[str], **sizes: Any) -> list[tuple[str, Tensor]]:
    """A row a prompt."""
    return [(prompt, pipeline(prompt, **sizes).video) for prompt in prompts]


def from_pictures(
    pipeline: HQTwoStagePipeline, given: Sequence[tuple[Scene, str]], folder: Path, **sizes: Any
) -> list[tuple[str, Tensor]]:
    """A row a picture, which is drawn into the folder and given as the first frame."""
    rows = []
    for scene, prompt in given:
        (shape,) = scene.shapes
        path = folder / f"{shape.colour}-{shape.kind}.png"
        images = [save_picture(first_frame(scene, sizes["height"], sizes["width"], sizes["num_frames"]), path)]
        rows.append((f"{prompt} (first frame given)", pipeline(prompt, images=images, **sizes).video))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.gallery", description=__doc__)
    parser.add_argument("--files", type=Path, default=DEMO_FOLDER, help="folder of the model; default the package's")
    parser.add_argument("--target", type=Path, default=Path("docs/gallery"), help="folder of the sheets")
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    pipeline = open_model(arguments.files)
    sizes = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    frame = (HEIGHT // 2, WIDTH // 2)
    sheet(from_prompts(pipeline, PROMPTS, **sizes), frame).save(arguments.target / "prompts.png")
    sheet(from_pictures(pipeline, GIVEN, arguments.target, **sizes), frame).save(arguments.target / "pictures.png")


if __name__ == "__main__":
    main()
