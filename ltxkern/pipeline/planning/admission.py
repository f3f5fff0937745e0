"""The early pass: everything that headers, configurations and pictures can tell, said in one list before a weight is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ltxkern.pipeline.files.checkpoint import component_config, component_problem, is_present
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.files.hub import ModelFiles, find_model, local_path
from ltxkern.pipeline.files.lora_file import check_lora_file
from ltxkern.pipeline.model.components import BUILDABLE
from ltxkern.pipeline.model.shapes import expected_shapes

if TYPE_CHECKING:
    from ltxkern.pipeline.files.found import FoundModel

T = TypeVar("T")


class Admission:
    """Collects what is wrong, one sentence each, and refuses it all at once.

    Args:
        spell: how a parameter is written where the request comes from, such as "--text-encoder".
    """

    def __init__(self, spell: Callable[[str], str] = str) -> None:
        self._spell = spell
        self.problems: list[str] = []
        self.failed: set[str] = set()

    def add(self, name: str, sentence: str) -> None:
        """One problem of a parameter; what another check found already is not said again."""
        text = sentence.strip()
        self.failed.add(name)
        if not any(text in problem for problem in self.problems):
            spelled = self._spell(name)
            text = text.removeprefix(f"{name}: ").removeprefix(f"{name.replace('_', '-')}: ") if name else text
            self.problems.append(f"{spelled}: {text}" if name else text)

    def attempt(self, name: str, check: Callable[[], T]) -> T | None:
        """The result of a check, or None where it refuses, which is then noted."""
        try:
            return check()
        except (ValueError, TypeError, OSError) as error:
            for sentence in getattr(error, "problems", [str(error)]):
                self.add(name, sentence)
            return None

    def close(self) -> None:
        """End of the pass.

        Raises:
            CheckpointError: all problems, where there is any.
        """
        if self.problems:
            raise self.refusal()

    def refusal(self) -> CheckpointError:
        """All problems as one error."""
        if len(self.problems) == 1:
            return CheckpointError(self.problems[0])
        return CheckpointError("\n  ".join([f"{len(self.problems)} problems:", *self.problems]))


def admit_model(
    admission: Admission,
    model: FoundModel,
    *,
    stages: int,
    loras: Iterable[tuple[str, str | Path]] = (),
    fetch: bool = True,
    required: bool = True,
) -> None:
    """Checks a model's files and the LoRA files that go with it: ends, names, shapes, dtypes, encoder against connectors.

    Args:
        admission: takes the problems.
        model: found.
        stages: of the request; one needs no upsampler.
        loras: parameter and path of each.
        fetch: what lies on the hub may be downloaded; otherwise it is not judged.
        required: every component that a run needs must be there.
    """
    names = [name for name in BUILDABLE if stages > 1 or name != "upsampler"]
    if model.is_demo:
        for name in ("upsampler", "text_encoder"):
            if (path := getattr(model, name)) is not None:
                admission.add(name, f"the demo brings its own: name the model that {path} goes with")
    files = None if model.is_random else _files_here(admission, model, fetch=fetch)
    if files is not None:
        own = {*files.parts, *(name for name in ("upsampler", "text_encoder") if getattr(model, name) is not None)}
        failed = set(admission.failed)
        for name in [*names, "text_encoder", "tokenizer"]:
            place = "text_encoder" if name == "tokenizer" else name
            if place in failed or (place in own and not is_present(files, name)):
                continue  # said already, or not to be fetched
            if is_present(files, name):
                problem = component_problem(files, name)
                if problem is not None:
                    admission.add(place if place in own else "model", problem)
            elif required and name != "tokenizer":
                admission.add(name, f"the model {model.name} has no {name.replace('_', ' ')}: name its file or folder")
    transformer = None
    loras = list(loras)
    if loras:
        config = admission.attempt("model", lambda: _transformer_config(model, files))
        if config is not None:
            transformer = admission.attempt("model", lambda: expected_shapes("transformer", config))
    given: set[Path] = set()
    for name, path in loras:
        found = admission.attempt(name, lambda path=path: check_lora_file(path, transformer=transformer))  # type: ignore[misc]
        if found is not None and found.path.absolute() in given:
            admission.add(name, f"{path} is given twice: give it once, with the sum of the strengths")
        given |= set() if found is None else {found.path.absolute()}


def _files_here(admission: Admission, model: FoundModel, *, fetch: bool) -> ModelFiles | None:
    """Where the components lie, as far as that can be told; parts that cannot be found are noted."""
    files = model.own
    if files is None and fetch:
        files = admission.attempt("model", lambda: find_model(model.name, variant=model.variant, **model.parts))
    parts: dict[str, Path | None] = {"upsampler": None, "text_encoder": None}
    for name in parts:
        path = getattr(model, name)
        if path is not None and (fetch or _is_here(path)):
            parts[name] = admission.attempt(name, lambda path=path: local_path(path))  # type: ignore[misc]
    return None if files is None else files.with_parts(**parts)


def _transformer_config(model: FoundModel, files: ModelFiles | None) -> Mapping[str, Any] | None:
    return model.config("transformer") if files is None else component_config(files, "transformer")


def _is_here(path: str | Path) -> bool:
    """Whether looking a path up downloads nothing: it exists, or it cannot be the name of something on the hub."""
    return Path(os.path.expanduser(path)).exists() or "/" not in str(path).strip("./")


def admit_images(admission: Admission, images: Sequence[object], num_frames: int) -> None:
    """Checks every picture of a request by itself."""
    from ltxkern.pipeline.model.conditioning import validate_image_conditions

    for image in images:
        admission.attempt("image", lambda image=image: validate_image_conditions([image], num_frames))  # type: ignore[misc]
