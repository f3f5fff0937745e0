"""Latent layout, noise, conditioning and RoPE against the official numbers in golden.safetensors."""

import re
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb

import ltxkern
from ltxkern.ops.res2s import post_process
from ltxkern.pipeline.model.conditioning import ImageCondition, apply_image_conditions
from ltxkern.pipeline.model.transformer import LTX2Transformer
from ltxkern.pipeline.sampling.latents import (
    AudioLatentShape,
    LatentState,
    VideoLatentShape,
    audio_positions,
    keyframes_mask,
    patchify,
    timesteps_from_mask,
    to_denoised,
    to_velocity,
    unpatchify,
    video_positions,
)
from tests.golden import matching
from tests.golden import open_golden as golden

COVERS = ("helpers/", "layout/", "cond/", "rope/")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
HELPER_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


exact = partial(close, tolerance=0.0)


def layouts() -> list[tuple[str, dict[str, Any]]]:
    found = matching(r"layout/([^/]+)/video_tokens")
    return [(match[1], golden().metadata["meta"][match[0]]) for match in found]


def shapes(meta: dict[str, Any]) -> tuple[VideoLatentShape, AudioLatentShape]:
    video = VideoLatentShape.from_pixels(
        meta["frames"], meta["height"], meta["width"], channels=meta["latent_shape"][1], batch=meta["batch"]
    )
    _, channels, _, mel_bins = meta["audio_shape"]
    audio = AudioLatentShape.from_pixels(
        meta["frames"], meta["fps"], channels=channels, mel_bins=mel_bins, batch=meta["batch"]
    )
    return video, audio


def test_shapes_follow_from_pixels() -> None:
    for _, meta in layouts():
        video, audio = shapes(meta)
        assert list(video.dims()) == meta["latent_shape"]
        assert list(audio.dims()) == meta["audio_shape"]


def test_tokens_and_back() -> None:
    for name, meta in layouts():
        group = golden().group(f"layout/{name}/")
        for shape, latent, tokens in zip(
            shapes(meta), ("video_latent_5d", "audio_latent_4d"), ("video_tokens", "audio_tokens"), strict=True
        ):
            exact(patchify(group[latent]), group[tokens])
            exact(unpatchify(group[tokens], shape), group[latent])


def test_positions() -> None:
    for name, meta in layouts():
        video, audio = shapes(meta)
        exact(video_positions(video, meta["fps"]), golden()[f"layout/{name}/video_positions"])
        exact(audio_positions(audio), golden()[f"layout/{name}/audio_positions"])


def test_keyframes_mask() -> None:
    for name, meta in layouts():
        exact(keyframes_mask(shapes(meta)[0]), golden()[f"layout/{name}/keyframes_mask"])


def test_noise_step() -> None:
    clean, mask, noise = (golden()[f"helpers/{key}"] for key in ("clean", "mask", "noiser_noise"))
    for match in matching(r"helpers/noiser/(f32|bf16)/scale([\d.]+)"):
        dtype = DTYPES[match[1]]
        state = LatentState(
            golden()["helpers/x"].to(dtype), clean.to(dtype), mask, torch.zeros(0), AudioLatentShape(mask.shape[1])
        )
        noised = state.noise(float(match[2]), noise=noise.to(dtype))
        close(noised.latent, golden()[match[0]], HELPER_TOLERANCE[dtype])


def test_post_process() -> None:
    for match in matching(r"helpers/post_process/(f32|bf16)"):
        dtype = DTYPES[match[1]]
        x0, clean = golden()["helpers/x"].to(dtype), golden()["helpers/clean"].to(dtype)
        close(post_process(x0, golden()["helpers/mask"], clean), golden()[match[0]], HELPER_TOLERANCE[dtype])


def test_velocity_and_denoised() -> None:
    for match in matching(r"helpers/(to_velocity|to_denoised)_s([\d.]+)/(f32|bf16)"):
        dtype = DTYPES[match[3]]
        x, other = golden()["helpers/x"].to(dtype), golden()["helpers/clean"].to(dtype)
        convert = to_velocity if match[1] == "to_velocity" else to_denoised
        close(convert(x, other, float(match[2])), golden()[match[0]], HELPER_TOLERANCE[dtype])


def test_timesteps_per_token() -> None:
    timesteps = {}
    for match in matching(r"helpers/timesteps_from_mask_s([\d.]+)"):
        timesteps[match[1]] = timesteps_from_mask(golden()["helpers/mask"], float(match[1]))
        close(timesteps[match[1]], golden()[match[0]], 1e-6)
    for match in matching(r"helpers/to_denoised_tokens/(f32|bf16)"):
        dtype = DTYPES[match[1]]
        x, velocity = golden()["helpers/x"].to(dtype), golden()["helpers/clean"].to(dtype)
        results = [to_denoised(x, velocity, steps) for steps in timesteps.values()]
        errors = [(result - golden()[match[0]]).abs().max() for result in results]
        assert min(errors) <= HELPER_TOLERANCE[dtype]


