"""What the result of a run depends on, as plain data that can be compared, and which of it later stages may have otherwise."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ltxkern
from ltxkern import dispatch
from ltxkern.pipeline.files.headers import identity
from ltxkern.pipeline.model.components import COMPONENT_NAMES, Components
from ltxkern.pipeline.work.record import checksum
from ltxkern.trust.machine import processor

if TYPE_CHECKING:
    from ltxkern.pipeline.files.lora import LoRA

GIVEN = (
    "embeddings",
    "negative_embeddings",
    "initial_noise",
    "sde_noise",
    "image_latents",
    "guidance_policy",
    "tiling",
)
_SAMPLES = 64  # values of each tensor that tell one set of weights from another
_SHOWN = 60  # characters of a value in a sentence

_TEXT = frozenset({"prompt", "negative_prompt", "embeddings", "negative_embeddings"})
_TEXT_PARTS = frozenset({"model tokenizer", "model text_encoder", "model connectors"})
_MACHINE = frozenset({"device", "threads", "ltxkern", "torch"})
_PRECISION = frozenset({"dtype"})
_STAGE_2 = frozenset(
    {"seed", "eta", "substep_eta", "stage2_sigmas", "distilled_strength_stage_2", "audio_source", "max_batch_size"}
)
_DECODE = frozenset({"audio_source", "tiling"})


def changeable(name: str, first: str) -> bool:
    """Whether what was made before stage `first` may stay where the fact of this name is another one."""
    if first == "text" or name in _PRECISION:
        return True
    if name in _MACHINE | _TEXT | _TEXT_PARTS:
        return False
    return first == "stage1" or name in (_STAGE_2 | _DECODE if first == "stage2" else _DECODE)


def plain(value: Any) -> Any:
    """A value as JSON holds it; a tensor as its checksum, a file of a picture as its content."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {checksum({'': value}):08x}"
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        return found.get("name") or found
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def facts_of(pipeline: Any, request: Any, given: Sequence[Any]) -> dict[str, Any]:
    """What the result of a pipeline's call depends on.

    Args:
        pipeline: `HQTwoStagePipeline`.
        request: with the strengths of the distilled LoRA that are meant.
        given: what the call was given beside the request, in the order of `GIVEN`.

    Raises:
        ValueError: several ranks share the run.
    """
    if pipeline.denoiser_factory is not None:
        raise ValueError(
            "work_dir is kept by a process that runs all branches: leave it out where ranks share them out"
        )
    if pipeline.model_facts is None:
        pipeline.detach()  # its weights may be in a LoRA phase
        pipeline.model_facts = model_facts(pipeline.components, pipeline.loras, pipeline.distilled_lora)
    own = {
        "attention": pipeline.attention.name,
        "policy": pipeline.policy.name,
        **dict(zip(GIVEN, given, strict=True)),
    }
    dtype = pipeline.components.dtype("transformer")
    return run_facts(request, pipeline.device, dtype, **own) | pipeline.model_facts


def run_facts(request: Any, device: torch.device, dtype: torch.dtype | None, **given: Any) -> dict[str, Any]:
    """Of a run beside its model: the request, what else the call was given, and the machine."""
    own = {
        name: f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else plain(value)
        for name, value in given.items()
    }
    return request_facts(request) | own | machine_facts(device, dtype)


def request_facts(request: Any) -> dict[str, Any]:
    """Of a `GenerationRequest`: its fields by name, pictures by their content."""
    found = {field.name: plain(getattr(request, field.name)) for field in fields(request)}
    strengths = found.pop("distilled_strengths")
    found |= {f"distilled_strength_stage_{index}": strength for index, strength in enumerate(strengths or (), 1)}
    for image in found["images"]:
        path = Path(os.path.expanduser(image.pop("path")))
        image["content"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
    return found


def machine_facts(device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Of the device and the versions of what computes."""
    if device.type == "cuda":
        where = f"cuda, {torch.cuda.get_device_name(device)}"
    else:
        where = f"{device.type}, {processor()}"
    found: dict[str, Any] = {
        "device": where,
        "dtype": str(dtype),
        "ltxkern": ltxkern.__version__,
        "torch": torch.__version__,
    }
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    return found | {
        "backends": list(dispatch.forced.get() or dispatch.backends()),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def model_facts(components: Components, loras: Iterable[tuple[LoRA, float]], distilled: LoRA | None) -> dict[str, Any]:
    """Of each component: names, sizes and times of its files; of a module that was given, values of its weights. And of LoRAs."""
    found = _lora_facts(loras, distilled)
    if components.built_in is not None:
        return found | {"model": components.built_in}
    for name in COMPONENT_NAMES:
        if components.reloadable(name):
            found[f"model {name}"] = identity(components.paths(name))
        elif not components.is_absent(name):
            module = getattr(components, name)
            found[f"model {name}"] = (
                _weights_facts(module.state_dict()) if isinstance(module, nn.Module) else type(module).__name__
            )
    return found


def _lora_facts(loras: Iterable[tuple[LoRA, float]], distilled: LoRA | None) -> dict[str, Any]:
    """Of the LoRAs in their order: name, strength and values of their factors."""
    found: dict[str, Any] = {
        "loras": [[Path(lora.name).name, strength, _lora_weights(lora)] for lora, strength in loras]
    }
    found["distilled_lora"] = None if distilled is None else [Path(distilled.name).name, _lora_weights(distilled)]
    return found


def _lora_weights(lora: LoRA) -> str:
    return _weights_facts(
        {
            f"{module}/{index}": tensor
            for module, change in lora.factors.items()
            for index, tensor in enumerate(change.tensors)
        }
    )


def _weights_facts(tensors: Mapping[str, Any]) -> str:
    """Names, dtypes, shapes and some values of each tensor: a handful of reads, whatever the size."""
    digest = hashlib.sha256()
    picked: list[Tensor] = []
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            if tensor.numel() and not tensor.is_meta:
                flat = tensor.detach().reshape(-1)
                picked.append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float())
    for device in dict.fromkeys(tensor.device for tensor in picked):
        together = torch.cat([tensor for tensor in picked if tensor.device == device]).cpu()
        digest.update(together.numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """How facts differ between a kept run and the one at hand, as "seed (10 there, 7 here)"."""
    return [f"{name} ({_shown(held.get(name))} there, {_shown(wanted.get(name))} here)" for name in names]


def differing(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of the facts that differ."""
    return [name for name in dict.fromkeys([*held, *wanted]) if held.get(name) != wanted.get(name)]


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def key(facts: Mapping[str, Any]) -> str:
    """Sixteen hex digits that name a run by its facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
