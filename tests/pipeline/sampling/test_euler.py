"""The Euler sampler: where it ends, masks, callback, errors."""

import pytest
import torch

from ltxkern.pipeline.sampling.euler import euler_sample, euler_step
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
