"""`Res2sScheduler` in the stock LTX-2 pipelines of diffusers, on tiny components, against `res2s_sample`."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2VideoCondition
from PIL import Image

from ltxkern.integrations.diffusers import Res2sScheduler
from ltxkern.pipeline import res2s_sample
from ltxkern.pipeline.files.demo import build_demo

SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
FRAMES = {"height": 64, "width": 64, "num_frames": 9, "frame_rate": 8.0}
UNGUIDED = {
    f"{of}{name}_scale": float(name != "stg") for of in ("", "audio_") for name in ("guidance", "stg", "modality")
}


def components() -> dict[str, Any]:
    """Tiny components of the stock pipelines, with prompt embeddings in the place of a text encoder."""
    demo = build_demo()
    config = {key: value for key, value in demo.transformer.config.items() if not key.startswith("_")}
    transformer = LTX2VideoTransformer3DModel(**config)
    transformer.load_state_dict(demo.transformer.state_dict())
    names = ("video_vae", "audio_vae", "connectors", "vocoder")
    vae, audio_vae, connectors, vocoder = (getattr(demo, name) for name in names)
    return {
        **{"transformer": transformer.eval(), "vae": vae, "audio_vae": audio_vae, "connectors": connectors},
        **{"vocoder": vocoder, "text_encoder": None, "tokenizer": None},
        "scheduler": FlowMatchEulerDiscreteScheduler(**SHIFT),
    }


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return components()


def prompt() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "prompt_embeds": torch.randn(1, 128, 96, generator=generator),
        "prompt_attention_mask": torch.ones(1, 128, dtype=torch.long),
        "negative_prompt_embeds": torch.randn(1, 128, 96, generator=generator),
        "negative_prompt_attention_mask": torch.ones(1, 128, dtype=torch.long),
    }


class Recorded:
    """A stock pipeline's run with the scheduler: what the transformer was given, and what the scheduler returned."""

    def __init__(self, kind: type[Any], parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.states: list[Tensor] = []
        step, transformer = Res2sScheduler.step, parts["transformer"]

        def noted(scheduler: Res2sScheduler, *args: Any, **options: Any) -> Any:
            result = step(scheduler, *args, **options)
            self.states.append(result[0])
            return result

        self.pipe = kind(**parts)
        self.pipe.scheduler = Res2sScheduler.from_config(self.pipe.scheduler.config, noise_seed=11)
        self.pipe.set_progress_bar_config(disable=True)
        hook = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: self.inputs.append(kwargs), with_kwargs=True
        )
        monkeypatch.setattr(Res2sScheduler, "step", noted)
        try:
            options = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False, **FRAMES, **prompt()}
            generator = torch.Generator().manual_seed(2)
            self.result = self.pipe(generator=generator, **options, **given)
        finally:
            hook.remove()
            monkeypatch.setattr(Res2sScheduler, "step", step)

    @property
    def sigmas(self) -> list[float]:
        """The schedule behind the evaluations."""
        return [*self.pipe.scheduler.sigmas.tolist()[:-2:2], 0.0]


@torch.no_grad()
def test_text_to_video_as_res2s_sample(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = Recorded(LTX2Pipeline, parts, monkeypatch, **UNGUIDED)
    assert len(run.inputs) == 7
    assert len(run.states) == 14
    first = run.inputs[0]

    def denoiser(latents: dict[str, Tensor], sigma: float, **_: Any) -> dict[str, Tensor]:
        time = torch.tensor([sigma * 1000.0])
        names = {"hidden_states": latents["video"], "audio_hidden_states": latents["audio"], "timestep": time}
        velocities = parts["transformer"](**{**first, **names, "sigma": time, "return_dict": False})
        pairs = zip(latents.items(), velocities, strict=True)
        return {name: latent - sigma * velocity for (name, latent), velocity in pairs}

    start = {"video": first["hidden_states"], "audio": first["audio_hidden_states"]}
    wanted = res2s_sample(denoiser, start, run.sigmas, noise_seed=11)
    for got, name in zip(run.states[-2:], ("video", "audio"), strict=True):
        torch.testing.assert_close(got, wanted[name], atol=1e-5, rtol=1e-5)


def test_guidance_and_a_second_run(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance in the space of clean predictions; the same seeds give the same result, other noise another."""
    run = Recorded(LTX2Pipeline, parts, monkeypatch, guidance_scale=3.0)
    again = Recorded(LTX2Pipeline, parts, monkeypatch, guidance_scale=3.0)
    assert run.result[0].isfinite().all()
    assert torch.equal(run.result[0], again.result[0])
    assert torch.equal(run.result[1], again.result[1])
    video, audio = run.states[0], run.states[1]
    assert not torch.equal(video.flatten()[: audio.numel()], audio.flatten())


@pytest.mark.parametrize("kind", [LTX2ImageToVideoPipeline, LTX2ConditionPipeline])
def test_a_given_picture_stays(kind: type[Any], parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a picture are the same in every evaluation, though all others get noise."""
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    given = {"image": picture} if kind is LTX2ImageToVideoPipeline else {"conditions": [LTX2VideoCondition(picture, 0)]}
    run = Recorded(kind, parts, monkeypatch, **UNGUIDED, **given)
    tokens = [inputs["hidden_states"] for inputs in run.inputs]
    assert len(tokens) == 7
    for later in tokens[1:]:
        torch.testing.assert_close(later[:, :4], tokens[0][:, :4], atol=1e-6, rtol=1e-6)
        assert ((later - tokens[0])[:, 4:].abs().amax(-1) > 1e-3).all()


def scheduled(**config: Any) -> Res2sScheduler:
    scheduler = Res2sScheduler(**config)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    scheduler.set_begin_index(0)
    return scheduler


def states(scheduler: Res2sScheduler, **options: Any) -> list[Tensor]:
    """A run by half: the velocity is half of the state."""
    sample, made = torch.linspace(-1, 1, 48).view(1, 6, 8), []
    for time in scheduler.timesteps:
        sample = scheduler.step(sample / 2, time, sample, **options).prev_sample
        made.append(sample)
    return made


def test_scheduler_alone() -> None:
    scheduler = scheduled(noise_seed=4)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 707.107, 500, 353.553, 250, 16.583, 1.1], abs=1e-2)
    wanted = states(scheduler)
    saved = Res2sScheduler.from_config(scheduler.config)
    assert saved.config.noise_seed == 4
    for other in (saved, pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        other.set_timesteps(sigmas=[1.0, 0.5, 0.25])
        assert all(map(torch.equal, states(other), wanted))
    by_generator = [states(scheduled(), generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert all(map(torch.equal, *by_generator))
    assert not torch.equal(by_generator[0][0], wanted[0])


def test_what_is_refused() -> None:
    x = torch.ones(1, 2, 2)
    with pytest.raises(RuntimeError, match="step needs a schedule: call set_timesteps first"):
        Res2sScheduler().step(x, 1.0, x)
    with pytest.raises(ValueError, match=r"per_token_timesteps is not served: .* give None"):
        scheduled().step(x, 1000.0, x, per_token_timesteps=x)
    odd = scheduled()
    odd.set_begin_index(1)
    with pytest.raises(RuntimeError, match="evaluation 1 ends a step that was not begun"):
        odd.step(x, 707.0, x)
