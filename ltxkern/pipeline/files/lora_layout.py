"""Names in LoRA files: which module of the transformer a key changes, and which part of the change it holds."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from ltxkern.pipeline.files.official_names import TRANSFORMER_PREFIX, diffusers_name, official_name
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS
from ltxkern.pipeline.model.shapes import expected_shapes

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """One way of naming that people meet.

    Args:
        writer: which tools write it.
        names: of the modules: "official", "diffusers" or "underscored" (either, with dots as underscores).
        module: a module as it stands in a key; {} is its name.
        a, b: what follows for the two factors.
        alpha: what follows for alpha, or "" where alpha lies elsewhere.
    """

    writer: str
    names: str
    module: str
    a: str
    b: str
    alpha: str = ""

    def keys(self, name: str) -> tuple[str, str, str]:
        """The keys of a module's factors and of its alpha ("" where it has none)."""
        module = self.module.format(name)
        return module + self.a, module + self.b, module + self.alpha if self.alpha else ""


_PEFT = ".lora_A.weight", ".lora_B.weight"
_PEFT_DEFAULT = ".lora_A.default.weight", ".lora_B.default.weight"
_KOHYA = ".lora_down.weight", ".lora_up.weight", ".alpha"

LAYOUTS = (
    Layout("LTX-2 trainer, ComfyUI", "official", "diffusion_model.{}", *_PEFT),
    Layout("ComfyUI savers", "official", "model.diffusion_model.{}", *_PEFT),
    Layout("musubi-tuner converted, ai-toolkit", "official", "diffusion_model.{}", *_KOHYA),
    Layout("diffusers", "diffusers", "transformer.{}", *_PEFT),
    Layout("older diffusers", "diffusers", "transformer.{}", ".lora.down.weight", ".lora.up.weight"),
    Layout("first diffusers", "diffusers", "transformer.{}", "_lora.down.weight", "_lora.up.weight"),
    Layout("transformers", "diffusers", "{}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    Layout("PEFT", "diffusers", "base_model.model.{}", *_PEFT),
    Layout("PEFT state dict", "diffusers", "base_model.model.{}", *_PEFT_DEFAULT),
    Layout("DiffSynth-Studio", "official", "{}", *_PEFT_DEFAULT),
    Layout("DiffSynth-Studio, whole pipeline", "official", "pipe.dit.{}", *_PEFT_DEFAULT),
    Layout("trainers without .weight", "official", "{}", ".lora_A", ".lora_B"),
    Layout(
        "PEFT, adapter last", "diffusers", "base_model.model.{}", ".lora_A.weight.default", ".lora_B.weight.default"
    ),
    Layout("official X0Model, saved whole", "official", "velocity_model.{}", *_PEFT),
    Layout("trainers that wrap the model", "official", "net.{}", *_PEFT),
    Layout("kohya, musubi-tuner", "underscored", "lora_unet_{}", *_KOHYA),
    Layout("kohya, start in capitals", "underscored", "LORA_UNET_{}", *_KOHYA),
    Layout("OneTrainer", "underscored", "lora_transformer_{}", *_KOHYA),
    Layout("LyCORIS", "underscored", "lycoris_{}", *_KOHYA),
)

# In front of a module's name, in any order and number.
STARTS = (
    "model", "diffusion_model", "velocity_model", "transformer", "base_model", "module", "unet", "dit", "net", "pipe", "lora",
    "lycoris",
)  # fmt: skip
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|processor)(?:\.|$)")
_FOREIGN = re.compile(
    r"embeddings_connector|text_embedding_projection|text_proj_in|(?:video|audio)_connector|(?:^|[._])connectors?[._]"
    r"|text_encoder|text_model|language_model|gemma|(?:^|[._])(?:te|te\d|clip\w?|t5\w*)[._]"
)
# A factor's scale, where the factor is stored in fp8.
_SCALES = ("weight_scale", "scale_weight")
_ADAPTER = r"(?!weight|bias|scale_|input_scale|absmax|quant|nested_|comfy_)\w[\w-]*"
_PART = re.compile(
    r"(?P<module>.+?)[._](?:"
    r"(?:lora_linear_layer|lora)[._](?P<side>A|B|down|up)"
    rf"(?:\.(?P<adapter>{_ADAPTER}))?(?:\.(?P<end>weight|bias|{'|'.join(_SCALES)})(?:\.(?P<late_adapter>{_ADAPTER}))?)?"
    r"|(?:lora_magnitude_vector|dora_scale)"
    rf"(?:\.(?P<other_adapter>{_ADAPTER}))?(?P<magnitude>)(?:\.weight(?:\.(?P<last_adapter>{_ADAPTER}))?)?"
    r"|(?:lora_|network_)?(?P<alpha>alpha)"
    r"|(?P<other>diff|diff_b|w_norm|b_norm|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)"
    r")"
)
# Kinds of change that are not read, by what stands in their keys.
_UNREAD = (
    (re.compile(r"hada_t\d|lokr_t\d|lora_mid"), "core of a convolution's Tucker form, which a matrix does not have"),
    (re.compile(r"lora_E|ranknum"), "AdaLoRA"),
    (re.compile(r"oft_|boft"), "orthogonal fine-tuning"),
    (re.compile(r"vera_lambda"), "VeRA"),
    (re.compile(r"lora_embedding|trainable_tokens"), "of an embedding, which the transformer does not have"),
    (re.compile(r"absmax|quant_state|quant_map"), "of a quantised factor"),
)
_FUSED = {
    "to_qkv": "qkv",
    "qkv": "qkv",
    "qkv_proj": "qkv",
    "in_proj": "qkv",
    "to_kv": "kv",
    "kv": "kv",
    "kv_proj": "kv",
}

