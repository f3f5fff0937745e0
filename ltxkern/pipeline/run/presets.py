"""The published generators as data: sampler, stages, schedule and guidance of each; and which checkpoints they are for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ltxkern.pipeline.files.headers import CheckpointError, read_header
from ltxkern.pipeline.sampling.guidance import HQ_GUIDANCE, TWO_STAGE_GUIDANCE, GuidanceRequest
from ltxkern.pipeline.sampling.schedule import DISTILLED_SIGMAS

if TYPE_CHECKING:
    from ltxkern.pipeline.files.found import FoundModel

logger = logging.getLogger(__name__)

# Words of a file's name or header that tell what it is: no key for it is published, and a model_version "2.3.0" tells nothing.
_DISTILLED = re.compile(r"distill", re.IGNORECASE)
_UNDISTILLED = re.compile(r"(?<![a-z])(dev|base|undistilled)(?![a-z])", re.IGNORECASE)
_FIXED_STEPS = "allowed_inference_steps"


@dataclass(frozen=True)
class Preset:
    """What distinguishes the generators that share this code.

    sampler: "res2s", "euler" or "euler-ancestral", the last in stage 1 only; stages: 1 or 2; distilled_strengths: of the distilled
    LoRA in stage 1 and 2; sigmas: the fixed schedule of stage 1 of a distilled checkpoint; eta: noise share of a step;
    audio_source: the stage whose audio is decoded.
    """

    name: str
    sampler: str
    stages: int
    steps: int
    guidance: GuidanceRequest
    distilled_strengths: tuple[float, float]
    sigmas: tuple[float, ...] | None = None
    eta: float = 0.5
    audio_source: str = "stage1"

    @property
    def for_distilled(self) -> bool:
        """Whether it is made for a checkpoint that is distilled itself: fixed schedule, no guidance."""
        return self.sigmas is not None


PRESETS = {
    "hq": Preset("hq", "res2s", 2, 15, HQ_GUIDANCE, (0.25, 0.5)),
    "two-stage": Preset("two-stage", "euler", 2, 30, TWO_STAGE_GUIDANCE, (0.0, 1.0)),
    "one-stage": Preset("one-stage", "euler", 1, 30, TWO_STAGE_GUIDANCE, (0.0, 0.0)),
    "distilled": Preset(
        "distilled", "euler-ancestral", 2, 8, GuidanceRequest(), (0.0, 0.0), DISTILLED_SIGMAS, 1.0, "stage2"
    ),
    "one-stage-distilled": Preset(
        "one-stage-distilled", "euler-ancestral", 1, 8, GuidanceRequest(), (0.0, 0.0), DISTILLED_SIGMAS, 1.0
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"pipeline must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def tell_distilled(model: FoundModel) -> tuple[bool | None, str]:
    """Whether a model says that it is distilled (None: it does not say), and what says so.

    Its header comes first: a text of the metadata or the configuration that names it so, a flag like `is_distilled`, or the list of
    allowed steps of older distilled files. Then the name of the file, folder or hub repository.
    """
    # The transformer is what was distilled, wherever the rest comes from.
    checkpoint = None if model.own is None else model.own.parts.get("transformer", model.own.checkpoint)
    said: list[tuple[str, str]] = []
    if checkpoint is not None and checkpoint.is_file():
        try:
            header = read_header(checkpoint)
        except CheckpointError:
            return None, "its header cannot be read"  # whoever reads the weights says what is wrong with it
        for key, value in _facts(header.metadata):
            if key == _FIXED_STEPS and value:
                return True, f"its header lists {_FIXED_STEPS}"
            if _DISTILLED.search(key) and not isinstance(value, (str, Mapping)):
                return bool(value), f"its header says {key} {value}"
            if isinstance(value, str) and len(value) < 200:
                said.append((value, f"its header says {key} {value!r}"))
    name = checkpoint.name if checkpoint is not None else model.name.rstrip("/").rpartition("/")[2]
    for text, where in (*said, (name, f"its name is {name}")):
        if _DISTILLED.search(text) and not re.search(r"undistill|not.distill|non.distill", text, re.IGNORECASE):
            return True, where
        if _UNDISTILLED.search(text):
            return False, where
    return None, "neither its header nor its name says that it is"


def _facts(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries of the metadata and of the first two levels of its configuration that may tell a model's kind."""
    config = metadata.get("config")
    sections = [config] if isinstance(config, Mapping) else []
    sections += [section for section in (sections[0].values() if sections else ()) if isinstance(section, Mapping)]
    for place in (metadata, *sections):
        for key, value in place.items():
            telling = re.search(r"version|name|title|architecture|variant|type|distill", key, re.IGNORECASE)
            if key == _FIXED_STEPS or (telling and not key.startswith("_") and place is not config):
                yield key, value


def warn_if_unfit(preset: Preset, model: FoundModel, strengths: tuple[float, float]) -> None:
    """Warn where a distilled checkpoint meets a guided preset, or a checkpoint that is not distilled one without guidance.

    Args:
        preset, model: what was asked for; the random demo fits everything.
        strengths: of the distilled LoRA, which makes a checkpoint a distilled one.
    """
    if model.is_random:
        return
    distilled, where = tell_distilled(model)
    if distilled and not preset.for_distilled:
        logger.warning(
            "%s is distilled (%s), and pipeline %s guides a model that is not: use pipeline distilled or one-stage-distilled",
            model.name,
            where,
            preset.name,
        )
    if not distilled and preset.for_distilled and not any(strengths):
        logger.warning(
            "pipeline %s is for a distilled checkpoint, and %s does not seem to be one (%s): use pipeline hq, or merge the "
            "distilled LoRA at strength 1",
            preset.name,
            model.name,
            where,
        )
