"""LoRAs, and phases: the set of (LoRA, strength) that is merged into the transformer's weights at one time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ltxkern.pipeline.files.hub import local_lora
from ltxkern.pipeline.files.lora_file import Transformer, dequantise, read_changes
from ltxkern.pipeline.files.lora_kinds import Change, LoRAFactors, misfits
from ltxkern.pipeline.files.lora_layout import parameter_shapes

# Name and scale of every LoRA that touches one weight: weights with equal keys hold equal bits.
WeightKey = tuple[tuple[str, float], ...]
PRISTINE_KEY: WeightKey = ()

HQ_STRENGTHS = (0.25, 0.5)
TWO_STAGE_STRENGTHS = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class LoRA:
    """One LoRA: a name that tells it from all others, and changes per module name of the transformer.

    A change of another parameter than a module's weight stands under the parameter's whole name, as `proj_in.bias`.
    """

    name: str
    factors: Mapping[str, Any]

    @classmethod
    def from_file(cls, path: str | Path, transformer: Transformer | None = None) -> LoRA:
        """Reads a LoRA file in any layout that `load_lora` knows, with changes of every kind.

        Args:
            path: safetensors file, a folder with one, or a hub name `owner/name[/file]`.
            transformer: where given, modules and shapes are checked against it, and underscored names looked up in it.

        Raises:
            CheckpointError: not a LoRA, halves missing, ranks that disagree, modules or shapes that do not fit; the
                file and the keys are named.
        """
        local = local_lora(path)
        return cls(str(local.absolute()), read_changes(local, transformer=transformer))

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Sequence[Any]]) -> LoRA:
        """Takes {module: (lora_A, lora_B, alpha or None)}, as `load_lora` returns it; fp8 is dequantised."""
        return cls(
            name,
            {
                module: LoRAFactors(dequantise(entry[0]), dequantise(entry[1]), entry[2] if len(entry) > 2 else None)
                for module, entry in tensors.items()
            },
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(factors.nbytes for factors in self.factors.values())

    def check(self, transformer: nn.Module) -> None:
        """Raises ValueError, with the LoRA and the modules named, unless every module and shape fits."""
        problems = misfits(self.factors, parameter_shapes(transformer))
        if problems:
            raise ValueError(f"LoRA {self.name} does not fit the transformer; {'; '.join(problems)}")


@dataclass(frozen=True, eq=False)
class LoRAPhase:
    """What is merged at one time, in merge order. Phases are equal where names and strengths are.

    Args:
        entries: (LoRA, strength) pairs; a strength of zero is dropped.
    """

    entries: tuple[tuple[LoRA, float], ...] = ()

    def __post_init__(self) -> None:
        for lora, strength in self.entries:
            if not math.isfinite(strength):
                raise ValueError(f"strength of LoRA {lora.name} must be a finite number, got {strength}")
        kept = tuple((lora, float(strength)) for lora, strength in self.entries if strength != 0)
        object.__setattr__(self, "entries", kept)

    @property
    def identity(self) -> WeightKey:
        """Names and strengths: what makes two phases equal."""
        return tuple((lora.name, strength) for lora, strength in self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRAPhase) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __str__(self) -> str:
        merged = " + ".join(f"{Path(lora.name).stem} x {strength:g}" for lora, strength in self.entries)
        return merged or "no LoRA"

    @functools.cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose weight this phase changes."""
        return tuple(sorted({name for lora, _ in self.entries for name in lora.factors}))

    @functools.cached_property
    def _keys(self) -> dict[str, WeightKey]:
        found: dict[str, WeightKey] = {}
        for lora, strength in self.entries:
            for module, factors in lora.factors.items():
                if factors.rank != 0:
                    found[module] = (*found.get(module, ()), (lora.name, factors.scale(strength)))
        return found

    def key(self, module: str) -> WeightKey:
        """What this phase merges into one module's weight."""
        return self._keys.get(module, PRISTINE_KEY)

    def factors(self, module: str) -> tuple[list[Change], list[float]]:
        """Changes and scales for one module, in merge order."""
        found = [(lora.factors[module], strength) for lora, strength in self.entries if module in lora.factors]
        return [factors for factors, _ in found], [factors.scale(strength) for factors, strength in found]

    @functools.cached_property
    def reads_weights(self) -> bool:
        """Whether some change depends on the pristine weight itself."""
        return any(change.reads_weight for lora, _ in self.entries for change in lora.factors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the factors of all its LoRAs."""
        return sum(lora.nbytes for lora, _ in self.entries)


NO_LORA = LoRAPhase()


def lora_phases(
    user_loras: Iterable[tuple[LoRA, float]] = (),
    distilled: LoRA | None = None,
    strengths: tuple[float, float] = HQ_STRENGTHS,
) -> tuple[LoRAPhase, LoRAPhase]:
    """The phases of the two stages: the user's LoRAs first, then the distilled one at its strength of the stage.

    Args:
        user_loras: (LoRA, strength) in the order in which they are merged.
        distilled: the distilled LoRA, or None.
        strengths: of the distilled LoRA in stage 1 and stage 2; `HQ_STRENGTHS`, or `TWO_STAGE_STRENGTHS`.

    Raises:
        ValueError: two LoRAs share a name.
    """
    users = tuple(user_loras)
    loras = [lora for lora, _ in users] + ([distilled] if distilled is not None else [])
    for index, lora in enumerate(loras):
        if any(other.name == lora.name and other is not lora for other in loras[:index]):
            raise ValueError(
                f"LoRA {lora.name} is given twice: give it once, with the sum of the strengths, or under two names"
            )
    first, second = (
        LoRAPhase((*users, (distilled, strength))) if distilled is not None else LoRAPhase(users)
        for strength in strengths
    )
    return first, second
