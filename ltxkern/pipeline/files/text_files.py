"""The text encoder's files: Gemma 3 as text model, multimodal folder or single file, and the tokenizer that belongs to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltxkern.pipeline.files.headers import (
    FLOATS,
    CheckpointError,
    StoredTensor,
    listed,
    read_header,
    read_json,
    require_counts,
)
from ltxkern.pipeline.files.quantized import read_tensor, with_scales
from ltxkern.pipeline.files.stored import weight_files

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARY = re.compile(r'"vocab"\s*:\s*')
_EMBEDDING = "embed_tokens.weight"
# Gemma 3 12B, which LTX-2.3 was trained on, for a single file that carries no configuration.
_PUBLISHED = {
    "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "query_pre_attn_scalar": 256,
}  # fmt: skip
# What a Gemma 3 configuration leaves out.
_DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
_MODEL_TYPES = ("gemma3", "gemma3_text")
_PADDED = 128  # embeddings are made longer than the vocabulary, up to the next multiple of a power of two


@dataclass(frozen=True)
class TextFiles:
    """A Gemma 3 text model as it is stored.

    Args:
        path: its folder or file.
        config: of the text model.
        tensors: by name within the text model.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def rows(self) -> int:
        """Rows of the token embedding."""
        return self.tensors[_EMBEDDING].shape[0]

    def check(self) -> None:
        """Refuses weights that are not those the configuration describes.

        Raises:
            CheckpointError: names or shapes differ, or a dtype is none that is read.
        """
        expected = _text_shapes(self.path, self.config)
        missing = sorted(set(expected) - set(self.tensors))
        unexpected = sorted(set(self.tensors) - set(expected))
        wrong = [
            f"{tensor.key} (expected {expected[name]}, got {tensor.shape})"
            for name, tensor in sorted(self.tensors.items())
            if name in expected and expected[name] != tensor.shape
        ]
        unread = [f"{tensor.key} ({tensor.dtype})" for tensor in self.tensors.values() if tensor.dtype not in FLOATS]
        kinds = {"missing": missing, "unexpected": unexpected, "mismatched": wrong, "unsupported dtype": unread}
        problems = [f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in kinds.items() if keys]
        if problems:
            raise CheckpointError(f"{self.path} does not fit the text_encoder; " + "; ".join(problems))

    def check_connectors(self, connectors: Mapping[str, Any]) -> None:
        """Refuses a text model of another width or depth than the connectors were trained on.

        Raises:
            CheckpointError: with both sizes.
        """
        got = (self.tensors[_EMBEDDING].shape[-1], int(self.config["num_hidden_layers"]))
        wanted = (connectors["caption_channels"], connectors["text_proj_in_factor"] - 1)
        if got != wanted:
            raise CheckpointError(
                f"{self.path}: a text encoder of width {got[0]} and {got[1]} layers, and the connectors of the model "
                f"expect width {wanted[0]} and {wanted[1]} layers"
            )


def text_encoder_files(text_encoder: Path | None, folder: Path | None, variant: str | None = None) -> TextFiles:
    """Finds the text model's configuration and tensors, from headers alone.

    Args:
        text_encoder: folder or single file; None: it lies in `folder`.
        folder: of the diffusers model, where there is one.
        variant: of the weights.

    Raises:
        CheckpointError: none was named, or what lies there is no Gemma 3.
    """
    base = text_encoder or folder
    if base is None:
        raise CheckpointError(
            "text_encoder: expected a folder with Gemma 3 and its tokenizer (text_encoder=...), got none"
        )
    place = base / "text_encoder" if (base / "text_encoder").is_dir() else base
    try:
        paths = [place] if place.is_file() else weight_files(place, variant)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: not a readable text_encoder ({error})") from error
    headers = [read_header(path) for path in paths]
    stored = {key: tensor for header in headers for key, tensor in header.tensors.items()}
    starts = sorted((key.removesuffix(_EMBEDDING) for key in stored if key.endswith(_EMBEDDING)), key=len)
    if not starts:
        raise CheckpointError(f"{place}: not a readable text_encoder (it holds no token embedding, {_EMBEDDING})")
    within = re.compile(re.escape(starts[0]) + r"(embed_tokens\.|layers\.\d+\.|norm\.)")
    tensors = {key.removeprefix(starts[0]): tensor for key, tensor in stored.items() if within.match(key)}
    config, described = _text_config(place, headers[0].config)
    tensors = with_scales(place, tensors, headers, described)
    if config is None:
        config = _PUBLISHED
        if {name: tensor.shape for name, tensor in tensors.items()} != _text_shapes(place, config):
            raise CheckpointError(
                f"{place}: has no configuration and is not Gemma 3 12B: put the config.json of its model beside it"
            )
    return TextFiles(place, {**_DEFAULTS, **config}, tensors)


def _text_config(place: Path, inside: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """The text model's configuration, and all that was described; from config.json, or the header of a single file."""
    path = place / "config.json" if place.is_dir() else place.parent / "config.json"
    if place.is_file() and inside.get("model_type") in _MODEL_TYPES:
        path, config = place, dict(inside)
    elif place.is_dir() or path.is_file():
        config = read_json(path)
        if place.is_file() and config.get("model_type") not in _MODEL_TYPES:
            return None, {}  # it describes something else that lies in the same folder
    else:
        return None, {}
    kind = config.get("model_type")
    if kind is not None and kind not in _MODEL_TYPES:
        raise CheckpointError(f"{path}: describes a {kind}, expected Gemma 3 ({' or '.join(_MODEL_TYPES)})")
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"{path}: expected an object under text_config, got {type(text).__name__}")
    return text, config