# Modules whose names have no dot: they are no underscored ones.
_OUTER = ("proj_in", "proj_out", "audio_proj_in", "audio_proj_out")


class Part(NamedTuple):
    """What a key says: module as it is named there, part of the change, adapter ("" where none is named)."""

    module: str
    part: str
    adapter: str = ""


def read_key(key: str) -> Part | None:
    """Splits a key of a LoRA file; None where it is of no known kind.

    Parts are "a", "b" (the factors, (rank, in) and (out, rank)), "a_scale", "b_scale" (of fp8 factors), "bias", "alpha",
    "magnitude" (weight decomposition), "diff", "diff_b" (plain differences), and LyCORIS' hada_* and lokr_*.
    """
    found = _PART.fullmatch(key)
    if found is None:
        return None
    named = (found[f"{place}adapter"] for place in ("", "late_", "other_", "last_"))
    module, adapter = found["module"], next(filter(None, named), "")
    if found["side"]:
        half, end = "a" if found["side"] in ("A", "down") else "b", found["end"] or "weight"
        if end == "bias":
            return Part(module, "bias", adapter) if half == "b" else None
        return Part(module, half if end == "weight" else f"{half}_scale", adapter)
    if found["magnitude"] is not None:
        return Part(module, "magnitude", adapter)
    part = found["alpha"] or found["other"]
    return Part(module, {"w_norm": "diff", "b_norm": "diff_b"}.get(part, part), adapter)


def unread(key: str) -> str:
    """A key that `read_key` does not know, with what it is where that is known."""
    return next((f"{key} ({kind})" for pattern, kind in _UNREAD if pattern.search(key)), key)


def is_foreign(key: str) -> bool:
    """Whether a key belongs to the text connectors or a text encoder, which no merge changes."""
    return _FOREIGN.search(key) is not None


