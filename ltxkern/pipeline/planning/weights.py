"""What a model's configuration and headers say about its size: modules without memory, bytes per component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ltxkern.pipeline.files.checkpoint import component_bytes, component_config
from ltxkern.pipeline.files.found import FoundModel, geometry_from_configs
from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.files.lora_file import describe_lora_file
from ltxkern.pipeline.files.lora_layout import target_of
from ltxkern.pipeline.memory.host_copy import module_tensors
from ltxkern.pipeline.memory.modes import WeightSizes, weight_sizes
from ltxkern.pipeline.model.components import BUILDABLE, Components, build, component_dtype
from ltxkern.pipeline.model.text import MAX_TEXT_TOKENS
from ltxkern.pipeline.sampling.latents import Geometry

DISTILLED_RANK = 384


@dataclass(frozen=True)
class ModelSizes:
    """A model without its weights.

    Args:
        configs: constructor arguments of every component that is there.
        nbytes: bytes of its weights in the dtypes it runs in.
        transformer: sizes that decide the device mode.
        text_tokens: rows of a prompt's context.
        dtype: of the model.
        geometry: how latents relate to pixels.
    """

    configs: Mapping[str, Mapping[str, Any]]
    nbytes: Mapping[str, int]
    transformer: WeightSizes
    text_tokens: int
    dtype: torch.dtype
    geometry: Geometry
    _modules: dict[tuple[Any, ...], nn.Module] = field(default_factory=dict, repr=False, compare=False)

    def module(self, component: str, **changes: Any) -> Any:
        """The component on the meta device, in the dtype it runs in; built once, which takes longer than to run it."""
        key = (component, *sorted(changes.items()))
        if key not in self._modules:
            self._modules[key] = meta_module(component, {**self.configs[component], **changes}, self.dtype)
        return self._modules[key]


def meta_module(component: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A component on the meta device, in the dtype it runs in."""
    module = build(component, config)
    # The plain method: diffusers' own warns about a cast that is meant here.
    return nn.Module.to(module, dtype=component_dtype(component, dtype))


def model_sizes(
    model: FoundModel | Components,
    *,
    dtype: torch.dtype = torch.bfloat16,
    loras: Sequence[str | Path | LoRA] | None = None,
    geometry: Geometry | None = None,
) -> ModelSizes:
    """Reads configurations and headers; no weights.

    Args:
        model: found, or components; of these nothing is loaded, and a text encoder that is not loaded does not count.
        dtype: the model runs in.
        loras: files or LoRAs that the phases merge; None: one of rank 384 (4 for the demo) over every Linear.
        geometry: where the model's configurations do not say it; None: they do.

    Raises:
        CheckpointError: nothing usable is there.
    """
    text_tokens = MAX_TEXT_TOKENS
    configs: Mapping[str, Mapping[str, Any]]
    nbytes: dict[str, int] = {}
    rank = DISTILLED_RANK
    if isinstance(model, Components):
        configs, nbytes, text_tokens = _of_components(model)
    elif model.is_demo:
        from ltxkern.pipeline.files.demo import DEMO_CONFIGS, DEMO_LORA_RANK, DEMO_TEXT_TOKENS, demo_text_encoder

        configs, text_tokens, rank = DEMO_CONFIGS, DEMO_TEXT_TOKENS, DEMO_LORA_RANK
        with torch.device("meta"):
            nbytes["text_encoder"] = sum(t.numel() for t in module_tensors(demo_text_encoder())) * dtype.itemsize
    else:
        found = component_bytes(model.files, dtype=dtype)
        configs = {name: component_config(model.files, name) for name in found if name in BUILDABLE}
        nbytes = {name: size for name, size in found.items() if name not in BUILDABLE}
    modules = {name: meta_module(name, config, dtype) for name, config in configs.items()}
    for name, module in modules.items():
        nbytes.setdefault(name, sum(tensor.nbytes for tensor in module_tensors(module)))
    sizes = WeightSizes(0, 0, 0, ())
    if "transformer" in modules:
        sizes = _transformer_sizes(modules["transformer"], loras, rank)
    geometry = geometry or geometry_from_configs(configs.get("transformer"), configs.get("audio_vae"))
    return ModelSizes(
        configs, nbytes, sizes, text_tokens, dtype, geometry, {(name,): module for name, module in modules.items()}
    )


def _of_components(components: Components) -> tuple[dict[str, Mapping[str, Any]], dict[str, int], int]:
    configs: dict[str, Mapping[str, Any]] = {}
    nbytes = {}
    # Reading a component that is not there yet, or was released, would load it: a text encoder of 23 GiB to be counted.
    for name in (*BUILDABLE, "text_encoder"):
        if components.is_loaded(name):
            nbytes[name] = sum(tensor.nbytes for tensor in module_tensors(getattr(components, name)))
        config = components.config(name) if name in BUILDABLE else None
        if config is not None:
            configs[name] = {key: value for key, value in config.items() if not key.startswith("_")}
    tokenizer = components.tokenizer if components.is_loaded("tokenizer") else None
    limit = getattr(tokenizer, "model_max_length", MAX_TEXT_TOKENS)
    return configs, nbytes, min(MAX_TEXT_TOKENS, limit)


def _transformer_sizes(
    transformer: nn.Module, loras: Sequence[str | Path | LoRA] | None, assumed_rank: int
) -> WeightSizes:
    if loras is None:
        patched = {name: m.weight for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        factors = assumed_rank * sum(sum(weight.shape) for weight in patched.values())
        factors *= next(transformer.parameters()).dtype.itemsize
    else:
        # A weight is named by its module, other parameters by their whole name.
        parameters = {target_of(name): parameter for name, parameter in transformer.named_parameters()}
        described = [_lora_targets(lora, transformer) for lora in loras]
        factors = sum(nbytes for _, nbytes in described)
        patched = {name: parameters[name] for targets, _ in described for name in targets if name in parameters}
    return weight_sizes(module_tensors(transformer), patched, factors)


def _lora_targets(lora: str | Path | LoRA, transformer: nn.Module) -> tuple[list[str], int]:
    if isinstance(lora, LoRA):
        return list(lora.factors), lora.nbytes
    found = describe_lora_file(lora, transformer=transformer)
    return list(found.targets), found.nbytes
