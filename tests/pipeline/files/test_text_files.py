"""The text encoder's files: every layout that people have gives the same states; a tokenizer that does not belong is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltxkern.pipeline.files.checkpoint import (
    CheckpointError,
    ModelFiles,
    component_config,
    component_problem,
    find_model,
    load_component,
)
from ltxkern.pipeline.files.text_files import text_encoder_files
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.text import text_hidden_states, tokenize


@pytest.fixture
def gemma(official: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(official["text_encoder"], tmp_path / "gemma")


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config) or config))


def rewrite(folder: Path, rename: Callable[[str], str | None], target: Path | None = None) -> Path:
    """The weights under other names; None leaves one out."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(
        {name: tensor.clone() for key, tensor in tensors.items() if (name := rename(key)) is not None}, target or path
    )
    return target or path


def text_only(key: str) -> str | None:
    return "model." + key.split("language_model.")[-1].removeprefix("model.") if "language_model" in key else None


@torch.no_grad()
@pytest.mark.parametrize("layout", ["multimodal", "text only", "single file", "single file, config in it"])
def test_every_layout_gives_the_same_states(demo: Components, gemma: Path, layout: str) -> None:
    place = gemma
    if layout == "text only":
        rewrite(gemma, text_only)
        change_config(gemma, lambda config: config["text_config"])
    elif layout.startswith("single"):
        place = rewrite(gemma, text_only, gemma / "encoder.safetensors")
        (gemma / "model.safetensors").unlink()
        if "in it" in layout:
            tensors, config = load_file(place), (gemma / "config.json").read_text()
            save_file(tensors, place, {"config": config})
            (gemma / "config.json").unlink()
    files = ModelFiles(text_encoder=place)
    encoder, tokenizer = (load_component(files, name, dtype=torch.float32) for name in ("text_encoder", "tokenizer"))
    ids, mask = tokenize(demo.tokenizer, ["a red kite", "nothing"])
    assert torch.equal(tokenize(tokenizer, ["a red kite", "nothing"])[0], ids)
    assert torch.equal(text_hidden_states(encoder, ids, mask), text_hidden_states(demo.text_encoder, ids, mask))
    assert not any(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])
    assert not encoder.training


def test_scaled_weights_are_multiplied_out(gemma: Path) -> None:
    path = next(gemma.glob("*.safetensors"))
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight") and "language_model" in key)
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    tensors[key.removesuffix("weight") + "scale_weight"] = torch.tensor(0.5)
    save_file(tensors, path)
    encoder = load_component(ModelFiles(text_encoder=gemma), "text_encoder", dtype=torch.bfloat16)
    assert torch.equal(encoder.layers[0].mlp.up_proj.weight, (tensors[key].float() * 0.5).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["text_config"].update(vocab_size=300), r"1 mismatched: .*embed_tokens\.weight \(expected \(300,"),
        (lambda config: config["text_config"].update(num_hidden_layers=3), r"13 missing: layers\.2\."),
        (lambda config: config["text_config"].update(num_hidden_layers=1), r"13 unexpected: layers\.1\."),
        (lambda config: config["text_config"].update(num_hidden_layers=10**9), "at most 1000 num_hidden_layers"),
        (lambda config: config["text_config"].update(intermediate_size=48), "6 mismatched"),
        (lambda config: config["text_config"].update(hidden_size="wide"), "expected whole numbers in its configuration"),
        (lambda config: config.update(model_type="llama"), "describes a llama, expected Gemma 3"),
        (lambda config: config.update(text_config=[1]), "expected an object under text_config, got list"),
        (lambda config: [1], r"config\.json: expected an object, got list"),
    ],
)  # fmt: skip
def test_configuration_and_weights_of_two_models(gemma: Path, change: Callable[[Any], Any], message: str) -> None:
    change_config(gemma, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_component(ModelFiles(text_encoder=gemma), "text_encoder")
    assert str(gemma) in str(error.value)


def test_an_encoder_of_another_size_than_the_connectors_expect(official: dict[str, Path], gemma: Path) -> None:
    files = find_model(official["checkpoint"], text_encoder=gemma)
    assert component_problem(files, "text_encoder") is None
    text = text_encoder_files(gemma, None)
    connectors = dict(component_config(files, "connectors"))
    for change, sizes in (
        ({"caption_channels": 64}, "width 64 and 2 layers"),
        ({"text_proj_in_factor": 9}, "width 32 and 8 layers"),
    ):
        with pytest.raises(
            CheckpointError, match=f"width 32 and 2 layers, and the connectors of the model expect {sizes}"
        ):
            text.check_connectors(connectors | change)


def vocabulary_of(count: int) -> Callable[[Path], object]:
    def shrink(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] = {f"token {number}": number for number in range(count)}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return shrink


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tokenizer.json", "tokenizer_config.json"), "fetch tokenizer.json and tokenizer_config.json"),
        (without("tokenizer.json"), "tokenizer.json is not there: fetch"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"), "tokenizer.model alone is not read"),
        (vocabulary_of(100), "a vocabulary of 100 entries, and the text encoder's embedding has 259 rows"),
        (vocabulary_of(260), "a vocabulary of 260 entries"),
        (lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1"), "a git-LFS pointer"),
        (lambda folder: (folder / "tokenizer.json").write_text(""), "it is empty"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "it holds no vocabulary"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "expected an object, got list"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_not_the_encoders_is_refused(
    gemma: Path, change: Callable[[Path], object], message: str
) -> None:
    change(gemma)
    files = ModelFiles(text_encoder=gemma)
    with pytest.raises(CheckpointError) as error:
        load_component(files, "tokenizer")
    assert message in str(error.value)
    assert component_problem(files, "tokenizer") == str(error.value)


def test_a_tokenizer_without_its_settings_is_gemmas(demo: Components, gemma: Path) -> None:
    (gemma / "tokenizer_config.json").unlink()
    tokenizer = load_component(ModelFiles(text_encoder=gemma), "tokenizer")
    assert tokenizer("a kite").input_ids == demo.tokenizer("a kite").input_ids


def test_a_single_file_without_a_configuration_must_be_the_published_encoder(gemma: Path) -> None:
    path = rewrite(gemma, text_only, gemma / "encoder.safetensors")
    (gemma / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no configuration and is not Gemma 3 12B: put the config\.json"):
        load_component(ModelFiles(text_encoder=path), "text_encoder")