def _text_shapes(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    sizes = {name: config.get(name, value) for name, value in _DEFAULTS.items()}
    wrong = [f"{name} {value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
    if wrong:
        raise CheckpointError(f"{path}: expected whole numbers in its configuration, got {listed(wrong)}")
    require_counts(path, sizes)
    width, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "pre_feedforward_layernorm": (width,),
        "post_feedforward_layernorm": (width,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (sizes["vocab_size"], width), "norm.weight": (width,)}
    for index in range(sizes["num_hidden_layers"]):
        shapes.update({f"layers.{index}.{name}.weight": shape for name, shape in layer.items()})
    return shapes


def load_text_encoder(files: TextFiles, handles: Mapping[Path, Any], dtype: torch.dtype) -> Any:
    """The text model in eval mode, without gradients.

    Args:
        files: checked.
        handles: the open files of its tensors.
        dtype: of the weights.

    Raises:
        CheckpointError: the configuration has a value that Gemma 3 refuses.
    """
    # Imported here: it takes seconds, and header-only uses of this file do without it.
    from transformers import Gemma3TextConfig, Gemma3TextModel

    try:
        config = Gemma3TextConfig(**{key: value for key, value in files.config.items() if key != "model_type"})
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{files.path}: its configuration is refused ({str(error).splitlines()[0]})") from error
    state = {name: read_tensor(handles, tensor, dtype) for name, tensor in files.tensors.items()}
    model = Gemma3TextModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.eval().requires_grad_(False)


def find_tokenizer(text_encoder: Path | None, folder: Path | None, rows: Callable[[], int]) -> Path:
    """The folder of the tokenizer that belongs to a text encoder.

    Args:
        text_encoder: folder or single file of the text encoder, where it does not lie in `folder`.
        folder: of the diffusers model, where there is one.
        rows: gives the rows of the token embedding; asked once the files are found.

    Raises:
        CheckpointError: no tokenizer's files are there, with the names of those to fetch; or they are of another model.
    """
    places = list(_tokenizer_places(text_encoder, folder))
    found = next((place for place in places if (place / TOKENIZER_FILES[0]).is_file()), None)
    if found is None:
        if not places:
            raise CheckpointError(
                "tokenizer: expected a folder with Gemma 3 and its tokenizer (text_encoder=...), got none"
            )
        wanted = f"fetch {TOKENIZER_FILES[0]} and {TOKENIZER_FILES[1]} of the text encoder's model and put them there"
        if any((place / "tokenizer.model").is_file() for place in places):
            wanted += " (tokenizer.model alone is not read)"
        raise CheckpointError(f"{places[0]}: not a readable tokenizer, {TOKENIZER_FILES[0]} is not there: {wanted}")
    path = found / TOKENIZER_FILES[0]
    entries, length = _entries(path), rows()
    if not length - _PADDED < entries <= length:
        raise CheckpointError(
            f"{path}: a vocabulary of {entries} entries, and the text encoder's embedding has {length} rows: "
            f"fetch {TOKENIZER_FILES[0]} and {TOKENIZER_FILES[1]} of the text encoder's own model"
        )
    for name in TOKENIZER_FILES[1:]:
        if (found / name).is_file():
            read_json(found / name)
    return found


def _tokenizer_places(text_encoder: Path | None, folder: Path | None) -> Iterator[Path]:
    for base in (text_encoder, folder):
        if base is None:
            continue
        here = base if base.is_dir() else base.parent
        for place in (here / "tokenizer", here, here / "text_encoder", here.parent / "tokenizer"):
            if place.is_dir() and (place.name != "tokenizer" or place.parent == here or base == text_encoder):
                yield place


def _entries(path: Path) -> int:
    """How many rows of an embedding the tokens of a tokenizer.json need; its merges, most of the file, are not parsed."""
    try:
        text = path.read_text(encoding="utf-8")
        start = _VOCABULARY.search(text)
        vocabulary = (
            json.JSONDecoder().raw_decode(text, start.end())[0] if start and text.rstrip().endswith("}") else None
        )
    except (OSError, ValueError):
        vocabulary = None
    if vocabulary is None:
        read_json(path)  # says what the file is, where it is no JSON
    if isinstance(vocabulary, dict):
        numbers = [number for number in vocabulary.values() if isinstance(number, int)]
    elif isinstance(vocabulary, list):
        numbers = [len(vocabulary) - 1]
    else:
        numbers = []
    if not numbers:
        raise CheckpointError(f"{path}: not a readable tokenizer (it holds no vocabulary)")
    return max(numbers) + 1


def load_tokenizer(folder: Path, rows: int) -> Any:
    """The tokenizer of a folder, tried out.

    Raises:
        CheckpointError: it cannot be read, or it does not tell texts apart.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / TOKENIZER_FILES[1]).is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:  # without it the class of the tokenizer would be guessed; Gemma's marks are these
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(folder / TOKENIZER_FILES[0]), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
            )
    # The library's readers raise whatever a broken file makes them stumble over.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: not a readable tokenizer ({reason})") from error
    first, second = (tokenizer(text).input_ids for text in ("a red kite", "a blue dog in the rain"))
    if first == second or tokenizer.pad_token_id is None or max(*first, *second, tokenizer.pad_token_id) >= rows:
        raise CheckpointError(
            f"{folder}: its tokenizer does not tell texts apart within {rows} tokens: fetch {' and '.join(TOKENIZER_FILES[:2])}"
        )
    return tokenizer
