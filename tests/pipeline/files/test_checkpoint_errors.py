"""Files, folders and hub ids that cannot serve: one clear sentence that names keys and file."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltxkern.pipeline.files.checkpoint import (
    CheckpointError,
    find_model,
    load_component,
    load_components,
    load_lora,
    read_header,
)
from ltxkern.pipeline.files.demo import build_demo
from tests.official_files import DEMO_SECTIONS, write_diffusers_demo, write_official, write_official_demo


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_official_demo(tmp_path_factory.mktemp("official"), build_demo())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusers_demo(tmp_path_factory.mktemp("diffusers"), build_demo())


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(source)
    change(tensors)
    return write_official(target, tensors, DEMO_SECTIONS)


PROJ_OUT = "model.diffusion_model.proj_out.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(PROJ_OUT), r"1 missing: proj_out\.bias"),
        (
            lambda t: t.update({"model.diffusion_model.extra": torch.ones(1)}),
            r"1 unexpected: model.diffusion_model.extra",
        ),
        (
            lambda t: t.update({PROJ_OUT: torch.ones(3)}),
            r"1 wrong shape: model.diffusion_model.proj_out.bias \(expected \(16,\), got \(3,\)\)",
        ),
        (
            lambda t: t.update({PROJ_OUT: t[PROJ_OUT].to(torch.float8_e4m3fn)}),
            r"1 unsupported dtype: model.diffusion_model.proj_out.bias \(F8_E4M3\)",
        ),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_misfit_names_keys_and_file(official: dict, tmp_path: Path, change: Callable, message: str) -> None:
    path = rewrite(official["checkpoint"], tmp_path / "odd.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_component(path, "transformer")
    assert str(path) in str(error.value)
    # The other components of the same file are not touched by it.
    load_component(path, "vocoder")


def test_all_kinds_of_misfit_in_one_message(official: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "transformer_blocks.1." in key]:
            del tensors[key]
        tensors["model.diffusion_model.extra"] = torch.ones(1)

    path = rewrite(official["checkpoint"], tmp_path / "odd.safetensors", change)
    with pytest.raises(CheckpointError, match=r"\d+ missing: .* and \d+ more; 1 unexpected"):
        load_component(path, "transformer")


def test_file_of_another_kind(official: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensors of the transformer"):
        load_component(official["upsampler"], "transformer")
    other = dict(DEMO_SECTIONS, transformer=dict(DEMO_SECTIONS["transformer"], cross_attention_adaln=False))
    path = write_official(tmp_path / "ltx2.safetensors", load_file(official["checkpoint"]), other)
    with pytest.raises(CheckpointError, match=r"ltx2.safetensors: not an LTX-2\.3 transformer"):
        load_component(path, "transformer")
    path = write_official(tmp_path / "bare.safetensors", load_file(official["checkpoint"]), {})
    with pytest.raises(CheckpointError, match="no configuration of the vocoder"):
        load_component(path, "vocoder")
    sections = dict(DEMO_SECTIONS, vocoder={"bwe": {}})
    path = write_official(tmp_path / "part.safetensors", load_file(official["checkpoint"]), sections)
    with pytest.raises(CheckpointError, match="configuration of the vocoder lacks 'vocoder'"):
        load_component(path, "vocoder")


def test_broken_files(official: dict[str, Path], tmp_path: Path) -> None:
    whole = official["checkpoint"].read_bytes()
    cases = {
        "cut": (whole[: len(whole) // 2], r"truncated, expected \d+ bytes, got \d+"),
        "header": (whole[:1000], "cut off in its header"),
        "empty": (b"", "not a safetensors file"),
        "text": (b"this is a text file, not weights" * 9, "not a safetensors file"),
        "json": ((16).to_bytes(8, "little") + b'["no", "object"]', "not a safetensors file"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_header(path)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_component(path, "vocoder")
        with pytest.raises(CheckpointError, match=message):
            load_lora(path)


@pytest.mark.parametrize("path", ["nowhere.safetensors", "./no/such/folder/deep", "/no/such/file.safetensors", "word"])
def test_missing_path(path: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_components(path)


def test_empty_folder_and_several_files(official: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"exactly one official LTX-2\.3 file, found none"):
        find_model(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(official["checkpoint"].read_bytes())
    with pytest.raises(CheckpointError, match=r"found a\.safetensors, b\.safetensors"):
        find_model(tmp_path)


def test_text_encoder_folder_that_is_none(official: dict[str, Path], tmp_path: Path) -> None:
    for component in ("text_encoder", "tokenizer"):
        with pytest.raises(CheckpointError, match="expected a folder with Gemma 3"):
            load_component(official["checkpoint"], component)
        files = find_model(official["checkpoint"], text_encoder=tmp_path)
        with pytest.raises(CheckpointError, match=f"not a readable {component}"):
            load_component(files, component)


def test_upsampler_that_is_not_there(official: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="upsampler: none lies with the model"):
        load_component(find_model(official["checkpoint"]), "upsampler")


def test_unknown_component(official: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="unet"):
        load_component(official["checkpoint"], "unet")
