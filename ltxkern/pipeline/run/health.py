"""What holds non-finite weights, looked for once a stage has given NaN or infinity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.sampling.finite import NonFiniteError

_NAMED = 3  # weights that a sentence lists


@contextlib.contextmanager
def explained(stage: str, components: Components, names: Iterable[str], loras: Iterable[LoRA] = ()) -> Iterator[None]:
    """Let a NonFiniteError of the block say which LoRA or component holds non-finite weights, or that none does.

    Args:
        stage: where the run can be taken up again.
        components: those that are loaded are looked through.
        names: of the components that the block uses.
        loras: that are merged into the transformer.
    """
    try:
        yield
    except NonFiniteError as error:
        held = [_lora_sentence(lora) for lora in loras]
        held = [sentence for sentence in held if sentence] or [_component_sentence(components, name) for name in names]
        found = [sentence for sentence in held if sentence]
        advice = f"{', '.join(names)}: all weights are finite, so the values outgrew the dtype: run it in fp32"
        said = NonFiniteError(f"{error}; {'; '.join(found) or advice}")
        said.stage, said.finite_weights = stage, not found
        raise said from error


def _lora_sentence(lora: LoRA) -> str:
    bad = [module for module, change in lora.factors.items() if not all(map(_is_finite, change.tensors))]
    return _sentence(f"LoRA {Path(lora.name).name}", bad)


def _component_sentence(components: Components, name: str) -> str:
    module: Any = getattr(components, name) if components.is_loaded(name) else None
    if not isinstance(module, nn.Module):
        return ""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return _sentence(f"the {name.replace('_', ' ')}", [key for key, tensor in tensors if not _is_finite(tensor)])


def _sentence(holder: str, bad: Sequence[str]) -> str:
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"{holder} holds non-finite weights in {', '.join(bad[:_NAMED])}{more}" if bad else ""


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    return bool((tensor if tensor.itemsize > 1 else tensor.to(torch.float32)).isfinite().all())
