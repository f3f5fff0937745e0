"""Names of official tensors against the published shapes: every one has a place in the modules, and back."""

import json

import pytest

from ltxkern.pipeline.files.official_names import component_of, diffusers_name, official_name
from ltxkern.pipeline.model.components import BUILDABLE, PRODUCTION_CONFIGS, build
from tests.golden import DATA, open_golden_modules

OFFICIAL = json.loads((DATA / "official_shapes.json").read_text())


# Start of the keys of a listed module in an official file, and the component it belongs to.
LISTED = {
    "transformer": ("transformer", "model.diffusion_model."),
    "video_decoder": ("video_vae", "vae.decoder."),
    "video_encoder": ("video_vae", "vae.encoder."),
    "audio_decoder": ("audio_vae", "audio_vae.decoder."),
    "vocoder": ("vocoder", "vocoder."),
    "upsampler": ("upsampler", ""),
}


def file_key(module: str, key: str) -> str:
    """A listed key as it stands in the official file."""
    prefix = LISTED[module][1]
    if key.startswith("per_channel_statistics."):
        prefix = prefix.split(".")[0] + "."
    return prefix + key


@pytest.mark.parametrize("module", sorted(LISTED))
def test_official_names_and_shapes(module: str) -> None:
    component = LISTED[module][0]
    state = build(component, PRODUCTION_CONFIGS[component]).state_dict()
    for key, shape in OFFICIAL[module]["shapes"].items():
        stored = file_key(module, key)
        name = diffusers_name(component, stored)
        assert name in state, key
        assert list(state[name].shape) == shape, key
        assert official_name(component, name) == stored
        if component != "upsampler":
            assert component_of(stored) == component


@pytest.mark.parametrize("component", BUILDABLE)
def test_names_are_one_to_one(component: str) -> None:
    names = list(build(component, PRODUCTION_CONFIGS[component]).state_dict())
    keys = [official_name(component, name) for name in names]
    assert len(set(keys)) == len(names)
    assert [diffusers_name(component, key) for key in keys] == names


def test_connector_names() -> None:
    state = build("connectors", PRODUCTION_CONFIGS["connectors"]).state_dict()
    prefix = "model.diffusion_model."
    for key in open_golden_modules().metadata["weights"]["shapes"]["text"]:
        stored = key.replace("feature_extractor.", "text_embedding_projection.")
        for modality in ("video", "audio"):
            stored = stored.replace(f"{modality}_connector.", f"{prefix}{modality}_embeddings_connector.")
        assert component_of(stored) == "connectors"
        assert diffusers_name("connectors", stored) in state, key
        assert official_name("connectors", diffusers_name("connectors", stored) or "") == stored


def test_video_vae_without_the_vae_prefix_and_with_other_statistics() -> None:
    assert diffusers_name("video_vae", "decoder.conv_in.conv.weight") == "decoder.conv_in.conv.weight"
    assert diffusers_name("video_vae", "per_channel_statistics.mean-of-means") == "latents_mean"
    assert diffusers_name("video_vae", "vae.per_channel_statistics.mean-of-stds") is None
