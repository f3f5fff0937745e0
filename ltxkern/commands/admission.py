"""Options, files and pictures of a command checked in one early pass, before any weight is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ltxkern.commands import options

if TYPE_CHECKING:
    from ltxkern.pipeline.planning.admission import Admission
    from ltxkern.pipeline.run.request import GenerationRequest


def read_options(
    arguments: argparse.Namespace, *checks: Callable[[], object]
) -> tuple[options.ModelOptions, GenerationRequest]:
    """The model and the request, both checked: one early pass over all options, files and pictures.

    Args:
        arguments: of the command.
        checks: what else the command looks at; each raises ValueError where it refuses.

    Raises:
        ValueError: everything that cannot be served, in one list.
    """
    admission = _admission()
    for check in checks:
        admission.attempt("", check)
    _admit_output(admission, arguments)
    chosen = _admit_options(admission, arguments)
    request = admission.attempt("", lambda: options.make_request(arguments, chosen, admission))
    if request is None:
        raise admission.refusal()
    admission.close()
    return chosen, request


def read_model_options(arguments: argparse.Namespace) -> options.ModelOptions:
    """Find the model, resolve everything beside it, and check all its files from their headers.

    Raises:
        ValueError: an option that cannot be served; every file that cannot, in one list.
    """
    admission = _admission()
    chosen = _admit_options(admission, arguments)
    admission.close()
    return chosen


def _admission() -> Admission:
    from ltxkern.pipeline.planning.admission import Admission

    return Admission(options.spelled)


def _admit_variables(admission: Admission) -> None:
    """Those that no option has for its default."""
    from ltxkern.dispatch import disabled
    from ltxkern.pipeline.model import decoder_layout
    from ltxkern.trust.backends import probing
    from ltxkern.trust.permitted import environment_choice

    for asked in (environment_choice, disabled, probing, decoder_layout.asked):
        admission.attempt("", asked)


def _admit_options(admission: Admission, arguments: argparse.Namespace) -> options.ModelOptions:
    """The model options, and the check of all files they name; refuses at once where the others depend on a wrong one."""
    _admit_variables(admission)
    chosen = options.find_model_options(arguments, admission)
    if chosen is None:
        _admit_named(admission, arguments)
        raise admission.refusal()
    _admit_files(admission, chosen, arguments)
    return chosen


def _admit_output(admission: Admission, arguments: argparse.Namespace) -> None:
    """Check where the result goes; a dry run may be made elsewhere than the run, and judges the suffix alone."""
    from ltxkern.pipeline.results.atomic import output_kind, writable_output

    if arguments.command == "generate":
        check = output_kind if arguments.dry_run else writable_output
        admission.attempt("output", lambda: check(arguments.output))


def _admit_named(admission: Admission, arguments: argparse.Namespace) -> None:
    """Check the pictures and the places of LoRAs, which need no model to be judged."""
    from ltxkern.pipeline.planning.admission import admit_images
    from ltxkern.pipeline.run.request import GenerationRequest

    for name, texts in (("lora", arguments.lora), ("distilled_lora", [arguments.distilled_lora])):
        for path in [options.with_strength(text)[0] for text in texts if text is not None]:
            if options.names_no_place(path):
                admission.add(name, f"there is no file {path}")
    request = admission.attempt("", lambda: GenerationRequest(images=arguments.image))
    if request is not None:
        admit_images(admission, request.images, arguments.num_frames or request.num_frames)


def _admit_files(admission: Admission, chosen: options.ModelOptions, arguments: argparse.Namespace) -> None:
    """Check the files of the model and of the LoRAs; a run needs them all, a plan and a dry run only judge what is named."""
    from ltxkern.pipeline.planning.admission import admit_model

    dry = bool(getattr(arguments, "dry_run", False))
    runs = arguments.command != "plan" and not dry
    loras = [("lora", path) for path, _ in chosen.loras]
    if chosen.distilled_lora is not None:
        loras.append(("distilled_lora", chosen.distilled_lora))
    elif runs and not chosen.model.is_random and chosen.preset.stages == 2 and any(chosen.distilled_strengths):
        admission.add(
            "distilled_lora",
            f"the {chosen.preset.name} pipeline needs the distilled LoRA: name its file, or set "
            "--distilled-strength-stage-1 and --distilled-strength-stage-2 to 0",
        )
    absent = [(name, path) for name, path in loras if options.names_no_place(path)]
    for name, path in absent:
        admission.add(name, f"there is no file {path}")
    loras = [lora for lora in loras if lora not in absent]
    admit_model(admission, chosen.model, stages=chosen.preset.stages, loras=loras, fetch=not dry, required=runs)


def read_request(arguments: argparse.Namespace, chosen: options.ModelOptions) -> GenerationRequest:
    """What to generate, checked against the model.

    Raises:
        ValueError, TypeError: what cannot be served, every picture in one list.
    """
    admission = _admission()
    request = options.make_request(arguments, chosen, admission)
    admission.close()
    return request
