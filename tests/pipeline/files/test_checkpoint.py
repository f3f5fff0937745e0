"""Official files, diffusers folders and LoRA files: names, shapes, round trips, and what is said when they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files import checkpoint, official_config
from ltxkern.pipeline.files.checkpoint import (
    CheckpointError,
    component_bytes,
    component_config,
    find_model,
    load_component,
    load_components,
)
from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.files.official_names import component_of, diffusers_name, official_name
from ltxkern.pipeline.model.components import BUILDABLE, PRODUCTION_CONFIGS, Components, build
from tests.golden import DATA, open_golden_modules
from tests.official_files import (
    PRODUCTION_SECTIONS,
    PRODUCTION_UPSAMPLER,
    write_diffusers_demo,
    write_official_demo,
)

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


def header_config(component: str) -> dict[str, Any]:
    """Arguments of the published component, from the published header."""
    if component == "upsampler":
        return official_config.upsampler_config(PRODUCTION_UPSAMPLER)
    section = PRODUCTION_SECTIONS["transformer" if component == "connectors" else component.replace("video_", "")]
    if component == "connectors":
        return official_config.connectors_config(section, 49 * 3840)
    return getattr(official_config, f"{component}_config")(section)


@pytest.fixture(scope="module")
def demo() -> Components:
    return build_demo()


@pytest.fixture(scope="module")
def official(demo: Components, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_official_demo(tmp_path_factory.mktemp("official"), demo)


@pytest.fixture(scope="module")
def folder(demo: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusers_demo(tmp_path_factory.mktemp("diffusers"), demo)


def loaded_from(source: str, official: dict[str, Path], folder: Path, **options: Any) -> Components:
    if source == "diffusers":
        return load_components(folder, **options)
    extra = {name: official[name] for name in ("upsampler", "text_encoder")}
    return load_components(official["checkpoint"], **extra, **options)


@pytest.mark.parametrize("component", BUILDABLE)
def test_header_gives_the_production_model(component: str) -> None:
    by_header = build(component, header_config(component)).state_dict()
    by_table = build(component, PRODUCTION_CONFIGS[component]).state_dict()
    assert {k: v.shape for k, v in by_header.items()} == {k: v.shape for k, v in by_table.items()}
    wanted = PRODUCTION_CONFIGS[component]
    got = build(component, header_config(component)).config
    assert {k: list(got[k]) if isinstance(got[k], tuple) else got[k] for k in wanted} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items()
    }


def test_production_sizes() -> None:
    def size(component: str, part: str | None = None) -> int:
        module = build(component, PRODUCTION_CONFIGS[component])
        return sum(p.numel() for p in (getattr(module, part) if part else module).state_dict().values())

    assert size("transformer") == 18_988_838_144 == OFFICIAL["transformer"]["parameters"]
    assert (
        len(build("transformer", PRODUCTION_CONFIGS["transformer"]).state_dict()) == OFFICIAL["transformer"]["tensors"]
    )
    for name, (component, part) in {
        "upsampler": ("upsampler", None),
        "video_decoder": ("video_vae", "decoder"),
        "video_encoder": ("video_vae", "encoder"),
        "audio_decoder": ("audio_vae", "decoder"),
    }.items():
        statistics = sum(
            OFFICIAL[name]["shapes"].get(f"per_channel_statistics.{k}-of-means", [0])[0] for k in ("mean", "std")
        )
        counted = OFFICIAL[name]["parameters"]
        assert size(component, part) in (counted, counted - statistics), name
    vocoder = build("vocoder", PRODUCTION_CONFIGS["vocoder"])
    assert len(vocoder.state_dict()) == OFFICIAL["vocoder"]["tensors"]
    connectors = build("connectors", PRODUCTION_CONFIGS["connectors"])
    assert sum(p.numel() for p in connectors.video_connector.parameters()) == 1_612_546_304
    assert sum(p.numel() for p in connectors.audio_connector.parameters()) == 403_620_096


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


@pytest.mark.parametrize("source", ["official", "diffusers"])
def test_round_trip(source: str, demo: Components, official: dict[str, Path], folder: Path) -> None:
    components = loaded_from(source, official, folder, dtype=torch.float32)
    for name in BUILDABLE:
        module = getattr(components, name)
        expected = getattr(demo, name).state_dict()
        if name == "audio_vae":
            # Nothing encodes audio: half of the file stays unread.
            assert module.encoder is None
            expected = {key: value for key, value in expected.items() if not key.startswith("encoder.")}
        actual = module.state_dict()
        assert set(actual) == set(expected)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), f"{name} {key}"
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())
        assert not module.training


@torch.no_grad()
@pytest.mark.parametrize("source", ["official", "diffusers"])
def test_loaded_modules_give_the_same_outputs(source: str, demo: Components, official: dict, folder: Path) -> None:
    from ltxkern.pipeline.model.inputs import ModalityInput
    from ltxkern.pipeline.model.text import encode_prompts
    from ltxkern.pipeline.model.transformer import predict_velocity

    components = loaded_from(source, official, folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    video, audio, mel, latent = normal(1, 6, 16), normal(1, 5, 32), normal(1, 2, 5, 64), normal(1, 16, 2, 1, 2)
    sound = normal(1, 2, 3, 16)
    positions = torch.rand(1, 3, 6, 2, generator=generator), torch.rand(1, 1, 5, 2, generator=generator)
    outputs = []
    for parts in (demo, components):
        (context,) = encode_prompts(
            parts.tokenizer, parts.text_encoder, parts.connectors, ["a door"], dtype=torch.float32
        )
        velocity = predict_velocity(
            parts.transformer,
            ModalityInput(video, 0.5, None, positions[0], context.video),
            ModalityInput(audio, 0.5, None, positions[1], context.audio),
        )
        decoded = parts.video_vae.decode(latent).sample, parts.audio_vae.decode(sound).sample
        outputs.append((*velocity, *decoded, parts.vocoder(mel), parts.upsampler(latent)))
    for expected, actual in zip(*outputs, strict=True):
        # Weights mapped from a file lie on other alignments than drawn ones, and kernels then round elsewhere.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["official", "diffusers"])
def test_dtype(source: str, official: dict[str, Path], folder: Path) -> None:
    components = loaded_from(source, official, folder, dtype=torch.bfloat16)
    for name in (*BUILDABLE, "text_encoder"):
        dtypes = {p.dtype for p in getattr(components, name).parameters()}
        assert dtypes == {torch.float32 if name == "vocoder" else torch.bfloat16}, name
    assert components.vocoder is not None
    assert components.vocoder.vocoder.final_act_fn == "clamp"


def test_a_diffusers_vocoder_is_clamped_whatever_its_config_says(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / "vocoder").mkdir(parents=True)
    (target / "model_index.json").write_text("{}")
    config = json.loads((folder / "vocoder" / "config.json").read_text()) | {"final_act_fn": None}
    (target / "vocoder" / "config.json").write_text(json.dumps(config))
    save_file(load_file(next((folder / "vocoder").glob("*.safetensors"))), target / "vocoder" / "model.safetensors")
    assert load_component(target, "vocoder").vocoder.final_act_fn == "clamp"


def test_sharded_folder(folder: Path, tmp_path: Path) -> None:
    source, target = folder / "transformer", tmp_path / "model" / "transformer"
    target.mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(next(source.glob("*.safetensors")))
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, target / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_component(tmp_path / "model", "transformer", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    (target / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: no such file"):
        load_component(tmp_path / "model", "transformer")


def test_folder_with_one_official_file(official: dict[str, Path]) -> None:
    files = find_model(official["checkpoint"].parent)
    assert files.checkpoint == official["checkpoint"]
    assert files.upsampler == official["upsampler"]


def test_each_component_is_loaded_once_and_only_when_read(official: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = checkpoint.load_component

    def counted(files: Any, component: str, **options: Any) -> Any:
        calls.append(component)
        return real(files, component, **options)

    monkeypatch.setattr(checkpoint, "load_component", counted)
    components = load_components(official["checkpoint"], upsampler=official["upsampler"], dtype=torch.float32)
    assert calls == []
    assert not components.is_absent("transformer")
    assert components.is_absent("text_encoder")
    assert components.config("transformer") is not None
    assert components.config("transformer")["num_layers"] == 2  # type: ignore[index]
    assert calls == []
    first = components.vocoder
    assert components.vocoder is first
    assert components.is_loaded("vocoder")
    assert not components.is_loaded("transformer")
    assert components.text_encoder is None
    assert calls == ["vocoder"]
    components.release("vocoder")
    assert components.vocoder is not None
    assert calls == ["vocoder", "vocoder"]


def test_names_limit_what_may_be_loaded(official: dict[str, Path]) -> None:
    components = load_components(official["checkpoint"], names=["vocoder"], dtype=torch.float32)
    assert components.transformer is None
    assert components.vocoder is not None
    with pytest.raises(ValueError, match="vocodr"):
        load_components(official["checkpoint"], names=["vocodr"])


def test_demo_by_name() -> None:
    components = load_components("demo", dtype=torch.float32, names=["transformer", "tokenizer"])
    assert components.transformer is not None
    assert components.upsampler is None


def test_components_refuse_unknown_names() -> None:
    with pytest.raises(TypeError, match="unet"):
        Components(unet=None)
    with pytest.raises(AttributeError, match="unet"):
        _ = Components().unet  # type: ignore[attr-defined]


def test_bytes_from_headers(demo: Components, official: dict[str, Path], folder: Path) -> None:
    files = find_model(official["checkpoint"], upsampler=official["upsampler"])
    stored, halved = component_bytes(files), component_bytes(files, dtype=torch.bfloat16)
    for name in BUILDABLE:
        expected = sum(t.numel() * t.element_size() for t in getattr(demo, name).state_dict().values())
        assert stored[name] == expected, name
        assert halved[name] == (expected if name == "vocoder" else expected // 2), name
    by_folder = component_bytes(find_model(folder))
    assert {name: by_folder[name] for name in BUILDABLE} == stored
    assert by_folder["text_encoder"] > 0


def test_component_config_agrees_with_the_module(demo: Components, official: dict[str, Path], folder: Path) -> None:
    for files in (find_model(official["checkpoint"], upsampler=official["upsampler"]), find_model(folder)):
        for name in BUILDABLE:
            config = build(name, component_config(files, name)).config
            for key, value in getattr(demo, name).config.items():
                if not key.startswith("_"):
                    same = [list(v) if isinstance(v, tuple) else v for v in (config[key], value)]
                    assert same[0] == same[1], f"{name} {key}"
