"""Runs the sequence-parallel cases: one process for the reference, then 2 to 4 ranks, all forked from one that has loaded all.

`python -m tests.pipeline.parallel.token_ranks FOLDER` writes the reference's latents, a JSON file per rank, and results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxkern.commands import parallel
from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.inputs import ModalityInput
from ltxkern.pipeline.model.transformer import predict_velocity_batched
from ltxkern.pipeline.parallel.by_branch import CFGParallel
from ltxkern.pipeline.parallel.by_token import SequenceParallel
from ltxkern.pipeline.parallel.ranks import RankError
from ltxkern.pipeline.sampling.guidance import CFGBranch
from tests.pipeline.parallel.branch_failures import OPTIONS, launched
from tests.pipeline.parallel.branch_ranks import cases, forked, generate, joined, launcher

DEGREES = (2, 3, 4)  # the demo has 4 heads: 3 ranks get 2, 1 and 1
CASES = ("t2v", "i2v", "batch")
TOKENS, AUDIO, TEXT, BATCH = 23, 7, 5, 2


def branches(masked: bool, levels: tuple[float, ...] | None) -> list[dict[str, Any]]:
    """Two branches of a forward in one batch: a full one, and one that leaves attentions out. 23 tokens fit no degree."""
    draws = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws)

    def positions(axes: int, tokens: int) -> Tensor:
        start = torch.rand((BATCH, axes, tokens, 1), generator=draws) * 4
        return torch.cat([start, start + 0.25], dim=-1)

    mask = (torch.rand((BATCH, TOKENS, 1), generator=draws) > 0.3).float() if masked else None
    video, audio = normal(BATCH, TOKENS, 16), normal(BATCH, AUDIO, 32)
    places = positions(3, TOKENS), positions(1, AUDIO)
    given = []
    for flags in ({}, {"skip_video_self_attn_blocks": (1,), "disable_v2a_cross_attn": True}):
        given.append(
            {
                "video": ModalityInput(video, 0.7, mask, places[0], normal(BATCH, TEXT, 64), levels),
                "audio": ModalityInput(audio, 0.7, None, places[1], normal(BATCH, TEXT, 32)),
                **flags,
            }
        )
    return given


def forwards(model: Any, sequence: SequenceParallel) -> dict[str, float]:
    """Largest difference of a shared forward's velocities from the undivided ones, relative to their largest, fp32."""
    found = {}
    kinds = {"one timestep": (False, None), "timestep per token": (True, None), "two levels": (True, (0.0, 1.0))}
    for name, (masked, levels) in kinds.items():
        given = branches(masked, levels)
        for count in (1, 2):
            whole = predict_velocity_batched(model, given[:count])
            parts = predict_velocity_batched(model, given[:count], sequence)
            pairs = [(a, b) for one, two in zip(whole, parts, strict=True) for a, b in zip(one, two, strict=True)]
            worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
            found[f"{name}, {count} branches"] = worst
    return found


def out_of_step(sequence: SequenceParallel) -> list[str]:
    """What every rank says where rank 1 has other latents, another sigma, another text."""
    said = []
    odd = float(sequence.rank == 1)
    for latent, sigma, text in ((odd, 0.0, 0.0), (0.0, odd, 0.0), (0.0, 0.0, odd)):
        branch = CFGBranch("cond", True, {"video_context": torch.full((1, 2, 4), text)})
        try:
            sequence._agree({"video": torch.full((1, 2, 4), latent)}, 0.5 + sigma, branch)
            said.append("nothing")
        except RankError as error:
            said.append(str(error))
    return said


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Root mean square of the difference of the results, relative to their own."""
    pairs = [(found[name].double(), expected[name].double()) for name in ("video", "audio", "stage2_audio")]
    return max(float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs)


def reference(models: Mapping[torch.dtype, Components], folder: Path) -> None:
    """Every case in this one process, in fp32; the first one in bf16 too."""
    for name in CASES:
        save(generate(models, cases(folder)[name]).latents, folder / f"{name}.safetensors")
    save(generate(models, cases(folder)["bf16"]).latents, folder / "bf16.safetensors")


def save(latents: Mapping[str, Tensor], path: Path) -> None:
    save_file({key: value.clone() for key, value in latents.items()}, path)


def rank_main(models: Mapping[torch.dtype, Components], folder: Path, port: int, rank: int, size: int) -> None:
    """Every case on one of several ranks."""
    with joined(folder, port, rank, size) as (ranks, results):
        sequence = SequenceParallel(ranks=ranks)
        results["forwards"] = forwards(models[torch.float32].transformer, sequence)
        results["out of step"] = out_of_step(sequence)
        for name in (*CASES, "bf16"):
            share = CFGParallel(ranks=ranks, sequence=SequenceParallel(ranks=ranks))
            output = generate(models, cases(folder)[name], share)
            traffic = share.sequence.traffic if share.sequence is not None else None
            assert traffic is not None
            expected = load_file(folder / f"{name.replace('bf16', 't2v')}.safetensors")
            counted = [traffic.evaluations, traffic.collectives, traffic.sent, traffic.received]
            results[name] = {"error": difference(output.latents, expected), "traffic": counted}


def failing_rank(
    models: Mapping[torch.dtype, Components], folder: Path, port: int, how: str, rank: int, size: int
) -> None:
    """Rank 1 is killed in stage 2, between the collectives of a forward, or raises there."""
    launched(folder, port, how, rank, size)
    with parallel.job(argparse.Namespace(**OPTIONS)) as job:
        share = CFGParallel(ranks=job.ranks, sequence=SequenceParallel(ranks=job.ranks))
        if rank == 1:
            block = models[torch.float32].transformer.transformer_blocks[1]
            block.ff.register_forward_pre_hook(lambda *_: fail_in(share.sequence, 3, how))
        generate(models, cases(folder)["t2v"], share)
        job.finish()


def fail_in(sequence: SequenceParallel | None, forward: int, how: str) -> None:
    """In the given forward of stage 2 raise, or end this process as a crash does."""
    if sequence is None or sequence.traffic.evaluations != forward:
        return
    if how == "raises":
        raise FloatingPointError("the device caught fire")
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    """All degrees, one start of ranks each, and those in which a rank fails."""
    torch.set_num_threads(1)
    models = {dtype: build_demo(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    codes: dict[str, list[int | None]] = {"1": forked(reference, models, folder)}
    for degree in DEGREES:
        with launcher() as port:
            codes[str(degree)] = forked(rank_main, models, folder, port, count=degree)
    results: dict[str, Any] = {"exit_codes": codes}
    for how in ("killed", "raises"):
        with launcher() as port:
            codes[how] = forked(failing_rank, models, folder, port, how, count=2)
        said = [(folder / f"{how} {rank}.txt").read_text() for rank in range(2)]
        results[how] = {"said": "".join(said)}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
