"""Every module around the transformer against the official outputs, loaded through the official-name loader.

Each module runs in fp64 and in fp32. The fp64 run shows that the formula is the official one: what is left is the
rounding of the official fp32 run, whatever the processor. The fp32 run adds rounding of its own, which depends on how
this processor sums a convolution (seen on one machine with different instruction sets: 7e-6 to 1.3e-5 in the
upsampler), so it gets `FP32_SLACK` times the tolerance.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ltxkern.pipeline.files.checkpoint import load_component
from ltxkern.pipeline.model.decode import decode_audio, decode_video, denormalize, normalize
from ltxkern.pipeline.model.text import connect
from ltxkern.pipeline.results.media import rgb_to_yuv420
from tests.golden import Golden, open_golden_modules
from tests.official_files import (
    audio_vae_section,
    generator_section,
    upsampler_section,
    vocoder_section,
    write_official,
)

TOLERANCE = 1e-5
VOCODER_TOLERANCE = 1e-4
FP32_SLACK = 5
PRECISIONS = pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=["fp64", "fp32"])
GOLDEN = open_golden_modules()
CONFIGS = GOLDEN.metadata["configs"]
GROUPS = ("text", "upsampler", "video_decoder", "video_encoder", "audio_decoder", "vocoder", "yuv420")


def weights(module: str) -> dict[str, torch.Tensor]:
    """The weights of a module by the rule in the metadata; filters come from the data."""
    rule = GOLDEN.metadata["weights"]
    tensors = {}
    for n, (key, shape) in enumerate(sorted(rule["shapes"][module].items())):
        if key.endswith("filter"):
            tensors[key] = GOLDEN[f"{module}/weights/{key}"]
            continue
        index = torch.arange(math.prod(shape), dtype=torch.float64)
        values = rule["s"][module] * torch.sin(rule["fa"] * (index + 1) + 0.11 * (n + 1))
        values += key.endswith(tuple(rule["plus_one"]))
        tensors[key] = values.float().reshape(shape)
    return tensors


def load(path: Path, component: str, tensors: dict[str, torch.Tensor], config: dict, **options: Any) -> Any:
    return load_component(write_official(path / "file.safetensors", tensors, config), component, **options)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """The tolerance in fp64, `FP32_SLACK` times the tolerance in fp32."""
    slack = 1 if actual.dtype == torch.float64 else FP32_SLACK
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=slack * tolerance)


def pairs(group: str, precision: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs in `precision` and outputs of a group: `in` with `out`, `in_9` with `out_9`."""
    inputs = [key for key in GOLDEN.keys(f"{group}/") if key.split("/")[1].split("_")[0] == "in"]
    assert inputs, f"no input of {group}"
    return [(GOLDEN[key].to(precision), GOLDEN[key.replace("/in", "/out")]) for key in inputs]


def test_no_group_goes_unchecked() -> None:
    assert {key.split("/")[0] for key in GOLDEN.tensors} == set(GROUPS)


@PRECISIONS
@torch.no_grad()
def test_text(tmp_path: Path, precision: torch.dtype) -> None:
    facts = CONFIGS["text"]
    prefixes = {
        "feature_extractor.": "text_embedding_projection.",
        "video_connector.": "model.diffusion_model.video_embeddings_connector.",
        "audio_connector.": "model.diffusion_model.audio_embeddings_connector.",
    }
    tensors = {}
    for key, value in weights("text").items():
        start = key.split(".")[0] + "."
        tensors[prefixes[start] + key.removeprefix(start)] = value
    section = {
        "caption_channels": facts["hidden"],
        "connector_num_attention_heads": facts["video"]["heads"],
        "connector_attention_head_dim": facts["video"]["head_dim"],
        "connector_num_layers": facts["video"]["layers"],
        "connector_num_learnable_registers": facts["video"]["registers"],
        "connector_positional_embedding_max_pos": [facts["max_pos"]],
        "connector_apply_gated_attention": facts["gated"],
        "audio_connector_num_attention_heads": facts["audio"]["heads"],
        "audio_connector_attention_head_dim": facts["audio"]["head_dim"],
        "rope_type": "split",
        "frequencies_precision": "float64",
    }
    connectors = load(tmp_path, "connectors", tensors, {"transformer": section}, dtype=precision)
    features = {}
    for name in ("video", "audio"):
        projection = getattr(connectors, f"{name}_text_proj_in")
        projection.register_forward_hook(lambda module, args, out, name=name: features.__setitem__(name, out))
    embeddings = connect(connectors, GOLDEN["text/hidden_states"].to(precision), GOLDEN["text/mask"])
    for name in ("video", "audio"):
        close(features[name], GOLDEN[f"text/features_{name}"])
        close(getattr(embeddings, name), GOLDEN[f"text/out_{name}"])


@PRECISIONS
@torch.no_grad()
def test_upsampler(tmp_path: Path, precision: torch.dtype) -> None:
    facts = CONFIGS["upsampler"]
    section = upsampler_section(**{k: facts[k] for k in ("in_channels", "mid_channels", "num_blocks_per_stage")})
    upsampler = load(tmp_path, "upsampler", weights("upsampler"), section, dtype=precision)
    for latent, expected in pairs("upsampler", precision):
        close(upsampler(latent), expected)


