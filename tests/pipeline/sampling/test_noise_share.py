"""The noise of res2s: none of it, a sample's own in a batch, and what its share does to the spread of the result."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.pipeline.sampling.res2s import res2s_sample
from ltxkern.pipeline.sampling.schedule import ltx2_sigmas
from tests.pipeline.sampling.toy_denoiser import SIGMAS, Toy, draw


def test_without_noise_no_seed_matters() -> None:
    runs = [
        res2s_sample(Toy(), draw(), SIGMAS, eta=0.0, substep_eta=0.0, noise_seed=a, substep_seed=b)
        for a, b in ((-1, None), (3, 4))
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    noisy = res2s_sample(Toy(), draw(), SIGMAS, eta=0.0)
    assert not torch.equal(noisy["video"], runs[0]["video"])


def test_a_batch_with_seeds_is_its_samples_alone() -> None:
    latents = {name: torch.cat([x, 0.5 * x]) for name, x in draw(dtype=torch.float32).items()}
    both = res2s_sample(Toy(), latents, SIGMAS, noise_seed=[4, -1])
    for index, seed in enumerate((4, -1)):
        alone = res2s_sample(Toy(), {n: x[index : index + 1] for n, x in latents.items()}, SIGMAS, noise_seed=seed)
        for name in alone:
            torch.testing.assert_close(both[name][index : index + 1], alone[name], atol=1e-6, rtol=1e-6)


# Spread of the result less 1, per (eta, substep_eta): as the sampler's documentation has them.
SHARES = ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 0.5))
SPREADS = {
    (15, 8160, True): (-0.078, -0.097, -0.118, -0.297),
    (400, 4096, True): (-0.004, -0.030, -0.039, -0.259),
    (400, 4096, False): (-0.000, -0.026, -0.035, -0.257),
}


@pytest.mark.parametrize("schedule", SPREADS)
def test_noise_narrows_a_gaussian_as_documented(schedule: tuple[int, int, bool]) -> None:
    """Unit-variance Gaussian data, whose best prediction is known: x0 = (1 - s) x / ((1 - s)^2 + s^2).

    The run is linear then: the spread is the length of its answers to the start alone and to each noise alone.
    """
    steps, tokens, stretch = schedule

    def best(latents: Mapping[str, Tensor], sigma: float, **_: Any) -> dict[str, Tensor]:
        return {name: (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * x for name, x in latents.items()}

    start, *noise = torch.eye(2 * steps + 1, dtype=torch.float64).view(-1, 1, 1, 2 * steps + 1)
    sigmas = ltx2_sigmas(steps, tokens, stretch=stretch)
    for (eta, substep_eta), expected in zip(SHARES, SPREADS[schedule], strict=True):
        result = res2s_sample(best, {"video": start}, sigmas, eta=eta, substep_eta=substep_eta, noise={"video": noise})
        assert float(result["video"].norm()) - 1 == pytest.approx(expected, abs=0.0006)
