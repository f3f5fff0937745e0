"""Guidance policies: which branches one evaluation runs, how their predictions combine, and the denoiser that does both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import repeat
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ltxkern.ops.combine_guidance import combine_guidance
from ltxkern.pipeline.sampling.state import MODALITIES, Latents

COND, NEG, PERTURBED, MODALITY = "cond", "neg", "perturbed", "modality"

Prediction = Mapping[str, Tensor]


@dataclass(frozen=True)
class GuidanceScales:
    """Guidance of one modality; the defaults are void: one forward and its prediction.

    Attributes:
        cfg: classifier-free guidance scale, 1 is void.
        stg: spatio-temporal guidance scale (self-attention skipped), 0 is void.
        modality: scale against the prediction without cross-modal attention, 1 is void.
        rescale: share of the standard deviation brought back to the conditional one; 0 is void, 1 matches it fully.
        skip_step: steps between two evaluations that reuse the last prediction, 0 for none.
        stg_blocks: blocks whose self-attention the perturbed branch skips.
    """

    cfg: float = 1.0
    stg: float = 0.0
    modality: float = 1.0
    rescale: float = 0.0
    skip_step: int = 0
    stg_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("cfg", "stg", "modality", "rescale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"guidance {name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"guidance {name} must be finite, got {value}")
            if value < 0:
                raise ValueError(f"guidance {name} must be at least 0, got {value}: use 0")
        for name, values in (("skip_step", (self.skip_step,)), ("stg_blocks", tuple(self.stg_blocks))):
            if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
                raise TypeError(f"guidance {name} must hold integers, got {getattr(self, name)!r}")
            if any(value < 0 for value in values):
                raise ValueError(f"guidance {name} must be at least 0, got {getattr(self, name)!r}: use 0")
        if self.stg != 0 and not self.stg_blocks:
            raise ValueError(
                f"guidance stg is {self.stg} but stg_blocks is empty: name the blocks, e.g. (28,), or use 0"
            )
        object.__setattr__(self, "stg_blocks", tuple(self.stg_blocks))

    def skips(self, step: int) -> bool:
        """Whether the step reuses the last prediction."""
        return self.skip_step != 0 and step % (self.skip_step + 1) != 0


VOID = GuidanceScales()
HQ_VIDEO = GuidanceScales(cfg=3.0, modality=3.0, rescale=0.45)
HQ_AUDIO = GuidanceScales(cfg=7.0, modality=3.0, rescale=1.0)
TWO_STAGE_VIDEO = GuidanceScales(cfg=3.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(28,))
TWO_STAGE_AUDIO = GuidanceScales(cfg=7.0, stg=1.0, modality=3.0, rescale=0.7, stg_blocks=(28,))


@dataclass(frozen=True)
class GuidanceRequest:
    """Guidance of a run, video and audio apart; None for a modality that the run does not have."""

    video: GuidanceScales | None = VOID
    audio: GuidanceScales | None = VOID

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and not isinstance(value, GuidanceScales):
                raise TypeError(f"{each.name} must be GuidanceScales or None, got {type(value).__name__}")
        if not self.present:
            raise ValueError("video and audio are both None: give the scales of at least one modality")

    @property
    def present(self) -> dict[str, GuidanceScales]:
        """Scales of the modalities of the run."""
        found = {name: getattr(self, name) for name in MODALITIES}
        return {name: scales for name, scales in found.items() if scales is not None}


HQ_GUIDANCE = GuidanceRequest(HQ_VIDEO, HQ_AUDIO)
TWO_STAGE_GUIDANCE = GuidanceRequest(TWO_STAGE_VIDEO, TWO_STAGE_AUDIO)


@dataclass(frozen=True, eq=False)
class CFGBranch:
    """One forward of an evaluation.

    Attributes:
        name: unique in its policy.
        is_conditional: whether it sees the prompt.
        kwargs: what the forward takes besides latents and sigma: contexts, and where the branch leaves attention out
            skip_video_self_attn_blocks, skip_audio_self_attn_blocks, disable_a2v_cross_attn, disable_v2a_cross_attn. Read-only.
    """

    name: str
    is_conditional: bool
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kwargs", MappingProxyType(dict(self.kwargs)))


class CFGPolicy(ABC):
    """Which branches an evaluation runs and how their predictions combine. Built once per run, read-only afterwards.

    Subclass it for another scheme: `build` makes the policy with its branches, `combine` turns their predictions into one.
    """

    branches: tuple[CFGBranch, ...]

    @classmethod
    @abstractmethod
    def build(
        cls, request: GuidanceRequest, positive: Mapping[str, Any], negative: Mapping[str, Any] | None = None
    ) -> CFGPolicy:
        """The policy of a run.

        Args:
            request: scales of the run.
            positive: forward arguments of the conditional branch: contexts of the prompt.
            negative: those that differ with the negative prompt; None where no branch needs it.
        Raises:
            ValueError: a branch needs `negative` and it is None.
        """

    @abstractmethod
    def combine(self, predictions: Mapping[str, Prediction]) -> Latents:
        """x0 by modality from x0 by modality of every branch, keyed by branch name."""

    def skipped(self, step: int) -> frozenset[str]:
        """Modalities that reuse their last prediction in this step; all of them: no forward runs."""
        return frozenset()


@dataclass(frozen=True, eq=False)
class SingleBranchPolicy(CFGPolicy):
    """One forward, no guidance: the prediction as it is (stage 2, distilled models)."""

    branches: tuple[CFGBranch, ...]

    @classmethod
    def build(
        cls,
        request: GuidanceRequest | None = None,
        positive: Mapping[str, Any] = MappingProxyType({}),
        negative: Mapping[str, Any] | None = None,
    ) -> SingleBranchPolicy:
        """The policy of a run; scales and negative prompt play no part."""
        return cls((CFGBranch(COND, True, positive),))

    def combine(self, predictions: Mapping[str, Prediction]) -> Latents:
        """The one prediction."""
        return dict(predictions[self.branches[0].name])


@dataclass(frozen=True, eq=False)
class MultiModalPolicy(CFGPolicy):
    """Multi-modal guidance of LTX-2: up to four branches, video and audio scales apart.

    `cond + (cfg - 1)(cond - neg) + stg (cond - perturbed) + (mod - 1)(cond - modality)`, rescaled; see `combine_guidance`, which
    is called once per sample, so that videos of one batch have deviations of their own. A branch
    runs only where its scale is not void for at least one modality; each modality uses its own scales on it. Without a second
    modality the modality branch equals cond and never runs.
    """

    branches: tuple[CFGBranch, ...]
    request: GuidanceRequest

    used: ClassVar[tuple[str, ...]] = (NEG, PERTURBED, MODALITY)

    @classmethod
    def build(
        cls, request: GuidanceRequest, positive: Mapping[str, Any], negative: Mapping[str, Any] | None = None
    ) -> MultiModalPolicy:
        """The policy of a run: branches in the order cond, neg, perturbed, modality, void ones left out."""
        present = request.present
        branches = [CFGBranch(COND, True, positive)]
        if any(scales.cfg != 1 for scales in present.values()):
            if negative is None:
                shown = ", ".join(f"{name} cfg {scales.cfg}" for name, scales in present.items())
                raise ValueError(f"negative is needed for {shown}: give it, or use cfg 1")
            branches.append(CFGBranch(NEG, False, {**positive, **negative}))
        blocks = {
            f"skip_{name}_self_attn_blocks": scales.stg_blocks for name, scales in present.items() if scales.stg != 0
        }
        if blocks and PERTURBED in cls.used:
            branches.append(CFGBranch(PERTURBED, True, {**positive, **blocks}))
        isolates = len(present) > 1 and any(scales.modality != 1 for scales in present.values())
        if isolates and MODALITY in cls.used:
            alone = {"disable_a2v_cross_attn": True, "disable_v2a_cross_attn": True}
            branches.append(CFGBranch(MODALITY, True, {**positive, **alone}))
        return cls(tuple(branches), request)

    def combine(self, predictions: Mapping[str, Prediction]) -> Latents:
        """The guided prediction of each modality."""
        cond = predictions[COND]
        others = [predictions.get(name, {}) for name in (NEG, PERTURBED, MODALITY)]
        ran = {branch.name for branch in self.branches}
        combined = {}
        for name, scales in self.request.present.items():
            if name not in cond:
                continue
            branches = (cond[name], *(other.get(name) for other in others))
            combine = partial(
                combine_guidance,
                cfg_scale=scales.cfg,
                stg_scale=scales.stg if PERTURBED in ran else 0.0,
                modality_scale=scales.modality if MODALITY in ran else 1.0,
                rescale_scale=scales.rescale,
            )
            # The op's deviations are over its whole tensor; videos that share a call must not share them.
            parts = len(cond[name]) if scales.rescale else 1
            samples = zip(*(repeat(None) if b is None else b.chunk(parts) for b in branches), strict=False)
            each = [combine(*sample) for sample in samples]
            combined[name] = each[0] if len(each) == 1 else torch.cat(each)
        return combined

    def skipped(self, step: int) -> frozenset[str]:
        """Modalities whose skip_step leaves this step out."""
        return frozenset(name for name, scales in self.request.present.items() if scales.skips(step))


@dataclass(frozen=True, eq=False)
class PlainCFGPolicy(MultiModalPolicy):
    """Plain classifier-free guidance: `neg + cfg (cond - neg)`, two branches, one where cfg is 1; stg and modality are not used."""

    used: ClassVar[tuple[str, ...]] = (NEG,)


Forward = Callable[[Latents, float, CFGBranch], Prediction]
Runner = Callable[[Sequence[CFGBranch], Forward, Latents, float], Mapping[str, Prediction]]


def run_branches(
    branches: Sequence[CFGBranch], forward: Forward, latents: Latents, sigma: float
) -> dict[str, Prediction]:
    """Predictions of the branches by name, one forward after the other in their order."""
    return {branch.name: forward(latents, sigma, branch) for branch in branches}


class GuidedDenoiser:
    """A policy and a model forward as the sampler's denoiser.

    Each evaluation runs the policy's branches and combines them. Where `policy.skipped(step)` names every modality, no forward runs
    and the last prediction is returned; where it names some, the forwards run and those modalities keep their last prediction.
    Midpoints count as step 0, so they never skip.

    Args:
        policy: built for this run.
        forward: `forward(latents, sigma, branch) -> x0 by modality`.
        runner: how the branches are run; the default is one after the other. Batched or distributed runners take its place.

    Attributes:
        evaluations: calls by the sampler.
        forwards: branch forwards run, over all ranks.
        last: the last prediction of each modality, which skipped steps return.
    """

    def __init__(self, policy: CFGPolicy, forward: Forward, *, runner: Runner = run_branches) -> None:
        names = [branch.name for branch in policy.branches]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"policy must have branches of distinct names, got {names}")
        self.policy = policy
        self.evaluations = 0
        self.forwards = 0
        self._forward = forward
        self._runner = runner
        self.last: Latents = {}

    def __call__(self, latents: Latents, sigma: float, *, step: int, substep: bool) -> Latents:
        """x0 by modality; see `res2s_sample`."""
        self.evaluations += 1
        # A modality without a prediction yet cannot reuse it: a run may start in the middle of a schedule.
        skipped = self.policy.skipped(0 if substep else step) & self.last.keys()
        if latents.keys() <= skipped:
            return dict(self.last)
        predictions = self._runner(self.policy.branches, self._forward, latents, sigma)
        self.forwards += len(self.policy.branches)
        combined = self.policy.combine(predictions)
        self.last = {name: self.last[name] if name in skipped else value for name, value in combined.items()}
        return dict(self.last)
