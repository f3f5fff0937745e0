"""The noise of res2s: none of it, a sample's own in a batch, and what its share does to the spread of the result."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
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


# Spread of the result less 1, per (eta, substep_eta): the HQ schedule, and one of 60 steps, where less is due to the step size.
SPREADS = {
    (15, 8160): {(0.0, 0.0): -0.078, (0.0, 0.5): -0.097, (0.5, 0.5): -0.119, (1.0, 0.5): -0.298},
    (60, 4096): {(0.0, 0.0): -0.008, (0.5, 0.5): -0.043, (1.0, 0.5): -0.264},
}


@pytest.mark.parametrize("schedule", SPREADS)
def test_noise_narrows_a_gaussian_as_documented(schedule: tuple[int, int]) -> None:
    """Unit-variance Gaussian data, whose best prediction is known: x0 = (1 - s) x / ((1 - s)^2 + s^2)."""

    def best(latents: Mapping[str, Tensor], sigma: float, **_: Any) -> dict[str, Tensor]:
        return {name: (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * x for name, x in latents.items()}

    x = ltxkern.normalize_noise(torch.randn(1, 600, 64, generator=torch.Generator().manual_seed(0)).double())
    for (eta, substep_eta), expected in SPREADS[schedule].items():
        result = res2s_sample(best, {"video": x}, ltx2_sigmas(*schedule), eta=eta, substep_eta=substep_eta)
        assert float(result["video"].std()) - 1 == pytest.approx(expected, abs=0.012)