def test_modulated_norm() -> None:
    x, scale, shift = (golden()[f"helpers/adaln/{key}"] for key in ("x", "scale", "shift"))
    for match in matching(r"helpers/adaln/out/(f32|bf16)"):
        dtype = DTYPES[match[1]]
        out = ltxkern.rms_norm_modulate(x.to(dtype), scale.to(dtype), shift.to(dtype))
        close(out, golden()[match[0]], 3 * HELPER_TOLERANCE[dtype])


def conditioned(name: str, frame: int, strength: float) -> LatentState:
    latent = golden()[f"cond/{name}/image_latent"]
    meta = dict(layouts())[name]
    state = LatentState.create(
        shapes(meta)[0], fps=meta["fps"], latent=golden()[f"layout/{name}/video_latent_5d"], dtype=latent.dtype
    )
    condition = ImageCondition("unused.png", frame, strength)
    return apply_image_conditions(state, [condition], [latent], fps=meta["fps"])


def test_first_frame_condition() -> None:
    for match in matching(r"cond/([^/]+)/latent_index0_s([\d.]+)/mask"):
        state = conditioned(match[1], 0, float(match[2]))
        exact(state.mask, golden()[match[0]])
        exact(state.clean, golden()[match[0].removesuffix("mask") + "clean"])
        exact(state.latent, golden()[f"layout/{match[1]}/video_tokens"])


def test_keyframe_condition() -> None:
    for match in matching(r"cond/([^/]+)/keyframe(\d+)/positions"):
        expected = golden().group(match[0].removesuffix("positions"))
        strength = float(1 - expected["denoise_mask"][0, -1, 0].double())
        state = conditioned(match[1], int(match[2]), strength)
        count = state.shape.tokens
        exact(state.positions, expected["positions"])
        exact(state.mask, expected["denoise_mask"])
        exact(state.latent, expected["latent"])
        exact(state.clean, expected["clean_latent"])
        assert isinstance(state.shape, VideoLatentShape)
        exact(keyframes_mask(state.shape, appended=state.latent.shape[1] - count), expected["keyframes_mask"])
        cleared = state.clear_conditioning()
        exact(cleared.latent, state.latent[:, :count])
        assert bool((cleared.mask == 1).all())


@cache
def rope_modules(heads: int, video_pairs: int, audio_pairs: int) -> LTX2Transformer:
    """A transformer without blocks whose rotary tables have the golden sizes."""
    return LTX2Transformer(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=2 * video_pairs,
        cross_attention_dim=heads * 2 * video_pairs,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=heads,
        audio_attention_head_dim=2 * audio_pairs,
        audio_cross_attention_dim=heads * 2 * audio_pairs,
        num_layers=0,
        caption_channels=8,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        rope_type="split",
        rope_double_precision=True,
        use_prompt_embeddings=False,
    )


def test_rotary_tables() -> None:
    for match in matching(r"rope/([^/]+)/f64/(video|audio|av_cross_video)/cos"):
        name, kind = match[1], match[2]
        video, audio = (golden()[f"rope/{name}/f64/{key}/cos"] for key in ("video", "audio"))
        model = rope_modules(video.shape[1], video.shape[3], audio.shape[3])
        video_shape, audio_shape = shapes(dict(layouts())[name])
        positions = {
            "video": video_positions(video_shape, dict(layouts())[name]["fps"]),
            "audio": audio_positions(audio_shape),
        }
        if kind == "video":
            tables = model.rope(positions["video"])
        elif kind == "audio":
            tables = model.audio_rope(positions["audio"])
        else:
            tables = model.cross_attn_rope(positions["video"][:, :1])
        for part, table in zip(("cos", "sin"), tables, strict=True):
            close(table, golden()[f"rope/{name}/f64/{kind}/{part}"], 6e-5)


def test_rotary_application() -> None:
    for match in matching(r"rope/([^/]+)/apply/in"):
        tables = tuple(golden()[f"rope/{match[1]}/f64/video/{part}"] for part in ("cos", "sin"))
        out = apply_split_rotary_emb(golden()[match[0]], tables)
        close(out, golden()[match[0].removesuffix("in") + "out"], 3e-6)


@pytest.mark.parametrize("group", ["helpers/", "layout/", "cond/", "rope/"])
def test_every_key_is_known(group: str) -> None:
    """A key that no test here reads would be a check that silently does not happen."""
    known = (
        r"helpers/(x|clean|mask|noiser_noise|adaln/(x|scale|shift|out/\w+)|noiser/.*|post_process/\w+"
        r"|timesteps_from_mask_s[\d.]+|to_(velocity|denoised)_s[\d.]+/\w+|to_denoised_tokens/\w+)"
        r"|layout/[^/]+/(video_latent_5d|video_tokens|video_positions|audio_latent_4d|audio_tokens|audio_positions"
        r"|keyframes_mask)"
        r"|cond/[^/]+/(image_latent|latent_index0_s[\d.]+/(mask|clean)"
        r"|keyframe\d+/(positions|latent|clean_latent|denoise_mask|keyframes_mask))"
        r"|rope/[^/]+/(f64/(video|audio|av_cross_video)/(cos|sin)|apply/(in|out))"
    )
    unknown = [key for key in golden().keys(group) if not re.fullmatch(known, key)]
    assert not unknown
