"""What the samplers refuse, in words, before the denoiser is called."""

import math
from typing import Any

import pytest
import torch

from ltxkern.pipeline.sampling.euler import euler_sample
from ltxkern.pipeline.sampling.res2s import res2s_sample
from tests.pipeline.sampling.toy_denoiser import SIGMAS, Toy


def wrong_inputs() -> list[tuple[dict[str, Any], type[Exception], str]]:
    ones, clean = torch.ones(1, 6, 1), torch.zeros(1, 6, 4)
    return [
        ({"latents": {}}, ValueError, 'latents is empty: expected "video", "audio" or both'),
        ({"latents": torch.zeros(1, 6, 4)}, TypeError, "latents must be a dict of tensors by modality, got Tensor"),
        ({"latents": {"image": clean}}, ValueError, "latents has the unknown key 'image'"),
        ({"latents": {"video": None}}, TypeError, r"latents\['video'\] must be a torch.Tensor, got NoneType"),
        ({"latents": {"video": clean.long()}}, TypeError, "must be floating point, got torch.int64"),
        ({"latents": {"video": clean[0]}}, ValueError, r"must be packed \(B, T, C\), got shape \(6, 4\)"),
        ({"latents": {"video": clean, "audio": clean.half()}}, TypeError, "must share one dtype"),
        ({"model_dtype": torch.int32}, TypeError, "model_dtype must be one of"),
        ({"masks": {"video": ones}}, ValueError, r"masks\['video'\] is given without clean\['video'\]"),
        ({"clean": {"video": clean}}, ValueError, r"clean\['video'\] is given without masks\['video'\]"),
        ({"masks": {"audio": ones}}, ValueError, r"masks\['audio'\] has no latent: latents holds video"),
        ({"masks": {"video": ones[0]}, "clean": {"video": clean}}, ValueError, r"must have shape \(1, 6, 1\), got"),
        ({"masks": {"video": ones}, "clean": {"video": clean[..., :3]}}, ValueError, r"clean.*\(1, 6, 4\), got"),
        ({"masks": {"video": ones.double()}, "clean": {"video": clean}}, TypeError, "must be torch.float32, got"),
        ({"sigmas": (1.0,)}, ValueError, "at least two noise levels, got 1"),
        ({"sigmas": torch.ones(2, 2)}, ValueError, r"one-dimensional, got shape \(2, 2\)"),
        ({"sigmas": (0.5, 0.6, 0.0)}, ValueError, "strictly decreasing"),
        ({"sigmas": (0.5, 0.001, 0.0)}, ValueError, "last level before 0 must be above 0.0011, got 0.001"),
        ({"sigmas": (1.0, math.nan)}, ValueError, "strictly decreasing"),
        ({"eta": -1.0}, ValueError, "eta must be at least 0.0, got -1.0: use 0.0"),
        ({"noise": {}}, ValueError, "noise must hold exactly video, got nothing"),
        ({"noise": {"video": [clean]}}, ValueError, r"noise\['video'\] must hold 8 tensors \(two a step\), got 1"),
        ({"noise": {"video": [clean[:, 1:]] * 8}}, ValueError, r"noise\['video'\]\[0\] must have shape \(1, 6, 4\)"),
    ]


@pytest.mark.parametrize(("given", "error", "words"), wrong_inputs())
def test_wrong_inputs(given: dict[str, Any], error: type[Exception], words: str) -> None:
    denoiser = Toy()
    arguments = {"latents": {"video": torch.zeros(1, 6, 4)}, "sigmas": SIGMAS, **given}
    with pytest.raises(error, match=words):
        res2s_sample(denoiser, **arguments)
    assert not denoiser.calls


@pytest.mark.parametrize("sample", [res2s_sample, euler_sample])
@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        ({}, TypeError, "denoiser must return a tensor for 'video', got NoneType"),
        ({"video": 0.5}, TypeError, "for 'video', got float"),
        ({"video": torch.zeros(1, 5, 4)}, ValueError, r"'video' with shape \(1, 6, 4\), got \(1, 5, 4\)"),
    ],
)
def test_wrong_predictions(sample: Any, returned: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sample(lambda latents, sigma, **_: returned, {"video": torch.zeros(1, 6, 4)}, SIGMAS)
