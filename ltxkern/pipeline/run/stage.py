"""One denoising stage: latent states, guided transformer forwards, and the sampler that joins them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.model.inputs import ModalityInput
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_x0_batched
from ltxkern.pipeline.parallel.by_token import SequenceParallel
from ltxkern.pipeline.run.request import Stage
from ltxkern.pipeline.sampling.euler import euler_sample
from ltxkern.pipeline.sampling.finite import StageWatch
from ltxkern.pipeline.sampling.guidance import CFGBranch, CFGPolicy, GuidedDenoiser, Prediction, Runner
from ltxkern.pipeline.sampling.latents import LatentState
from ltxkern.pipeline.sampling.res2s import res2s_sample
from ltxkern.pipeline.sampling.state import Latents, offset_seeds
from ltxkern.pipeline.work.kept import KeptSteps


@dataclass(frozen=True)
class BranchForward:
    """Turns the packed latents of a moment into the x0 predictions of guidance branches.

    sequence: ranks over which the video tokens are shared out; None where this process has them all.
    """

    transformer: LTX2Transformer
    states: Mapping[str, LatentState]
    masked: bool
    sequence: SequenceParallel | None = None

    def inputs(self, latents: Mapping[str, Tensor], sigma: float, branch: CFGBranch) -> dict[str, Any]:
        """Keyword arguments of `predict_x0` for one branch."""
        arguments = dict(branch.kwargs)
        contexts = {"video": arguments.pop("video_context"), "audio": arguments.pop("audio_context")}
        for name, state in self.states.items():
            mask = state.mask if self.masked else None
            levels = state.levels if self.masked else None
            arguments[name] = ModalityInput(
                latents[name], sigma, mask, state.positions, contexts[name], levels, state.coordinates
            )
        return {"video": None, "audio": None} | arguments

    def __call__(self, latents: Mapping[str, Tensor], sigma: float, branch: CFGBranch) -> dict[str, Tensor]:
        """x0 of one branch."""
        return self.batched(latents, sigma, [branch])[0]

    def batched(
        self, latents: Mapping[str, Tensor], sigma: float, branches: Sequence[CFGBranch], most: int | None = None
    ) -> list[dict[str, Tensor]]:
        """x0 of several branches from one forward, in batches of at most so many; see `predict_velocity_batched`."""
        inputs = [self.inputs(latents, sigma, branch) for branch in branches]
        return predict_x0_batched(self.transformer, inputs, self.sequence, most)


def batched_runner(max_batch_size: int) -> Runner:
    """A runner that takes all branches into one forward, up to `max_batch_size` of them in one batch.

    Batches go through the blocks side by side; those of one branch give the bits of forwards one after the other.
    """

    def run(branches: Sequence[CFGBranch], forward: Any, latents: Latents, sigma: float) -> dict[str, Prediction]:
        results = forward.batched(latents, sigma, branches, max_batch_size)
        return {branch.name: result for branch, result in zip(branches, results, strict=True)}

    return run


def _kept(steps: KeptSteps, denoiser: Any, reuses: bool) -> dict[str, Any]:
    """The sampler's arguments that go on from the last kept step and keep the next ones; `reuses`: predictions outlive a step."""
    found = steps.latest()
    if found is not None and reuses:
        denoiser.last = dict(found[1])
    return {
        "start": None if found is None else found[0],
        "keep": lambda point: steps.keep(point, denoiser.last if reuses else {}),
    }


def run_stage(
    transformer: LTX2Transformer,
    states: Mapping[str, LatentState],
    policy: CFGPolicy,
    stage: Stage,
    *,
    conditioned: bool,
    eta: float = 0.5,
    substep_eta: float = 0.5,
    seeds: Sequence[int] = (10,),
    max_batch_size: int = 1,
    sde_noise: Mapping[str, Sequence[Tensor]] | None = None,
    callback: Callable[[int, int, dict[str, Tensor]], None] | None = None,
    denoiser_factory: Callable[[CFGPolicy, BranchForward], Any] | None = None,
    steps: KeptSteps | None = None,
) -> dict[str, LatentState]:
    """Denoise the noised states of one stage.

    Args:
        transformer: weights of this stage's LoRA phase.
        states: noised state per modality.
        policy: built guidance policy.
        stage: its sampler and schedule.
        conditioned: whether any token is held by a mask; False spares per-token work everywhere.
        eta, substep_eta: noise shares of a step (res2s, ancestral Euler) and of a res2s midpoint.
        seeds: of the videos, one each; the noise of ancestral Euler depends on them, that of res2s has fixed seeds.
        max_batch_size: guidance branches per batch of a forward.
        sde_noise: ready noise of every draw of the sampler per modality, in its order; seeded draws where None.
        callback: called after each step with (done, total, latents), and the predictions as "video_x0" and "audio_x0".
        denoiser_factory: makes the denoiser from policy and forward; None runs the branches by `batched_runner`.
        steps: where the stage goes on from, and where its steps are kept.
    Returns:
        The states with the denoised latents, conditioning tokens removed.
    Raises:
        NonFiniteError: the stage ended in NaN or infinity; the message names the step and the modality that were first.
    """
    forward = BranchForward(transformer, states, conditioned)
    if denoiser_factory is not None:
        denoiser = denoiser_factory(policy, forward)
    else:
        denoiser = GuidedDenoiser(policy, forward, runner=batched_runner(max_batch_size))
    latents = {name: state.latent for name, state in states.items()}
    sigmas = torch.tensor(stage.sigmas, dtype=torch.float32)
    watch = StageWatch(stage.name)

    predicted: Latents = {}

    def predict(latents: Latents, sigma: float, *, step: int, substep: bool) -> Latents:
        found: Latents = denoiser(latents, sigma, step=step, substep=substep)
        if callback is not None:
            predicted.update(found)
        return found

    def after_step(done: int, total: int, latents: Latents) -> None:
        watch.after_step(done, latents)
        if callback is not None:
            callback(done, total, latents | {f"{name}_x0": x0 for name, x0 in predicted.items()})

    held: dict[str, Any] = {"callback": after_step}
    if steps is not None:
        held |= _kept(steps, denoiser, any(policy.skipped(step) for step in range(len(stage.sigmas))))
    if conditioned:
        held["masks"] = {name: state.mask for name, state in states.items()}
        held["clean"] = {name: state.clean for name, state in states.items()}
    # As many seeds as samples: a video draws what it would draw in a call of its own.
    if stage.sampler == "res2s":
        held |= {"eta": eta, "substep_eta": substep_eta, "noise_seed": [-1] * len(seeds), "noise": sde_noise}
        result = res2s_sample(predict, latents, sigmas, **held)
    elif stage.sampler == "euler-ancestral":
        held |= {"eta": eta, "noise_seed": offset_seeds(seeds), "noise": sde_noise}
        result = euler_sample(predict, latents, sigmas, **held)
    else:
        result = euler_sample(predict, latents, sigmas, **held)
    watch.check(result)
    return {name: replace(state, latent=result[name]).clear_conditioning() for name, state in states.items()}
