"""`sample_res2s_sde` and `Res2sRun` against `res2s_sample`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.integrations.samplers import Res2sRun, SeededNoise, sample_res2s_sde
from ltxkern.pipeline import res2s_sample

SCHEDULES = [[1.0, 0.8, 0.5, 0.1, 0.0], [0.9, 0.6, 0.3], [1.0, 0.4, 0.0]]


def predicted(x: Tensor, sigma: float) -> Tensor:
    """A smooth model that depends on the state and on its noise level."""
    return (x * 0.7 + sigma * 0.2).tanh()


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 4, 3, 2, 5), (1, 1, 60)], ids=str)
@pytest.mark.parametrize("sigmas", SCHEDULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"eta": 0.0, "substep_eta": 0.0}, {"anchor_refinement": False}], ids=str)
def test_matches_res2s_sample(shape: tuple[int, ...], sigmas: list[float], options: dict[str, Any]) -> None:
    x = torch.randn(shape)
    packed = x.reshape(shape[0], -1, shape[-1])
    wanted = res2s_sample(
        lambda latents, sigma, **_: {"video": predicted(latents["video"], sigma)},
        *({"video": packed}, sigmas),
        noise_seed=7,
        **options,
    )
    calls: list[dict[str, Any]] = []

    def model(state: Tensor, sigma: Tensor, seed: int) -> Tensor:
        assert state.shape == shape
        assert sigma.shape == shape[:1]
        return predicted(state, float(sigma[0]))

    kept = x.clone()
    got = sample_res2s_sde(model, x, torch.tensor(sigmas), {"seed": 7}, calls.append, True, **options)
    torch.testing.assert_close(got, wanted["video"].view(shape), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, kept)
    assert [(call["i"], round(float(call["sigma"]), 6)) for call in calls] == list(enumerate(sigmas[:-1]))
    assert all(torch.equal(call["denoised"], predicted(call["x"], float(call["sigma"]))) for call in calls)


def test_noise_of_the_caller_is_standardised() -> None:
    """A stack's own source is asked for the levels of each half-step; its scale and mean do not count."""
    x, asked = torch.randn(2, 3, 8), []
    sigmas = torch.tensor([1.0, 0.25, 0.0])

    def sampler(scale: float) -> Any:
        generator = torch.Generator().manual_seed(3)

        def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            asked.append((round(float(sigma), 4), round(float(sigma_next), 4)))
            return torch.randn(x.shape, generator=generator) * scale + scale - 1

        return draw

    def model(state: Tensor, sigma: Tensor) -> Tensor:
        return predicted(state, float(sigma[0]))

    runs = [sample_res2s_sde(model, x, sigmas, disable=True, noise_sampler=sampler(scale)) for scale in (1.0, 5.0)]
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)
    assert asked[:4] == [(1.0, 0.5), (1.0, 0.25), (0.25, 0.0166), (0.25, 0.0011)]


def test_what_is_refused() -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(
        ValueError, match=r"sigmas must lie between 0 and 1, .* got 14\.5: this model wants another sampler"
    ):
        sample_res2s_sde(lambda x, sigma: x, x, torch.tensor([14.5, 1.0, 0.0]))
    with pytest.raises(ValueError, match="the last level before 0 must be above"):
        Res2sRun([1.0, 0.001, 0.0])
    with pytest.raises(RuntimeError, match="evaluation 1 ends a step that was not begun: begin at an even one"):
        Res2sRun([1.0, 0.5]).take(1, x, x, SeededNoise(0))
