"""The Euler samplers: golden ancestral steps, where they end, noise and its order, masks, callback, errors."""

import math
from typing import Any

import pytest
import torch

from ltxkern.pipeline.sampling.euler import euler_ancestral_step, euler_sample, euler_step
from tests.golden import matching, open_golden
from tests.pipeline.sampling.toy_denoiser import SIGMAS, Toy, draw


def test_euler_ends_at_the_last_prediction() -> None:
    denoiser = Toy()
    result = euler_sample(denoiser, draw(dtype=torch.float64), (1.0, 0.4, 0.0))
    state = draw(dtype=torch.float64)
    x0 = Toy()(state, 1.0, step=0, substep=False)
    state = {name: x + (x - x0[name]) / 1.0 * (0.4 - 1.0) for name, x in state.items()}
    x0 = Toy()(state, 0.4, step=1, substep=False)
    assert [call[1:] for call in denoiser.calls] == [(0, False), (1, False)]
    for name in result:
        torch.testing.assert_close(result[name], x0[name], atol=1e-6, rtol=1e-6)


def test_euler_masks_callback_and_dtype() -> None:
    latents, seen = draw(), []
    mask = torch.ones(1, 6, 1)
    mask[:, 0] = 0
    clean = {"video": latents["video"].clone()}
    result = euler_sample(
        Toy(), latents, SIGMAS, masks={"video": mask}, clean=clean, callback=lambda *given: seen.append(given[:2])
    )
    assert torch.equal(result["video"][:, 0], clean["video"][:, 0])
    assert not torch.equal(result["video"][:, 1], clean["video"][:, 1])
    assert result["video"].dtype == torch.bfloat16
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_euler_errors() -> None:
    x = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="sigma must not be 0"):
        euler_step(x, x, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"denoised must have shape \(1, 2, 2\) like sample, got \(1, 2, 1\)"):
        euler_step(x, x[..., :1], 1.0, 0.5)
    with pytest.raises(ValueError, match=r"strictly decreasing and at least 0, got 0\.5 then 0\.5"):
        euler_sample(Toy(), {"video": x}, (0.5, 0.5))
    with pytest.raises(ValueError, match=r"noise must have shape \(1, 2, 2\) like sample"):
        euler_ancestral_step(x, x, 1.0, 0.5, x[..., :1])
    with pytest.raises(ValueError, match="eta must be at least 0"):
        euler_sample(Toy(), {"video": x}, (1.0, 0.0), eta=-1.0)
    with pytest.raises(
        ValueError, match=r"noise\['video'\] must hold 1 tensors \(one a step that does not end at 0\), got 2"
    ):
        euler_sample(Toy(), {"video": x}, (1.0, 0.5, 0.0), eta=1.0, noise={"video": [x, x]})
    with pytest.raises(ValueError, match="one for the batch or one per sample, got 2 for 1 samples"):
        euler_sample(Toy(), {"video": x}, (1.0, 0.5), eta=1.0, noise_seed=[1, 2])


def test_golden_ancestral_steps_to_the_bit() -> None:
    sample, denoised, noise = (open_golden()[f"sde/step/a/f32/{name}"] for name in ("sample", "denoised", "noise"))
    checked = matching(r"euler_ancestral/f32/eta([\d.]+)/s([\d.]+)_to_([\d.]+)")
    assert len(checked) == 3
    for match in checked:
        eta, sigma, sigma_next = map(float, match.groups())
        out = euler_ancestral_step(sample, denoised, sigma, sigma_next, noise, eta=eta)
        assert torch.equal(out, open_golden()[match[0]]), match[0]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_noise_levels_add_up(eta: float) -> None:
    """x = (1 - s) x0 + s n at s becomes the same mixture at s', with as much noise: for any x0, exactly known."""
    x0, n, fresh = (
        torch.randn(1, 50, 400, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)
    )
    sigma, sigma_next = 0.9, 0.6
    out = euler_ancestral_step((1 - sigma) * x0 + sigma * n, x0, sigma, sigma_next, fresh, eta=eta)
    rest = out - (1 - sigma_next) * x0
    assert float(rest.std()) == pytest.approx(sigma_next, rel=0.01)
    down = sigma_next * (1 + eta * (sigma_next / sigma - 1))
    kept = down * (1 - sigma_next) / (1 - down)
    torch.testing.assert_close(rest, kept * n + math.sqrt(sigma_next**2 - kept**2) * fresh, atol=1e-6, rtol=1e-6)


def ancestral(seed: Any = -1, latents: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    return euler_sample(Toy(), latents or draw(dtype=torch.float32), SIGMAS, eta=1.0, noise_seed=seed, **options)


def test_ancestral_noise_is_one_fresh_generator_video_first_and_none_at_the_end() -> None:
    latents, generator = draw(dtype=torch.float32), torch.Generator().manual_seed(7)
    noise: dict[str, list[torch.Tensor]] = {name: [] for name in latents}
    for _ in SIGMAS[1:-1]:
        for name in ("video", "audio"):
            noise[name].append(torch.randn(latents[name].shape, generator=generator))
    drawn = ancestral(7)
    for other in (ancestral(7), ancestral(3, noise=noise)):
        assert all(torch.equal(drawn[name], other[name]) for name in drawn)
    assert not torch.equal(drawn["video"], ancestral(8)["video"])


def test_without_eta_no_seed_matters() -> None:
    first, second = (euler_sample(Toy(), draw(), SIGMAS, noise_seed=seed) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ancestral_masks_hold_and_the_end_is_the_prediction() -> None:
    latents, mask = draw(dtype=torch.bfloat16), torch.ones(1, 6, 1)
    mask[:, 0] = 0
    clean, seen = {"video": latents["video"].clone()}, []
    denoiser = Toy()
    held = {"masks": {"video": mask}, "clean": clean, "callback": lambda *given: seen.append(given[2]["video"][:, 0])}
    result = euler_sample(denoiser, latents, SIGMAS, eta=1.0, **held)
    assert len(denoiser.calls) == 4
    assert all(torch.equal(token, clean["video"][:, 0]) for token in seen)
    assert result["video"].dtype == torch.bfloat16
    last: dict[str, torch.Tensor] = {}

    def keep(latents: Any, sigma: float, **at: Any) -> dict[str, torch.Tensor]:
        last.update(Toy()(latents, sigma, **at))
        return dict(last)

    ended = euler_sample(keep, draw(), SIGMAS, eta=1.0)
    assert all(torch.equal(ended[name], last[name]) for name in ended)


def test_a_batch_with_seeds_is_its_samples_alone() -> None:
    latents = {name: torch.cat([x, 0.5 * x]) for name, x in draw(dtype=torch.float32).items()}
    both = ancestral([4, 9], latents)
    for index, seed in enumerate((4, 9)):
        alone = ancestral(seed, {name: x[index : index + 1] for name, x in latents.items()})
        assert all(torch.equal(both[name][index : index + 1], alone[name]) for name in alone)
