"""The demo model: deterministic, finite, and sensitive to everything a generator feeds it."""

import time

import torch

from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.model.components import BUILDABLE, COMPONENT_NAMES, Components
from ltxkern.pipeline.model.inputs import ModalityInput
from ltxkern.pipeline.model.text import encode_prompts
from ltxkern.pipeline.model.transformer import predict_x0


def state(components: Components) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name in (*BUILDABLE, "text_encoder")
        for key, value in getattr(components, name).state_dict().items()
    }


def test_same_seed_same_weights_and_no_global_draws(demo: Components) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = state(build_demo())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    for key, value in state(demo).items():
        assert torch.equal(value, again[key]), key


def test_another_seed_gives_another_model(demo: Components) -> None:
    other = state(build_demo(1))
    fixed = ("filter", "basis", "position_ids")
    same = [k for k, v in state(demo).items() if torch.equal(v, other[k]) and not k.endswith(fixed)]
    assert same == []


def test_every_component_is_there_in_seconds() -> None:
    start = time.perf_counter()
    components = build_demo()
    assert time.perf_counter() - start < 20
    assert all(getattr(components, name) is not None for name in COMPONENT_NAMES)


def test_bf16_weights_are_the_rounded_ones(demo: Components) -> None:
    rounded = build_demo(dtype=torch.bfloat16)
    for name in BUILDABLE:
        dtype = torch.float32 if name == "vocoder" else torch.bfloat16
        actual = getattr(rounded, name).state_dict()
        for key, value in getattr(demo, name).state_dict().items():
            assert torch.equal(actual[key], value.to(dtype)), f"{name} {key}"


def predict(demo: Components, prompt: str = "a door", seed: int = 0) -> dict[str, torch.Tensor]:
    (context,) = encode_prompts(demo.tokenizer, demo.text_encoder, demo.connectors, [prompt], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(1, 18, 16, generator=generator), torch.randn(1, 17, 32, generator=generator)]
    positions = [torch.arange(n * axes * 2).reshape(1, axes, n, 2) / 10 for n, axes in ((18, 3), (17, 1))]
    video = ModalityInput(latents[0], 0.9, None, positions[0], context.video)
    audio = ModalityInput(latents[1], 0.9, None, positions[1], context.audio)
    return predict_x0(demo.transformer, video, audio)


def test_predictions_depend_on_prompt_and_noise(demo: Components) -> None:
    base = predict(demo)
    for name, value in base.items():
        assert torch.isfinite(value).all()
        assert 0.3 < value.std() < 3
        assert (predict(demo, prompt="a hill in the rain")[name] - value).std() > 0.05, "the prompt does not matter"
        assert (predict(demo, seed=1)[name] - value).std() > 0.3


@torch.no_grad()
def test_decoders_give_pictures_and_sound(demo: Components) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = demo.video_vae.decode(torch.randn(1, 16, 2, 2, 3, generator=generator)).sample
    assert pictures.shape == (1, 3, 9, 64, 96)
    assert 0.2 < pictures.std() < 1.5
    mel = demo.audio_vae.decode(torch.randn(1, 2, 9, 16, generator=generator)).sample
    assert mel.shape == (1, 2, 4 * 9 - 3, 64)
    waveform = demo.vocoder(mel)
    assert waveform.shape == (1, 2, 480 * (4 * 9 - 3))
    assert 0.01 < waveform.std() < 0.5
    assert waveform.abs().max() <= 1


@torch.no_grad()
def test_upsampler_and_encoder(demo: Components) -> None:
    generator = torch.Generator().manual_seed(0)
    larger = demo.upsampler(torch.randn(1, 16, 3, 2, 3, generator=generator))
    assert larger.shape == (1, 16, 3, 4, 6)
    assert 0.2 < larger.std() < 3
    latent = demo.video_vae.encode(torch.rand(1, 3, 1, 64, 96, generator=generator) * 2 - 1).latent_dist.mode()
    assert latent.shape == (1, 16, 1, 2, 3)
    assert 0.1 < latent.std() < 3


def test_the_bandwidth_extension_hears_the_waveform(demo: Components) -> None:
    """The spectrogram rows are a Fourier transform: a tone lands in its own mel band."""
    time_axis = torch.arange(4000) / 16000
    loudest = []
    for frequency in (300, 1000, 3000, 6000):
        mel, *_ = demo.vocoder.mel_stft(torch.sin(2 * torch.pi * frequency * time_axis)[None])
        loudest.append(int(mel[0, :, 20:].mean(-1).argmax()))
    assert loudest == sorted(set(loudest))


def test_lora_moves_weights_moderately(demo: Components) -> None:
    lora = demo_lora()
    again, other = demo_lora(), demo_lora(1)
    assert all(torch.equal(value, again[key]) and not torch.equal(value, other[key]) for key, value in lora.items())
    assert {value.shape[0 if key.endswith("lora_A.weight") else 1] for key, value in lora.items()} == {4}
    weight = demo.transformer.get_submodule("transformer_blocks.0.attn1.to_q").weight
    key = "diffusion_model.transformer_blocks.0.attn1.to_q.lora_"
    delta = lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
    assert 0.1 < delta.std() / weight.std() < 0.6
