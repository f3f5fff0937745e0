"""A component as it is stored: in any naming, in parts downloaded by themselves, with or without a configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files.checkpoint import (
    CheckpointError,
    ModelFiles,
    component_problem,
    find_model,
    load_component,
    load_components,
)
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.files.hub import PARTS
from ltxkern.pipeline.files.official_names import component_of, diffusers_name
from ltxkern.pipeline.memory.table import CheckpointPristine
from ltxkern.pipeline.model.components import BUILDABLE, Components
from tests.official_files import DEMO_SECTIONS, write_official


def split(source: Path, folder: Path, rename: Callable[[str, str], str], metadata: bool) -> dict[str, Path]:
    """Each component of an official file in a file of its own, its keys renamed."""
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in PARTS}
    for key, tensor in load_file(source).items():
        component = component_of(key)
        assert component is not None
        found[component][rename(component, key)] = tensor
    paths = {name: folder / f"{name}.safetensors" for name in PARTS}
    for name, tensors in found.items():
        write_official(paths[name], tensors, DEMO_SECTIONS if metadata else {})
    return paths


def bare(component: str, key: str) -> str:
    starts = ("model.diffusion_model.", "audio_vae.", "vae.")
    return (
        key.removeprefix("vocoder.")
        if component == "vocoder"
        else next((key.removeprefix(s) for s in starts if key.startswith(s)), key)
    )


RENAMES: dict[str, Callable[[str, str], str]] = {
    "official": lambda component, key: key,
    "bare": bare,
    "diffusion_model": lambda component, key: key.replace("model.diffusion_model.", "diffusion_model."),
    "diffusers": lambda component, key: str(diffusers_name(component, key)),
    "diffusers with a start": lambda component, key: f"{component}.{diffusers_name(component, key)}".replace(
        "video_vae.", "vae."
    ),
}


def same_model(components: Components, demo: Components) -> None:
    for name in PARTS:
        expected, state = getattr(demo, name).state_dict(), getattr(components, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in state.items()), name


@pytest.mark.parametrize("naming", RENAMES)
def test_a_model_of_parts_in_any_naming(
    demo: Components, official: dict[str, Path], tmp_path: Path, naming: str
) -> None:
    paths = split(official["checkpoint"], tmp_path, RENAMES[naming], metadata=True)
    found = FoundModel.of("demo", upsampler=official["upsampler"], text_encoder=official["text_encoder"], **paths)
    assert not found.is_demo
    assert [component_problem(found.files, name) for name in (*BUILDABLE, "text_encoder", "tokenizer")] == [None] * 8
    same_model(found.components(torch.float32), demo)
    assert CheckpointPristine(found.files, torch.float32).fetch("proj_in").shape == (64, 16)


def test_parts_beside_a_model_borrow_its_configuration(
    demo: Components, official: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    paths = split(official["checkpoint"], tmp_path / "parts", RENAMES["bare"], metadata=False)
    doubled = {key: tensor * 2 for key, tensor in load_file(paths["transformer"]).items()}
    save_file(doubled, paths["transformer"])
    files = find_model(official["checkpoint"], transformer=paths["transformer"], vocoder=paths["vocoder"])
    components = load_components(files, dtype=torch.float32)
    assert torch.equal(components.transformer.proj_in.weight, 2 * demo.transformer.proj_in.weight)  # type: ignore[union-attr]
    (tmp_path / "folder").mkdir()
    bare_file = paths["transformer"].rename(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    in_folder = load_component(find_model(official["checkpoint"], transformer=bare_file.parent), "transformer")
    assert torch.equal(in_folder.proj_in.weight, components.transformer.proj_in.weight.bfloat16())  # type: ignore[union-attr]
    bare_file.rename(paths["transformer"])
    assert torch.equal(components.vocoder.vocoder.conv_in.weight, demo.vocoder.vocoder.conv_in.weight)  # type: ignore[union-attr]
    with pytest.raises(
        CheckpointError, match=r"transformer\.safetensors: its header has no configuration of the transformer"
    ):
        load_component(ModelFiles(parts={"transformer": paths["transformer"]}), "transformer")


def test_what_split_downloads_put_together_is_found_apart(
    demo: Components, official: dict[str, Path], tmp_path: Path
) -> None:
    """The vocoder with the audio VAE; the connectors with the transformer, but their text projection in a file of its own."""
    whole = load_file(official["checkpoint"])
    groups = {
        "transformer": ("model.diffusion_model.",),
        "connectors": ("text_embedding_projection.",),
        "video_vae": ("vae.",),
        "audio_vae": ("audio_vae.", "vocoder."),
    }
    paths = {}
    for name, starts in groups.items():
        tensors = {key: tensor for key, tensor in whole.items() if key.startswith(starts)}
        paths[name] = write_official(
            tmp_path / f"{name}.safetensors", tensors, DEMO_SECTIONS if name != "connectors" else {}
        )
    found = FoundModel.of("demo", text_encoder=official["text_encoder"], **paths)
    same_model(found.components(torch.float32), demo)
    del paths["connectors"]
    problem = component_problem(FoundModel.of("demo", **paths).files, "connectors")
    assert problem is not None
    assert "holds no text projection" in problem


def test_a_folder_may_be_a_part_and_a_part_may_be_missing(
    demo: Components, folder: Path, official: dict[str, Path], tmp_path: Path
) -> None:
    for place in (folder, folder / "transformer"):
        files = find_model(official["checkpoint"], transformer=place)
        assert torch.equal(
            load_component(files, "transformer", dtype=torch.float32).proj_in.weight, demo.transformer.proj_in.weight
        )  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_model(official["checkpoint"], transformer=tmp_path / "none.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformer: no such folder"):
        load_component(tmp_path, "transformer")
