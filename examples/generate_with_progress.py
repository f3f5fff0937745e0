"""A video with sound from Python, with a progress bar: `python examples/generate_with_progress.py [kite.mp4]`.

The model demo-random has random weights and needs no download; the path of a real checkpoint takes its place.
"""

import sys

import torch
from tqdm import tqdm

from ltxkern.pipeline import GenerationRequest, HQTwoStagePipeline, ProgressEvent


def main(path: str = "kite.mp4") -> None:
    bar = tqdm(unit="step")

    def progress(event: ProgressEvent) -> None:
        """Called wherever something advances: the prompt, both stages, the decoders."""
        bar.set_description(event.stage)
        bar.total, bar.n = event.total, event.done
        bar.refresh()

    request = GenerationRequest("a red kite over a winter beach", height=64, width=128, num_frames=9, steps=2, seed=10)
    with HQTwoStagePipeline.from_pretrained("demo-random", device="cpu", dtype=torch.float32) as pipeline, bar:
        result = pipeline.generate(request, progress=progress)
        result.save(path)
    for op, backends in result.backends.items():
        print(f"{op:36} {', '.join(backends)}")
    print(
        f"{path}: {tuple(result.video.shape)} at {result.frame_rate:g} fps, {result.audio.shape[-1]} samples of sound"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
