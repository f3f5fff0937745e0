"""What a request over HTTP may say, read off `GenerationRequest`: there is no second list of its fields."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from ltxkern.pipeline.model.conditioning import ImageCondition
from ltxkern.pipeline.run.request import GenerationRequest

if TYPE_CHECKING:
    from ltxkern.commands.options import ModelOptions

# What the request's own checks and the planner would take long over, or much memory, only to refuse it.
MOST = {"height": 8192, "width": 8192, "num_frames": 8193, "steps": 1000, "max_batch_size": 64, "skip_step": 1000}
LONGEST = {"prompt": 20_000, "negative_prompt": 20_000, "audio_source": 20, "images": 16}
LONGEST_LIST = 1000
_SHOWN = 60
_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class RefusedError(ValueError):
    """A request that is not served: its HTTP status, and the sentence that says why."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Offer:
    """The model that is served, found and checked; the worker opens it.

    Attributes:
        chosen: the model options of the command.
        defaults: fields that this model has otherwise than the request, such as the demo's size.
    """

    chosen: ModelOptions
    defaults: Mapping[str, Any]

    def request(self, given: Mapping[str, Any], pictures: Sequence[Path]) -> GenerationRequest:
        """What a checked body asks for; `pictures` are the files of its images, in order.

        Raises:
            ValueError, TypeError: as on the command line.
        """
        values = {**self.defaults, **given}
        said = values.pop("images", ())
        if len(said) > len(pictures):
            raise ValueError(f"images must be sent with their files: {len(said)} described, {len(pictures)} files sent")
        images = [ImageCondition(file, **(said[i] if i < len(said) else {})) for i, file in enumerate(pictures)]
        scales = {name: values.pop(name) for name in _GUIDANCE if values.get(name) is not None}
        request = GenerationRequest(images=images, preset=self.chosen.preset, **values)
        if not request.prompts()[0].strip():
            raise ValueError("prompt is missing: say what the video shows")
        geometry = self.chosen.model.geometry
        usual = request.guidance(geometry)
        for name, changes in scales.items():
            preset = getattr(usual, name.removesuffix("_guidance"))
            request = replace(request, **{name: replace(preset, **_tuples(changes))})
        request.validate(geometry, check_files=False)
        return request


_GUIDANCE = tuple(field.name for field in fields(GenerationRequest) if field.name.endswith("_guidance"))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def body_model(defaults: Mapping[str, Any]) -> type[BaseModel]:
    """The body of a request: every field of `GenerationRequest` that is not the server's to choose."""
    return _model(GenerationRequest, "VideoRequest", without=("preset",), defaults=defaults)


@functools.cache
def _part(kind: type) -> type[BaseModel]:
    return _model(kind, kind.__name__, without=("path",), defaults={})


def _model(kind: type, name: str, *, without: Sequence[str], defaults: Mapping[str, Any]) -> type[BaseModel]:
    """A dataclass as JSON has it; what is not a default of the dataclass is one of `defaults`."""
    hints, made = typing.get_type_hints(kind), {}
    for field in fields(kind):
        if field.name in without:
            continue
        default = field.default if field.default is not MISSING else None
        limits: dict[str, Any] = {}
        if field.name in MOST:
            limits["le"] = MOST[field.name]
        if field.name in LONGEST:
            limits["max_length"] = LONGEST[field.name]
        given = list[_part(ImageCondition)] if field.name == "images" else _json(hints[field.name])  # type: ignore[misc]
        made[field.name] = (Annotated[given, Field(**limits)], defaults.get(field.name, default))
    return create_model(name, __config__=_CONFIG, **made)  # type: ignore[call-overload]


def _json(hint: Any) -> Any:
    """A type as JSON has it: no tensors, lists for sequences, and one where Python takes one or several: a job is one video."""
    several = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = [option for option in (typing.get_args(hint) if several else (hint,)) if option is not Tensor]
    kept: list[Any] = []
    for option in options:
        arguments = typing.get_args(option)
        if is_dataclass(option):
            kept.append(_part(cast(type, option)))
        elif typing.get_origin(option) is Sequence or arguments[1:] == (...,):
            if arguments[0] not in options:
                kept.append(Annotated[list.__class_getitem__(arguments[0]), Field(max_length=LONGEST_LIST)])
        else:
            kept.append(option)
    return typing.Union[tuple(kept)]  # noqa: UP007


def read_body(model: type[BaseModel], body: bytes) -> dict[str, Any]:
    """The fields that a body gives; what it does not name, or names null, keeps its default.

    Raises:
        RefusedError: 400 where it is no JSON, 422 where a field is unknown or of another type; one sentence for all of them.
    """
    try:
        found = model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        if any(problem["type"] == "json_invalid" for problem in problems):
            raise RefusedError(400, f"the body is not JSON ({problems[0]['msg']})") from error
        raise RefusedError(422, "; ".join(_sentence(model, problem) for problem in problems[:5])) from error
    return found.model_dump(exclude_unset=True, exclude_none=True)


def _sentence(model: type[BaseModel], problem: Any) -> str:
    name = ".".join(map(str, problem["loc"])) or "the body"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        return f"unknown field {name!r}" + (f": did you mean {close[0]}?" if close else "")
    if problem["type"] == "less_than_equal":
        most = problem["ctx"]["le"]
        return f"{name} must be at most {most}, got {problem['input']}: use {most}"
    got = repr(problem["input"])
    shown = got if len(got) <= _SHOWN else f"{got[:_SHOWN]}..."
    return f"{name}: {problem['msg'].replace('Input should be', 'must be')}, got {shown}"
