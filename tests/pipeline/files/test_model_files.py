"""Which files make a model: plain ones and variants side by side, shards, broken descriptions, parts downloaded by themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files.checkpoint import (
    CheckpointError,
    find_model,
    load_component,
)
from ltxkern.pipeline.files.stored import weight_files
from ltxkern.pipeline.memory.table import CheckpointPristine
from ltxkern.pipeline.model.components import Components

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
        (["PLAIN-00001-of-00002", "PLAIN-00002-of-00002", "PLAIN-00001-of-00001"], None, "the numbered files of several downloads"),
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