def parameter_shapes(transformer: nn.Module | Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes by target: the module's name for its weight, the whole name for any other parameter.

    Args:
        transformer: on any device; or shapes by diffusers parameter name, as headers have them.
    """
    if isinstance(transformer, nn.Module):
        return {target_of(name): tuple(p.shape) for name, p in transformer.named_parameters(remove_duplicate=False)}
    return {target_of(name): tuple(shape) for name, shape in transformer.items()}


def target_of(parameter: str) -> str:
    """How a LoRA names a parameter: a weight by its module."""
    return parameter.removesuffix(".weight")


class ModuleNames:
    """Finds the transformer's module behind the names that tools write.

    Args:
        shapes: by target, as `parameter_shapes` gives them; None: dotted names are taken on trust, underscored ones are
            looked up in the published transformer.
    """

    def __init__(self, shapes: Mapping[str, Shape] | None) -> None:
        self.shapes = shapes

    def __call__(self, name: str) -> str | None:
        """The target in the transformer's own (diffusers) names; None for an underscored name of no, or of several modules."""
        name = _WRAPPERS.sub("", name).strip(".")
        while (start := name.partition("."))[0].lower() in STARTS and start[2]:
            name = start[2]
        known = self.shapes if self.shapes is not None else {}
        dotted = _dotted(name)
        if dotted in known or dotted in _OUTER or "." in dotted:
            return dotted if dotted in known or not dotted.endswith(".to_out") else f"{dotted}.0"
        found = {target for rest in _without_starts(name.lower()) for target in self._underscored.get(rest, ())}
        if len(found) == 1:
            return found.pop()
        # A name like "proj_out" is whole as it is.
        return None if found or "_blocks_" in dotted else dotted

    def split(self, target: str) -> tuple[str, ...]:
        """The modules behind a fused projection, in the order of its rows; the target itself where it is none."""
        parent, _, last = target.rpartition(".")
        if last not in _FUSED or (self.shapes is not None and target in self.shapes):
            return (target,)
        return tuple(f"{parent}.to_{letter}" for letter in _FUSED[last])

    @functools.cached_property
    def _underscored(self) -> dict[str, set[str]]:
        """Targets by their names with underscores for dots."""
        targets = self.shapes if self.shapes is not None else published_shapes()
        parents = {target.removesuffix(".to_k") for target in targets if target.endswith(".to_k")}
        fused = [f"{parent}.{name}" for parent in parents for name in _FUSED]
        table: dict[str, set[str]] = {}
        for target in [*targets, *(name for name in fused if name not in targets)]:
            for spelling in {target, _official(target), target.removesuffix(".0")}:
                table.setdefault(spelling.replace(".", "_").lower(), set()).add(target)
        return table


def _dotted(name: str) -> str:
    # The dot keeps the renames that are anchored at a module boundary ("adaln_single.") in force.
    return (diffusers_name("transformer", f"{name}.") or name).removesuffix(".")


def spellings(target: str) -> dict[str, tuple[str, ...]]:
    """How tools may write a module, by the `names` of a `Layout`."""
    official = _official(target)
    flat = official.replace(".", "_"), target.replace(".", "_")
    return {"official": (official,), "diffusers": (target,), "underscored": flat}


def layouts_of(written: Mapping[str, str], keys: Iterable[str]) -> list[Layout]:
    """The layouts of the table that a file may be in.

    Args:
        written: a module's name as the file has it, by target.
        keys: of the file.
    """
    keys = set(keys)
    return [
        layout
        for layout in LAYOUTS
        if all(
            f"{name}{layout.a}" in keys
            and name in [layout.module.format(spelling) for spelling in spellings(target)[layout.names]]
            for target, name in written.items()
        )
    ]


def _official(target: str) -> str:
    return official_name("transformer", f"{target}.").removeprefix(TRANSFORMER_PREFIX).removesuffix(".")


def _without_starts(name: str) -> Iterable[str]:
    """The underscored name with none, one and more of its starts taken off."""
    waiting = [name]
    while waiting:
        name = waiting.pop()
        yield name
        waiting += [name.removeprefix(f"{start}_") for start in STARTS if name.startswith(f"{start}_")]


@functools.cache
def published_shapes() -> Mapping[str, Shape]:
    """`parameter_shapes` of the published transformer."""
    return parameter_shapes(expected_shapes("transformer", PRODUCTION_CONFIGS["transformer"]))
