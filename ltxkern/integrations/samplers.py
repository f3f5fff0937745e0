"""The res2s sampler for other stacks: a run driven from outside, and a sampler function as k-diffusion has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltxkern.ops.normalize_noise import noise_statistics
from ltxkern.ops.res2s import res2s_advance, res2s_midpoint
from ltxkern.ops.res2s_step import SUBSTEP_ETA, res2s_steps
from ltxkern.pipeline.sampling.res2s import TAIL_SIGMA
from ltxkern.pipeline.sampling.state import Seeds, fill_normal, offset_seeds, sample_generators, schedule_floats

# Fills a buffer with raw normal noise, for the evaluation of this index.
Draw = Callable[[Tensor, int], object]


class _Half(NamedTuple):
    """What the second half of a step needs of the first."""

    anchor: Tensor
    x0: Tensor
    mask: Tensor | None
    clean: Tensor | None


class SeededNoise:
    """The noise of `res2s_sample` for a seed: fresh generators for steps and substeps, drawn from in the order of the evaluations.

    A deep copy shares them: schedulers of two modalities draw in turn, as the sampler does for video and audio.
    """

    def __init__(self, seeds: Seeds) -> None:
        self._seeds = seeds
        self._generators: dict[tuple[torch.device, bool], list[torch.Generator]] = {}

    def restart(self) -> None:
        """Begin with the first draw again."""
        self._generators.clear()

    def __call__(self, buffer: Tensor, index: int) -> None:
        substep = index % 2 == 0
        key = buffer.device, substep
        if key not in self._generators:
            seeds = offset_seeds(self._seeds) if substep else self._seeds
            self._generators[key] = sample_generators(seeds, buffer.device)
        fill_normal(buffer, self._generators[key])

    def __deepcopy__(self, memo: dict[int, Any]) -> SeededNoise:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededNoise, (self._seeds,)


class Res2sRun:
    """A run of the res2s sampler to which each prediction is handed; what comes back is the state of the next evaluation.

    Args:
        sigmas: as `res2s_sample` takes them, at most 1.
        eta, substep_eta, anchor_refinement: as in `res2s_sample`.
    Attributes:
        sigmas: the noise level of each evaluation: two a step, and 0.0011 where the schedule ends at 0.
    Raises:
        TypeError, ValueError: each names the parameter.
    """

    def __init__(
        self,
        sigmas: Tensor | Iterable[float],
        *,
        eta: float = 0.5,
        substep_eta: float = SUBSTEP_ETA,
        anchor_refinement: bool = True,
    ) -> None:
        levels = schedule_floats(sigmas)
        if levels[0] > 1.0:
            raise ValueError(
                f"sigmas must lie between 0 and 1, as those of flow models do, got {levels[0]}: this model wants another sampler"
            )
        clean_end = levels[-1] == 0.0
        if clean_end:
            if not levels[-2] > TAIL_SIGMA:
                raise ValueError(f"sigmas: the last level before 0 must be above {TAIL_SIGMA:.4f}, got {levels[-2]}")
            levels[-1] = TAIL_SIGMA
        self._steps = res2s_steps(levels, eta, substep_eta=substep_eta, anchor_refinement=anchor_refinement)
        self.sigmas = [level for step in self._steps for level in (step.sigma, step.sigma_sub)] + levels[
            -1:
        ] * clean_end
        self._half: _Half | None = None
        self._buffer: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sigmas)

    def take(self, index: int, sample: Tensor, x0: Tensor, draw: Draw, mask: Tensor | None = None) -> Tensor:
        """The state after one evaluation.

        Args:
            index: of the evaluation, one after another from an even one on.
            sample: the state that was evaluated, (B, ...).
            x0: the clean prediction, same shape.
            draw: source of the noise.
            mask: fp32 (B, T, 1) over the rows of `sample` seen as (B, T, C): 0 where a row stays as it is; None for all ones. Taken
                at even indices, for the whole step.
        Returns:
            Shape and dtype of sample; after the last evaluation x0 itself.
        Raises:
            RuntimeError: an odd index whose step was not begun.
        """
        shape = sample.shape
        rows = shape[0], -1, shape[-1]
        if index == 2 * len(self._steps):
            return x0.to(sample.dtype)
        step, substep = self._steps[index // 2], index % 2 == 0
        state, target = sample.reshape(rows).contiguous(), x0.reshape(rows).contiguous()
        noise = self._noise(state, draw, index)
        if substep:
            clean = None if mask is None else state
            noised, statistics = noise
            after, anchor = res2s_midpoint(state, target, noised, step, mask=mask, clean=clean, noise_stats=statistics)
            self._half = _Half(anchor, target, mask, clean)
            return after.reshape(shape)
        if self._half is None:
            raise RuntimeError(f"evaluation {index} ends a step that was not begun: begin at an even one")
        half, self._half = self._half, None
        noised, statistics = noise
        after = res2s_advance(
            half.anchor,
            half.x0,
            target,
            noised,
            step,
            mask=half.mask,
            clean=half.clean,
            noise_stats=statistics,
            model_dtype=state.dtype,
        )
        return after.reshape(shape)

    def _noise(self, state: Tensor, draw: Draw, index: int) -> tuple[Tensor, Tensor]:
        """Raw noise and its statistics."""
        if self._buffer is None or self._buffer.shape != state.shape or self._buffer.device != state.device:
            self._buffer = torch.empty_like(state, dtype=torch.float64)
        draw(self._buffer, index)
        return self._buffer, noise_statistics(self._buffer)


@torch.no_grad()
def sample_res2s_sde(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    eta: float = 0.5,
    substep_eta: float = SUBSTEP_ETA,
    anchor_refinement: bool = True,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """`res2s_sample` as a sampler function of k-diffusion and ComfyUI, for flow models.

    Args:
        model: `model(x, sigma * x.new_ones(B), **extra_args)` gives the clean prediction.
        x: noised latents (B, ...), at sigmas[0].
        sigmas: decreasing, at most 1; the last one 0 or positive. n steps are 2n + 1 evaluations (2n where it is positive).
        extra_args: handed to the model; its "seed", where there is one, seeds the noise, else -1 does.
        callback: called with x, i, sigma, sigma_hat and denoised at the first evaluation of each step.
        disable: no progress bar; None: none where nobody looks.
        eta, substep_eta, anchor_refinement: as in `res2s_sample`.
        noise_sampler: `noise_sampler(sigma, sigma_next)` gives noise of x's shape in the place of seeded one; it is standardised.
    Returns:
        Shape and dtype of x.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; fp64 between two evaluations. Noise is standardised over each sample, video and audio that a stack packs
    into one tensor together.
    Source: the res2s sampler of LTX-2.
    """
    from tqdm.auto import tqdm

    arguments = dict(extra_args or {})
    run = Res2sRun(sigmas, eta=eta, substep_eta=substep_eta, anchor_refinement=anchor_refinement)
    seed = arguments.get("seed")
    levels = [x.new_tensor(level) for level in [*run.sigmas, float(sigmas[-1])]]
    drawn = SeededNoise(-1 if seed is None else int(seed))

    def draw(buffer: Tensor, index: int) -> None:
        if noise_sampler is None:
            return drawn(buffer, index)
        buffer.copy_(noise_sampler(levels[index - index % 2], levels[index + 1]).reshape(buffer.shape))

    ones = x.new_ones(x.shape[0])
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        for index, level in enumerate(levels[: len(run)]):
            denoised = model(x, level * ones, **arguments)
            if callback is not None and index % 2 == 0 and index // 2 < len(sigmas) - 1:
                callback({"x": x, "i": index // 2, "sigma": level, "sigma_hat": level, "denoised": denoised})
            x = run.take(index, x, denoised, draw)
            bar.update(index % 2)
    return x
