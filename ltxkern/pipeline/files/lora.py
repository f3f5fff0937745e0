"""LoRAs, and phases: the set of (LoRA, strength) that is merged into the transformer's weights at one time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.files.lora_file import dequantise, load_lora

# Name and scale of every LoRA that touches one weight: weights with equal keys hold equal bits.
WeightKey = tuple[tuple[str, float], ...]
PRISTINE_KEY: WeightKey = ()

HQ_STRENGTHS = (0.25, 0.5)
TWO_STAGE_STRENGTHS = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class LoRAFactors:
    """The two factors of one module: W += scale * (b @ a), with scale = strength, or strength * alpha / rank.

    Args:
        a: (rank, in).
        b: (out, rank).
        alpha: as the file carries it; None (the official files): the strength alone scales.
    """

    a: Tensor
    b: Tensor
    alpha: float | None = None

    def scale(self, strength: float) -> float:
        """What the product b @ a is multiplied by."""
        rank = self.a.shape[0]
        return strength if self.alpha is None or rank == 0 else strength * self.alpha / rank

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, eq=False)
class LoRA:
    """One LoRA: a name that tells it from all others, and factors per module name of the transformer."""

    name: str
    factors: Mapping[str, LoRAFactors]

    @classmethod
    def from_file(cls, path: str | Path, transformer: torch.nn.Module | None = None) -> LoRA:
        """Reads a LoRA file with official (or diffusers) key names.

        Args:
            path: safetensors file.
            transformer: where given, modules and shapes are checked against it.

        Raises:
            CheckpointError: not a LoRA, halves missing, ranks that disagree, modules or shapes that do not fit; the
                file and the keys are named.
        """
        loaded = load_lora(path, transformer=transformer)
        return cls.from_tensors(str(Path(path).absolute()), loaded)

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

    def check(self, transformer: torch.nn.Module) -> None:
        """Raises ValueError, with the LoRA and the modules named, unless every module and shape fits."""
        linears = {
            name: tuple(weight.shape)
            for name, module in transformer.named_modules()
            if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 2
        }
        unknown = sorted(set(self.factors) - set(linears))
        wrong = sorted(
            f"{name} (weight {linears[name]}, factors {tuple(f.b.shape)} @ {tuple(f.a.shape)})"
            for name, f in self.factors.items()
            if name in linears
            and (
                f.a.dim() != 2
                or f.b.dim() != 2
                or f.a.shape[0] != f.b.shape[1]
                or (f.b.shape[0], f.a.shape[1]) != linears[name]
            )
        )
        if unknown or wrong:
            problems = [f"{len(unknown)} modules it does not have: {', '.join(unknown[:8])}"] if unknown else []
            problems += [f"{len(wrong)} shapes that disagree: {', '.join(wrong[:8])}"] if wrong else []
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
                if factors.a.shape[0] > 0:
                    found[module] = (*found.get(module, ()), (lora.name, factors.scale(strength)))
        return found

    def key(self, module: str) -> WeightKey:
        """What this phase merges into one module's weight."""
        return self._keys.get(module, PRISTINE_KEY)

    def factors(self, module: str) -> tuple[list[LoRAFactors], list[float]]:
        """Factors and scales for one module, in merge order."""
        found = [(lora.factors[module], strength) for lora, strength in self.entries if module in lora.factors]
        return [factors for factors, _ in found], [factors.scale(strength) for factors, strength in found]

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
