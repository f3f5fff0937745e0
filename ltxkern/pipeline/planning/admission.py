"""The early pass: everything that headers, configurations and pictures can tell, said in one list before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ltxkern.pipeline.files.checkpoint import is_present
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.files.hub import local_path
from ltxkern.pipeline.files.lora_file import check_lora_file
from ltxkern.pipeline.model.components import BUILDABLE
from ltxkern.pipeline.model.shapes import linear_skeleton

if TYPE_CHECKING:
    from pathlib import Path

    from ltxkern.pipeline.files.found import FoundModel

T = TypeVar("T")
_TEXT = ("text_encoder", "tokenizer")


class Admission:
    """Collects what is wrong, one sentence each, and refuses it all at once.

    Args:
        spell: how a parameter is written where the request comes from, such as "--text-encoder".
    """

    def __init__(self, spell: Callable[[str], str] = str) -> None:
        self._spell = spell
        self.problems: list[str] = []

    def add(self, name: str, sentence: str) -> None:
        """One problem of a parameter; what another check found already is not said again."""
        text = sentence.strip()
        if not any(text in problem for problem in self.problems):
            spelled = self._spell(name)
            text = text.removeprefix(f"{name}: ").removeprefix(f"{name.replace('_', '-')}: ") if name else text
            self.problems.append(f"{spelled}: {text}" if name else text)

    def attempt(self, name: str, check: Callable[[], T]) -> T | None:
        """The result of a check, or None where it refuses, which is then noted."""
        try:
            return check()
        except (ValueError, TypeError, OSError) as error:
            self.add(name, str(error))
            return None

    def close(self) -> None:
        """End of the pass.

        Raises:
            CheckpointError: all problems, where there is any.
        """
        if len(self.problems) == 1:
            raise CheckpointError(self.problems[0])
        if self.problems:
            raise CheckpointError("\n  ".join([f"{len(self.problems)} problems:", *self.problems]))


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
    given = {name: path for name in ("upsampler", "text_encoder") if (path := getattr(model, name)) is not None}
    whole = not model.is_demo and (fetch or model.is_here)
    if not model.is_demo:
        for name, path in given.items():
            if fetch or _is_here(path):
                whole = admission.attempt(name, lambda path=path: local_path(path)) is not None and whole  # type: ignore[misc]
            else:
                whole = False
    if whole and admission.attempt("model", lambda: model.files) is not None:
        own = {*given, *model.files.parts}
        for name, sentence in model.problems([*names, *_TEXT]).items():
            place = "text_encoder" if name in _TEXT else name
            admission.add(place if place in own else "model", sentence)
        for name in [*names, "text_encoder"] if required else ():
            if not is_present(model.files, name):
                admission.add(name, f"none lies with the model {model.name}: name its file or folder")
    transformer = None
    loras = list(loras)
    if loras:
        config = admission.attempt("model", lambda: model.config("transformer"))
        transformer = None if config is None else admission.attempt("model", lambda: linear_skeleton(config))
    for name, path in loras:
        admission.attempt(name, lambda path=path: check_lora_file(path, transformer=transformer))  # type: ignore[misc]


def _is_here(path: str | Path) -> bool:
    """Whether looking a path up downloads nothing: it exists, or it cannot be the name of something on the hub."""
    from pathlib import Path

    return Path(path).expanduser().exists() or "/" not in str(path).strip("./")


def admit_images(admission: Admission, images: Sequence[object], num_frames: int) -> None:
    """Checks every picture of a request by itself."""
    from ltxkern.pipeline.model.conditioning import validate_image_conditions

    for image in images:
        admission.attempt("image", lambda image=image: validate_image_conditions([image], num_frames))  # type: ignore[misc]
