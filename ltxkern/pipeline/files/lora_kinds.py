"""What a LoRA does to one parameter: low-rank factors, LyCORIS' products, plain differences, weight decomposition."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxkern.pipeline.files.headers import listed

Shape = tuple[int, ...]
Factors = tuple[Tensor, Tensor]


class PartsMissingError(ValueError):
    """A change of which parts are not there, or that has parts of several kinds.

    is_half: of two factors there is one.
    """

    def __init__(self, parts: Iterable[str]) -> None:
        parts = sorted(parts)
        super().__init__(f"(has only {', '.join(parts) or 'alpha'})")
        self.is_half = parts in (["a"], ["b"], ["a", "magnitude"], ["b", "magnitude"])


class Change(ABC):
    """A change of one parameter: `W += scale * b @ a`, with factors that are made on the device where W lies.

    A parameter of one dimension is a column (out, 1).
    """

    alpha: float | None = None

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept and travels to the device."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """(out, in) of the parameter. Raises ValueError where the tensors do not go together."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """What alpha is divided by; None: alpha has no meaning. At 0 nothing is changed."""

    @abstractmethod
    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        """(a, b), of shape (k, in) and (out, k), from `tensors` on the device of the weight (out, in)."""

    @property
    def reads_weight(self) -> bool:
        """Whether the change depends on the pristine weight itself, so that it cannot be subtracted from a merged one."""
        return False

    def scale(self, strength: float) -> float:
        """What the product b @ a is multiplied by: strength, or strength * alpha / rank."""
        return strength if self.alpha is None or not self.rank else strength * self.alpha / self.rank

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class LoRAFactors(Change):
    """The two factors of one module: W += scale * (b @ a), with scale = strength, or strength * alpha / rank.

    Args:
        a: (rank, in).
        b: (out, rank).
        alpha: as the file tells it; None (the official files): the strength alone scales.
    """

    a: Tensor
    b: Tensor
    alpha: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.b

    @property
    def shape(self) -> Shape:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"(A {tuple(self.a.shape)}, B {tuple(self.b.shape)})")
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        return tensors[0], tensors[1]


class WholeChange(Change):
    """A change that is computed as a whole difference, alpha / rank included, in fp32 at least."""

    def scale(self, strength: float) -> float:
        return strength

    @property
    def ratio(self) -> float:
        """alpha / rank, or 1."""
        return super().scale(1.0)


def _whole(delta: Tensor, weight: Tensor) -> Factors:
    """Factors of a whole difference: (1, delta). Their product is exact in every dtype that holds the delta."""
    dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16
    return torch.eye(weight.shape[1], dtype=dtype, device=weight.device), delta


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32: what the products are computed in, to be rounded once."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Difference(WholeChange):
    """A plain difference, `.diff` of a weight or `.diff_b` of a bias: W += strength * delta.

    Args:
        delta: as the parameter.
    """

    delta: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.delta,)

    @property
    def shape(self) -> Shape:
        if self.delta.dim() not in (1, 2):
            raise ValueError(f"(difference {tuple(self.delta.shape)})")
        return tuple(self.delta.shape)

    @property
    def rank(self) -> int | None:
        return None

    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        return _whole(tensors[0].reshape(weight.shape), weight)


@dataclass(frozen=True, eq=False)
class ScaledDifference(Difference):
    """What a LoRA with a bias of its own adds to the layer's: scaled like the product of its factors.

    Args:
        delta: as the bias.
        alpha, of_rank: of the factors beside it.
    """

    alpha: float | None = None
    of_rank: int = 1

    @property
    def rank(self) -> int | None:
        return self.of_rank

    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        return _whole(_wide(tensors[0]).reshape(weight.shape) * self.ratio, weight)


@dataclass(frozen=True, eq=False)
class Sum(WholeChange):
    """Several changes of one parameter, as of factors and a difference beside them: added in fp32, rounded once.

    Args:
        changes: each with its alpha.
    """

    changes: tuple[Change, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for change in self.changes for tensor in change.tensors)

    @property
    def shape(self) -> Shape:
        shapes = [change.shape for change in self.changes]
        if len(set(shapes)) > 1:
            raise ValueError(f"(changes {' and '.join(map(str, shapes))})")
        return shapes[0]

    @property
    def rank(self) -> int | None:
        return None

    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        waiting, total = iter(tensors), torch.zeros_like(_wide(weight))
        for change in self.changes:
            a, b = change.factors(tuple(next(waiting) for _ in change.tensors), weight)
            if isinstance(change, WholeChange):
                total.add_(b)
            else:
                total.addmm_(b.to(total.dtype), a.to(total.dtype), alpha=change.scale(1.0))
        return _whole(total, weight)


@dataclass(frozen=True, eq=False)
class HadamardProduct(WholeChange):
    """LoHa: W += scale * (b1 @ a1) * (b2 @ a2), elementwise.

    Args:
        b1, a1, b2, a2: (out, rank), (rank, in), twice.
        alpha: as in `LoRAFactors`.
    """

    b1: Tensor
    a1: Tensor
    b2: Tensor
    a2: Tensor
    alpha: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.b1, self.a1, self.b2, self.a2

    @property
    def shape(self) -> Shape:
        first, second = LoRAFactors(self.a1, self.b1).shape, LoRAFactors(self.a2, self.b2).shape
        if first != second:
            raise ValueError(f"(products {first} and {second})")
        return first

    @property
    def rank(self) -> int:
        return self.a1.shape[0]

    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        b1, a1, b2, a2 = map(_wide, tensors)
        return _whole(torch.mm(b1, a1).mul_(torch.mm(b2, a2)).mul_(self.ratio), weight)


@dataclass(frozen=True, eq=False)
class KroneckerProduct(WholeChange):
    """LoKr: W += scale * kron(w1, w2), each of them whole or the product of two factors.

    Args:
        w1, w2: (matrix,), or ((out, rank), (rank, in)).
        alpha: as in `LoRAFactors`; where both are whole, the scale itself.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    alpha: float | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.w1, *self.w2

    @property
    def shape(self) -> Shape:
        one, two = self._shape(self.w1), self._shape(self.w2)
        return one[0] * two[0], one[1] * two[1]

    @staticmethod
    def _shape(parts: tuple[Tensor, ...]) -> Shape:
        if len(parts) == 2:
            return LoRAFactors(parts[1], parts[0]).shape
        if parts[0].dim() != 2:
            raise ValueError(f"(factor {tuple(parts[0].shape)} of a Kronecker product)")
        return tuple(parts[0].shape)

    @property
    def rank(self) -> int:
        return next((parts[1].shape[0] for parts in (self.w1, self.w2) if len(parts) == 2), 1)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is factorised, so that there is no rank."""
        return len(self.w1) == len(self.w2) == 1

    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        wide = [_wide(tensor) for tensor in tensors]
        one, two = (functools.reduce(torch.mm, parts) for parts in (wide[: len(self.w1)], wide[len(self.w1) :]))
        return _whole(torch.kron(one.contiguous(), two.contiguous()).mul_(self.ratio), weight)


@dataclass(frozen=True, eq=False)
class Decomposed(WholeChange):
    """DoRA: W += strength * (m * V / |V| - W) with V = W + scale * change, W pristine.

    Args:
        inner: the change of the direction, with its alpha.
        magnitude: m, (out,) or (out, 1): the norms are those of the rows; (1, in): of the columns.
    """

    inner: Change
    magnitude: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.inner.tensors, self.magnitude

    @property
    def shape(self) -> Shape:
        shape = self.inner.shape
        if tuple(self.magnitude.shape) not in ((shape[0],), (shape[0], 1), (1, shape[1])):
            raise ValueError(f"(weight {shape}, magnitude {tuple(self.magnitude.shape)})")
        return shape

    @property
    def rank(self) -> int | None:
        # Rank 0 of the direction leaves the magnitude to be changed.
        return None

    @property
    def reads_weight(self) -> bool:
        return True

    def factors(self, tensors: tuple[Tensor, ...], weight: Tensor) -> Factors:
        a, b = self.inner.factors(tensors[:-1], weight)
        magnitude = _wide(tensors[-1])
        magnitude = magnitude[:, None] if magnitude.dim() == 1 else magnitude
        pristine = _wide(weight)
        changed = torch.addmm(pristine, b.to(pristine.dtype), a.to(pristine.dtype), alpha=self.inner.scale(1.0))
        norms = torch.linalg.vector_norm(changed, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
        # A row of zeros has no direction: it stays one.
        changed.mul_(magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny))
        return _whole(changed.sub_(pristine), weight)


def build_change(parts: Mapping[str, Tensor]) -> Change:
    """The change that the parts of a parameter make, by their names of `lora_layout.read_key`, without its alpha.

    Raises:
        PartsMissingError: parts are missing, or belong to several kinds.
    """
    names = set(parts) - {"magnitude"}
    change: Change
    if names == {"a", "b"}:
        change = LoRAFactors(parts["a"], parts["b"])
    elif names == {"diff"}:
        change = Difference(parts["diff"])
    elif names == {f"hada_w{k}_{side}" for k in (1, 2) for side in "ab"}:
        first, second = ((parts[f"hada_w{k}_a"], parts[f"hada_w{k}_b"]) for k in (1, 2))
        change = HadamardProduct(*first, *second)
    elif names in _KRONECKER:
        one, two = (
            (parts[f"lokr_w{k}"],) if f"lokr_w{k}" in parts else (parts[f"lokr_w{k}_a"], parts[f"lokr_w{k}_b"])
            for k in (1, 2)
        )
        change = KroneckerProduct(one, two)
    else:
        raise PartsMissingError(parts)
    return Decomposed(change, parts["magnitude"]) if "magnitude" in parts else change


def misfits(changes: Mapping[str, Change], shapes: Mapping[str, Shape]) -> list[str]:
    """What of these changes a transformer with these parameters does not have: one text for modules, one for shapes."""
    unknown = sorted(set(changes) - set(shapes))
    wrong = []
    for target, change in sorted(changes.items()):
        if target not in shapes:
            continue
        try:
            if change.shape != shapes[target]:
                wrong.append(f"{target} (expected {shapes[target]}, got {change.shape})")
        except ValueError as error:
            wrong.append(f"{target} {error}")
    problems = [f"{len(unknown)} modules the transformer does not have: {listed(unknown)}"] if unknown else []
    return problems + ([f"{len(wrong)} of the wrong shape: {listed(wrong)}"] if wrong else [])


_KRONECKER = [
    {*one, *two}
    for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
]
