"""What the samplers share: the denoiser protocol, and the checks and order of the latents they work on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MODALITIES = ("video", "audio")
SECOND_SEED_OFFSET = 10_000
LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Latents = dict[str, Tensor]
Seeds = int | Sequence[int]
Callback = Callable[[int, int, Latents], None]


@dataclass(frozen=True)
class SamplerPoint:
    """Where a sampler stands between two steps: with the arguments of its run it goes on from here with the same bits.

    Attributes:
        done: steps behind it.
        latents: packed, in the model dtype. The anchors of a res2s step live within the step only.
        generators: states of its sources of noise; none where noise was given.
    """

    done: int
    latents: Latents
    generators: tuple[Tensor, ...] = ()


Keep = Callable[[SamplerPoint], None]


class Denoiser(Protocol):
    """Predicts clean latents: called as `denoiser(latents, sigma, step=i, substep=False)`, returns x0 per modality."""

    def __call__(self, latents: Latents, sigma: float, *, step: int, substep: bool) -> Mapping[str, Tensor]:
        """x0 of every modality in `latents`, each with its latent's shape."""
        ...


@dataclass(frozen=True)
class SamplerState:
    """Checked inputs of a sampler; the lists follow `names`.

    Attributes:
        names: modalities present, video before audio: the order of all noise draws.
        latents: (B, T, C) each, contiguous, in the model dtype.
        masks, cleans: (B, T, 1) fp32 and (B, T, C), or None where every token is denoised.
    """

    names: tuple[str, ...]
    latents: list[Tensor]
    masks: list[Tensor | None]
    cleans: list[Tensor | None]

    @property
    def device(self) -> torch.device:
        """The one device of all latents."""
        return self.latents[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The model dtype."""
        return self.latents[0].dtype

    def named(self, values: Iterable[Tensor]) -> Latents:
        """A fresh dict of values in the order of `names`."""
        return dict(zip(self.names, values, strict=True))

    def point(self, done: int, latents: Iterable[Tensor], generators: Sequence[torch.Generator]) -> SamplerPoint:
        """After `done` steps."""
        return SamplerPoint(done, self.named(latents), tuple(generator.get_state() for generator in generators))

    def at(self, start: SamplerPoint | None, generators: Sequence[torch.Generator]) -> tuple[int, list[Tensor]]:
        """Steps that lie behind, and the latents to go on with; the generators are brought to where they were.

        Raises:
            ValueError: the point is of other modalities, shapes, dtypes or another number of generators.
        """
        if start is None:
            return 0, self.latents
        if set(start.latents) != set(self.names) or len(start.generators) != len(generators):
            raise ValueError(
                f"start must hold {', '.join(self.names)} and {len(generators)} generators, "
                f"got {', '.join(start.latents)} and {len(start.generators)}"
            )
        for name, latent in zip(self.names, self.latents, strict=True):
            found = start.latents[name]
            if found.shape != latent.shape or found.dtype != latent.dtype:
                raise ValueError(
                    f"start.latents[{name!r}] must be {latent.dtype} {tuple(latent.shape)}, got {found.dtype} {tuple(found.shape)}"
                )
        for generator, state in zip(generators, start.generators, strict=True):
            generator.set_state(state.cpu())
        return start.done, [start.latents[name].to(self.device).contiguous() for name in self.names]

    def predict(
        self, denoiser: Denoiser, latents: Iterable[Tensor], sigma: float, step: int, substep: bool
    ) -> list[Tensor]:
        """One evaluation of the denoiser, checked, as a list in the order of `names`."""
        predictions = denoiser(self.named(latents), sigma, step=step, substep=substep)
        found = []
        for name, latent in zip(self.names, self.latents, strict=True):
            x0 = predictions.get(name)
            if not isinstance(x0, Tensor):
                raise TypeError(f"denoiser must return a tensor for {name!r}, got {type(x0).__name__}")
            if x0.shape != latent.shape:
                raise ValueError(
                    f"denoiser must return {name!r} with shape {tuple(latent.shape)}, got {tuple(x0.shape)}"
                )
            found.append(x0)
        return found


def sampler_state(
    latents: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | None] | None,
    clean: Mapping[str, Tensor | None] | None,
    model_dtype: torch.dtype | None,
) -> SamplerState:
    """Checked and ordered sampler inputs, latents cast to the model dtype.

    Raises:
        TypeError, ValueError: each names the parameter.
    """
    _check_names("latents", latents)
    names = tuple(name for name in MODALITIES if name in latents)
    if not names:
        raise ValueError('latents is empty: expected "video", "audio" or both')
    masks, clean = masks or {}, clean or {}
    for parameter, given in (("masks", masks), ("clean", clean)):
        _check_names(parameter, given)
        for name in given:
            if name not in latents and given[name] is not None:
                raise ValueError(f"{parameter}[{name!r}] has no latent: latents holds {', '.join(names)}")
    if model_dtype is not None and model_dtype not in LATENT_DTYPES:
        raise TypeError(f"model_dtype must be one of {', '.join(map(str, LATENT_DTYPES))}, got {model_dtype}")
    first = latents[names[0]]
    for name in names:
        _check_latent(name, latents[name], getattr(first, "device", None), masks.get(name), clean.get(name))
    dtype = model_dtype or first.dtype
    if model_dtype is None and any(latents[name].dtype != dtype for name in names):
        raise TypeError(
            f"latents must share one dtype, got {[latents[name].dtype for name in names]}: give model_dtype"
        )
    return SamplerState(
        names,
        [latents[name].to(dtype).contiguous() for name in names],
        [masks.get(name) for name in names],
        [clean.get(name) for name in names],
    )


def _check_names(parameter: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{parameter} must be a dict of tensors by modality, got {type(given).__name__}")
    for name in given:
        if name not in MODALITIES:
            raise ValueError(f'{parameter} has the unknown key {name!r}: expected "video", "audio" or both')


def _check_latent(
    name: str, latent: Tensor, device: torch.device | None, mask: Tensor | None, clean: Tensor | None
) -> None:
    if not isinstance(latent, Tensor):
        raise TypeError(f"latents[{name!r}] must be a torch.Tensor, got {type(latent).__name__}")
    if latent.dtype not in LATENT_DTYPES:
        raise TypeError(f"latents[{name!r}] must be floating point, got {latent.dtype}")
    if latent.dim() != 3:
        raise ValueError(f"latents[{name!r}] must be packed (B, T, C), got shape {tuple(latent.shape)}")
    if latent.device != device:
        raise ValueError(f"latents[{name!r}] must be on {device} like the other modality, got {latent.device}")
    if (mask is None) != (clean is None):
        given, missing = ("clean", "masks") if mask is None else ("masks", "clean")
        raise ValueError(f"{given}[{name!r}] is given without {missing}[{name!r}]: give both or neither")
    if mask is None or clean is None:
        return
    expected = {"masks": (mask, (*latent.shape[:-1], 1)), "clean": (clean, tuple(latent.shape))}
    for parameter, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{parameter}[{name!r}] must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{parameter}[{name!r}] must be on {device}, got {tensor.device}")
    if mask.dtype != torch.float32:
        raise TypeError(f"masks[{name!r}] must be torch.float32, got {mask.dtype}")


def ready_noise(
    state: SamplerState, noise: Mapping[str, Sequence[Tensor]], count: int, each: str
) -> list[list[Tensor]]:
    """Noise given by the caller, `count` tensors for each modality of the state; `each` says why as many.

    Raises:
        ValueError: other modalities, another count, or a tensor that does not fit its latent.
    """
    if set(noise) != set(state.names):
        raise ValueError(f"noise must hold exactly {', '.join(state.names)}, got {', '.join(noise) or 'nothing'}")
    found = []
    for name, latent in zip(state.names, state.latents, strict=True):
        tensors = list(noise[name])
        if len(tensors) != count:
            raise ValueError(f"noise[{name!r}] must hold {count} tensors ({each}), got {len(tensors)}")
        for index, tensor in enumerate(tensors):
            if tensor.shape != latent.shape:
                raise ValueError(
                    f"noise[{name!r}][{index}] must have shape {tuple(latent.shape)}, got {tuple(tensor.shape)}"
                )
            if tensor.device != latent.device:
                raise ValueError(f"noise[{name!r}][{index}] must be on {latent.device}, got {tensor.device}")
        found.append(tensors)
    return found


def offset_seeds(seeds: Seeds) -> Seeds:
    """Seeds of a second source of noise, 10000 above those of the first, as published."""
    if isinstance(seeds, int):
        return (seeds + SECOND_SEED_OFFSET) % 2**64
    return [(seed + SECOND_SEED_OFFSET) % 2**64 for seed in seeds]


def sample_generators(seeds: Seeds, device: torch.device) -> list[torch.Generator]:
    """A fresh generator per seed: one seed for a whole batch, or one per sample."""
    every = [seeds] if isinstance(seeds, int) else seeds
    return [torch.Generator(device).manual_seed(seed) for seed in every]


def fill_normal(buffer: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """`buffer` (B, ...) filled with normal draws: in one draw, or each sample by a generator of its own.

    Raises:
        ValueError: neither one generator nor one per sample.
    """
    if len(generators) not in (1, len(buffer)):
        raise ValueError(
            f"seeds must be one for the batch or one per sample, got {len(generators)} for {len(buffer)} samples"
        )
    for part, generator in zip(buffer.chunk(len(generators)), generators, strict=True):
        part.normal_(generator=generator)
    return buffer


def fp32(value: float) -> float:
    """The fp32 number next to a Python float; schedules are fp32, and a list of floats must mean the same as their tensor."""
    return ctypes.c_float(value).value


def schedule_floats(sigmas: Tensor | Iterable[float]) -> list[float]:
    """Noise levels as host floats, rounded to fp32.

    Raises:
        ValueError: not one-dimensional, or fewer than two levels.
    """
    if isinstance(sigmas, Tensor):
        if sigmas.dim() != 1:
            raise ValueError(f"sigmas must be one-dimensional, got shape {tuple(sigmas.shape)}")
        sigmas = sigmas.tolist()
    levels = [fp32(float(sigma)) for sigma in sigmas]
    if len(levels) < 2:
        raise ValueError(f"sigmas must hold at least two noise levels, got {len(levels)}")
    return levels
