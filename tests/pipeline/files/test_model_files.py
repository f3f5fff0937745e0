"""Which files make a model: plain ones and variants side by side, shards, broken descriptions, parts downloaded by themselves."""

import json
import shutil
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
from ltxkern.pipeline.files.model_files import PARTS, weight_files
from ltxkern.pipeline.files.official_names import component_of, diffusers_name, official_name
from ltxkern.pipeline.memory.table import CheckpointPristine
from ltxkern.pipeline.model.components import BUILDABLE, Components
from tests.official_files import DEMO_SECTIONS, write_official

PLAIN = "diffusion_pytorch_model"


def names(folder: Path, variant: str | None = None) -> list[str]:
    return [path.name for path in weight_files(folder, variant)]


@pytest.mark.parametrize(
    ("there", "variant", "wanted"),
    [
        (["PLAIN", "PLAIN.fp16"], None, ["PLAIN"]),
        (["PLAIN", "PLAIN.fp16"], "fp16", ["PLAIN.fp16"]),
        (["model", "model.bf16", "model.fp8-e4m3"], None, ["model"]),
        (["model", "model.bf16", "model.fp8-e4m3"], "fp8-e4m3", ["model.fp8-e4m3"]),
        (["PLAIN.fp16"], None, ["PLAIN.fp16"]),
        (["PLAIN"], "fp16", ["PLAIN"]),
        (["PLAIN", "consolidated"], None, ["PLAIN"]),
        (["anything"], None, ["anything"]),
        (["PLAIN-00001-of-00002", "PLAIN-00002-of-00002", "PLAIN.fp16"], None, ["PLAIN-00001-of-00002", "PLAIN-00002-of-00002"]),
        (["PLAIN", "PLAIN.fp16-00001-of-00001"], "fp16", ["PLAIN.fp16-00001-of-00001"]),
        (["model.gguf"], None, "found 0 (files such as model.gguf are not read)"),
        ([], None, "expected one .safetensors file or an index of several, found 0"),
        (["one", "other"], None, "found 2 (one.safetensors, other.safetensors)"),
        (["PLAIN.fp16", "PLAIN.bf16"], None, "found the variants bf16, fp16: name one"),
        (["PLAIN", "PLAIN.fp16"], "fp61", "has no variant 'fp61': use fp16, or none"),
        (["PLAIN-00001-of-00003", "PLAIN-00003-of-00003"], None, "of 3 files, number 2 is missing"),
    ],
)  # fmt: skip
def test_the_weights_of_a_folder(
    tmp_path: Path, there: list[str], variant: str | None, wanted: list[str] | str
) -> None:
    for name in there:
        (tmp_path / (name if "gguf" in name else f"{name.replace('PLAIN', PLAIN)}.safetensors")).touch()
    if isinstance(wanted, str):
        with pytest.raises(CheckpointError) as error:
            names(tmp_path, variant)
        assert wanted in str(error.value)
        assert str(tmp_path) in str(error.value)
    else:
        assert names(tmp_path, variant) == [f"{name.replace('PLAIN', PLAIN)}.safetensors" for name in wanted]


def test_an_index_names_the_shards_of_its_own_variant(tmp_path: Path) -> None:
    for index, file in (
        (f"{PLAIN}.safetensors.index.json", "a.safetensors"),
        (f"{PLAIN}.safetensors.index.fp16.json", "b.safetensors"),
    ):
        (tmp_path / index).write_text(json.dumps({"weight_map": {"x": file}}))
        (tmp_path / file).touch()
    assert names(tmp_path) == ["a.safetensors"]
    assert names(tmp_path, "fp16") == ["b.safetensors"]
    (tmp_path / f"{PLAIN}.safetensors.index.fp16.json").write_text("{")
    assert names(tmp_path) == ["a.safetensors"]
    with pytest.raises(CheckpointError, match=r"index\.fp16\.json: expected a readable"):
        names(tmp_path, "fp16")


def test_the_plain_weights_are_loaded_and_are_their_own_pristine_source(
    demo: Components, folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    plain = next((model / "transformer").glob("*.safetensors"))
    save_file({k: (v * 2).half() for k, v in load_file(plain).items()}, plain.with_name(f"{PLAIN}.fp16.safetensors"))
    for variant, factor in ((None, 1), ("fp16", 2)):
        files = find_model(model, variant=variant)
        weight = load_component(files, "transformer", dtype=torch.float32).proj_in.weight
        wanted = demo.transformer.proj_in.weight * factor  # type: ignore[union-attr]
        torch.testing.assert_close(weight, wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(CheckpointPristine(files, torch.float32).fetch("proj_in"), weight)


INDEX = f"{PLAIN}.safetensors.index.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, "{}", "expected a weight_map of tensors to files, got None"),
        (INDEX, LFS, "a git-LFS pointer in place of the file"),
        (INDEX, "[1]", "expected an object, got list"),
        (INDEX, '{"weight_map": [1]}', "expected a weight_map"),
        (INDEX, '{"weight_map": {"a": 1}}', "expected file names in its weight_map"),
        (INDEX, "", "it is empty: download it again"),
        (INDEX, "<!DOCTYPE html><html>", "an HTML page in place of the file"),
        (INDEX, '{"weight_map": {', "Expecting property name"),
        ("config.json", "[]", "expected an object, got list"),
        (
            "config.json",
            '{"_class_name": "X"}',
            "describes a X, expected LTX2Transformer or LTX2VideoTransformer3DModel",
        ),
        ("config.json", "{}", "configuration of the transformer lacks"),
        ("config.json", '{"num_layers": "two"}', "configuration of the transformer"),
        ("config.json", LFS, "a git-LFS pointer"),
        ("config.json", "Entry not found", "a text that begins 'Entry not found'"),
        ("../model_index.json", "", "it is empty"),
        ("../model_index.json", "[]", "expected an object"),
    ],
)
def test_broken_descriptions_are_named(folder: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "transformer", model / "transformer")
    (model / "model_index.json").write_text("{}")
    (model / "transformer" / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        load_component(model, "transformer")
    assert message in str(error.value)
    assert Path(name).name in str(error.value) or "fit" in message or "lacks" in message or "configuration" in message


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
    assert official_name("transformer", "proj_in.weight") == "model.diffusion_model.patchify_proj.weight"