def video_vae(path: Path, part: str, precision: torch.dtype) -> Any:
    decoder, encoder = CONFIGS["video_decoder"], CONFIGS["video_encoder"]
    section = {
        "latent_channels": decoder["latent_channels"],
        "patch_size": decoder["patch_size"],
        "encoder_blocks": encoder["encoder_blocks"],
        "decoder_blocks": decoder["decoder_blocks"],
        "decoder_base_channels": decoder["base_channels"],
        "causal_decoder": decoder["causal"],
        "timestep_conditioning": decoder["timestep_conditioning"],
        "spatial_padding_mode": decoder["spatial_padding"],
    }
    tensors = {
        f"vae.{key}" if key.startswith("per_channel_statistics.") else f"vae.{part}.{key}": value
        for key, value in weights(f"video_{part}").items()
    }
    return load(path, "video_vae", tensors, {"vae": section}, dtype=precision, parts=(part,))


@PRECISIONS
@torch.no_grad()
def test_video_decoder(tmp_path: Path, precision: torch.dtype) -> None:
    vae = video_vae(tmp_path, "decoder", precision)
    for latent, expected in pairs("video_decoder", precision):
        close(vae.decode(denormalize(latent, vae)).sample, expected)
        pictures = torch.cat(list(decode_video(vae, latent, tiling=None)))
        close(pictures, ((expected[0] + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0))


@PRECISIONS
@torch.no_grad()
def test_video_encoder(tmp_path: Path, precision: torch.dtype) -> None:
    vae = video_vae(tmp_path, "encoder", precision)
    for pixels, expected in pairs("video_encoder", precision):
        close(normalize(vae.encode(pixels).latent_dist.mode(), vae), expected)


class _KeepMel(torch.nn.Module):
    """Stands where the vocoder stands and keeps the spectrogram that reaches it."""

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        self.mel = mel
        return mel.flatten(2)


@PRECISIONS
@torch.no_grad()
def test_audio_decoder(tmp_path: Path, precision: torch.dtype) -> None:
    facts = CONFIGS["audio_decoder"]
    section = audio_vae_section(**{k: facts[k] for k in ("ch", "ch_mult", "num_res_blocks", "z_channels", "mel_bins")})
    tensors = {
        f"audio_vae.{key}" if key.startswith("per_channel_statistics.") else f"audio_vae.decoder.{key}": value
        for key, value in weights("audio_decoder").items()
    }
    vae = load(tmp_path, "audio_vae", tensors, {"audio_vae": section}, dtype=precision)
    for latent, expected in pairs("audio_decoder", precision):
        keep = _KeepMel()
        decode_audio(vae, keep, latent)
        close(keep.mel, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_vocoder(tmp_path: Path, dtype: torch.dtype) -> None:
    facts = CONFIGS["vocoder"]
    blocks = (facts["resblock_kernels"], facts["dilations"])
    core, bwe = (
        generator_section(facts[part]["initial"], facts[part]["rates"], facts[part]["kernels"], *blocks)
        for part in ("core", "bwe")
    )
    stft = facts["mel_stft"]
    section = vocoder_section(core, bwe, hop=stft["hop"], n_fft=stft["n_fft"], mels=stft["mels"])
    tensors = {f"vocoder.{key}": value for key, value in weights("vocoder").items()}
    # The vocoder runs in fp32 whatever dtype the other components are loaded in.
    vocoder = load(tmp_path, "vocoder", tensors, {"vocoder": section}, dtype=dtype)
    mel = GOLDEN["vocoder/mel"]
    for precision in (torch.float32, torch.float64):
        vocoder.to(precision)
        close(vocoder.vocoder(mel.to(precision)), GOLDEN["vocoder/out_core"], VOCODER_TOLERANCE)
        close(vocoder(mel.to(precision)), GOLDEN["vocoder/out"], VOCODER_TOLERANCE)


@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_yuv420(dtype: torch.dtype, suffix: str) -> None:
    rgb = GOLDEN["yuv420/rgb"]
    packed = rgb_to_yuv420(rgb.permute(0, 2, 3, 1).to(dtype))
    assert packed.flatten().tolist() == GOLDEN[f"yuv420/packed_{suffix}"].flatten().tolist()


def test_yuv420_planes() -> None:
    rgb, luma, chroma = GOLDEN["yuv420/rgb"], GOLDEN["yuv420/y"], GOLDEN["yuv420/uv"]
    height, width = rgb.shape[-2:]
    packed = rgb_to_yuv420(rgb.permute(0, 2, 3, 1)).flatten().float()
    close(packed[: height * width], luma.clamp(0, 255).floor().flatten())
    close(packed[height * width :], chroma.clamp(0, 255).floor().flatten())


def test_reader_names_a_missing_group() -> None:
    with pytest.raises(AssertionError, match="no key"):
        Golden(GOLDEN.path, {}, {}).keys("vocoder/")
