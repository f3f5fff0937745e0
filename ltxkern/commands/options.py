"""Options that several commands share, and what they ask for: the model, found once, and the request."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ltxkern.pipeline.files.found import FoundModel
    from ltxkern.pipeline.generator import HQTwoStagePipeline
    from ltxkern.pipeline.planning.admission import Admission
    from ltxkern.pipeline.planning.plan import Plan
    from ltxkern.pipeline.run.request import GenerationRequest, Preset

# What the built-in models make where nothing else is asked for; the trained one has learnt this size.
DEMO_SIZES = {
    "demo": {"height": 256, "width": 384, "num_frames": 49},
    "demo-random": {"height": 128, "width": 192, "num_frames": 25},
}
# Parts of a model that may be downloaded by themselves.
PARTS = {
    "transformer": "transformer",
    "video_vae": "video VAE",
    "audio_vae": "audio VAE",
    "vocoder": "vocoder",
    "connectors": "text connectors",
    "upsampler": "latent upsampler",
    "text_encoder": "Gemma 3 with its tokenizer",
}
GUIDANCE = {
    "cfg": "classifier-free guidance; 1 switches it off",
    "stg": "spatio-temporal guidance; 0 switches it off",
    "modality": "cross-modal guidance; 1 switches it off",
    "rescale": "share of the standard deviation that is matched to the unguided one",
}


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """What to generate."""
    group = parser.add_argument_group("what to generate")
    group.add_argument("--prompt", help="what the video shows and sounds like")
    group.add_argument(
        "--negative-prompt", help="what to steer away from (default: a built-in list of defects, in our words)"
    )
    group.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH[:FRAME[:STRENGTH]]",
        help="picture to pass through; repeatable",
    )
    group.add_argument(
        "--image-crf", type=int, help="H.264 quality of the re-compression of pictures (default 33; 0: none)"
    )
    group.add_argument("--height", type=int, help="multiple of 64 (default 1088; demo 256)")
    group.add_argument("--width", type=int, help="multiple of 64 (default 1920; demo 384)")
    group.add_argument("--num-frames", type=int, help="8k+1 (default 121; demo 49)")
    group.add_argument(
        "--frame-rate",
        type=_frame_rate,
        default=24.0,
        help="frames per second, or a fraction such as 24000/1001 (default 24)",
    )
    group.add_argument("--seed", type=int, default=10, help="seed of the initial noise (default 10)")
    group.add_argument("--steps", type=int, help="stage-1 steps (default 15 for hq, 30 if guided; else 8, fixed)")
    group.add_argument("--eta", type=float, help="noise share of a step of hq (default 0.5) or distilled (default 1)")
    group.add_argument("--substep-eta", type=float, help="noise share of a res2s midpoint (default 0.5)")
    group.add_argument(
        "--audio-source", help="stage1 or stage2 (default as published: stage2 for distilled, else stage1)"
    )
    scales = parser.add_argument_group("guidance of stage 1 (defaults: the pipeline's preset)")
    for modality in ("video", "audio"):
        for name, text in GUIDANCE.items():
            scales.add_argument(f"--{modality}-{name}-scale", type=float, metavar="F", help=f"{modality}: {text}")
        scales.add_argument(
            f"--{modality}-skip-step", type=int, metavar="N", help=f"{modality}: forwards run every N+1 steps"
        )
        scales.add_argument(f"--{modality}-stg-blocks", metavar="N,N", help=f"{modality}: blocks that STG perturbs")


def _frame_rate(text: str) -> float:
    from ltxkern.pipeline.results.media import frame_rate

    try:
        return float(frame_rate(text))
    except ValueError as error:
        try:
            return float(text)  # what is a number is judged with the rest of the request
        except ValueError:
            raise argparse.ArgumentTypeError(str(error)) from error


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where it computes, and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="demo",
        metavar="PATH",
        help='"demo", "demo-random", an official file, a diffusers folder or a hub id (default demo)',
    )
    group.add_argument(
        "--pipeline", default="hq", help="hq (default), two-stage, one-stage, distilled or one-stage-distilled"
    )
    for name, what in PARTS.items():
        group.add_argument(
            spelled(name),
            metavar="PATH",
            help=f"{what}: file, folder or hub id, where it does not lie with the model",
        )
    group.add_argument(
        "--variant", metavar="NAME", help="of the weights in a diffusers folder, such as fp16 (default: the plain ones)"
    )
    group.add_argument(
        "--embedding-cache", metavar="DIR", help="keeps prompt embeddings (default: the user's cache; off: none)"
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="user LoRA, or owner/name[/file] of the hub; a strength below 0 turns it round; repeatable",
    )
    group.add_argument("--distilled-lora", metavar="PATH", help="distilled LoRA (the demos bring their own)")
    group.add_argument("--distilled-strength-stage-1", type=float, metavar="F", help="default 0.25 for hq, else 0")
    group.add_argument(
        "--distilled-strength-stage-2", type=float, metavar="F", help="default 0.5 for hq, 1 for two-stage, else 0"
    )
    group = parser.add_argument_group("device")
    group.add_argument("--device", help="cuda, cuda:1 or cpu (default: the first CUDA device, else cpu)")
    group.add_argument("--dtype", default=None, help="bf16, fp16 or fp32 (default bf16; fp32 for a demo on a CPU)")
    group.add_argument(
        "--device-mode",
        default=os.environ.get("LTXKERN_DEVICE_MODE") or "auto",
        help="auto (default), resident, snapshot, inplace or original",
    )
    group.add_argument(
        "--attention",
        metavar="NAME",
        default=os.environ.get("LTXKERN_ATTENTION") or "auto",
        help="attention kernel: auto (default), cudnn, fa3, flash, efficient, math, torch; sage, which only approximates",
    )
    group.add_argument(
        "--policy",
        metavar="POLICY",
        default=os.environ.get("LTXKERN_POLICY") or "rounded",
        help="fused passes of the transformer: rounded (default), or exact, those alone that give the bits of separate ops here",
    )
    group.add_argument(
        "--audio-stream",
        action="store_true",
        help="run the sound's part of a block beside the video's (CUDA; same bits)",
    )
    group.add_argument("--backend", help="force a backend, or several in order: cuda,nvrtc,triton,cpu,torch")
    group.add_argument(
        "--max-batch-size", type=int, default=1, help="guidance branches per batch of a forward (default 1)"
    )


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where it computes and how: the model options, checked and resolved; nothing is loaded."""

    model: FoundModel
    preset: Preset
    device: torch.device
    dtype: torch.dtype
    device_mode: str
    attention: str
    policy: str
    audio_stream: bool
    backends: tuple[str, ...]
    loras: tuple[tuple[str, float], ...]
    distilled_lora: str | None
    distilled_strengths: tuple[float, float]
    embedding_cache: str | bool

    @property
    def sizes(self) -> dict[str, int]:
        """Fields of a request that this model has otherwise than the request itself."""
        return DEMO_SIZES.get(self.model.name, {})

    @property
    def lora_files(self) -> list[str]:
        """Every LoRA file that is named."""
        files = [path for path, _ in self.loras]
        return files if self.distilled_lora is None else [*files, self.distilled_lora]

    def plan(self, request: GenerationRequest, *, device_free: int | None = None, host_free: int | None = None) -> Plan:
        """What a request needs on the device that would be used; free bytes are measured where None."""
        from ltxkern.pipeline.planning.plan import plan

        return plan(
            self.model,
            request,
            device=self.device,
            dtype=self.dtype,
            mode=self.device_mode,
            device_free=device_free,
            host_free=host_free,
            loras=self.lora_files or None,
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[HQTwoStagePipeline]:
        """The pipeline, in the context of the backends that --backend names."""
        from ltxkern.pipeline.generator import HQTwoStagePipeline

        with (
            _backend_choice(self.backends),
            HQTwoStagePipeline.from_pretrained(
                self.model,
                device=self.device,
                dtype=self.dtype,
                preset=self.preset.name,
                device_mode=self.device_mode,
                attention=self.attention,
                policy=self.policy,
                audio_stream=self.audio_stream,
                loras=self.loras,
                distilled_lora=self.distilled_lora,
                distilled_strengths=self.distilled_strengths,
                embedding_cache=self.embedding_cache,
            ) as pipeline,
        ):
            yield pipeline


def spelled(name: str) -> str:
    """A parameter as the command line writes it."""
    return f"--{name.replace('_', '-')}"


def names_no_place(text: str) -> bool:
    """Whether nothing lies at this path and it cannot be the name of something on the hub either."""
    place = Path(os.path.expanduser(text))
    return not place.exists() and ("/" not in text.strip("./") or place.is_absolute() or text.startswith("."))


def find_model_options(arguments: argparse.Namespace, admission: Admission) -> ModelOptions | None:
    """Find the model and resolve everything beside it; whatever cannot be served is noted in `admission`.

    Returns:
        None where an option is wrong that the others depend on.
    """
    from ltxkern.pipeline.files.found import FoundModel
    from ltxkern.pipeline.memory.modes import MODES
    from ltxkern.pipeline.model.attention_choice import AttentionChoice
    from ltxkern.pipeline.model.fusions import FusionPolicy
    from ltxkern.pipeline.run.presets import warn_if_unfit
    from ltxkern.pipeline.run.request import find_device, find_preset, require_strength
    from ltxkern.trust.permitted import backend_names

    preset = admission.attempt("", lambda: find_preset(arguments.pipeline))
    given = (arguments.distilled_strength_stage_1, arguments.distilled_strength_stage_2)
    usual = preset.distilled_strengths if preset is not None else (0.0, 0.0)
    first, second = (default if value is None else value for value, default in zip(given, usual, strict=True))
    loras = tuple(with_strength(text) for text in arguments.lora)
    for name, strength, signed in [
        *(("distilled LoRA", strength, False) for strength in (first, second)),
        *((f"lora {path}", strength, True) for path, strength in loras),
    ]:
        admission.attempt("", partial(require_strength, name, strength, signed=signed))
    parts = {name: part for name in PARTS if (part := getattr(arguments, name)) is not None}
    for name, part in list(parts.items()):
        if names_no_place(part):
            admission.add(name, f"there is no file or folder {part}")
            del parts[name]
    modes = ("auto", *MODES)
    if arguments.device_mode not in modes:
        name = "device-mode" if _given(arguments.device_mode, "LTXKERN_DEVICE_MODE") else "LTXKERN_DEVICE_MODE"
        admission.add("", f"{name} must be one of {', '.join(modes)}, got {arguments.device_mode!r}")
    attention = admission.attempt("", lambda: AttentionChoice(_given(arguments.attention, "LTXKERN_ATTENTION")))
    admission.attempt("", lambda: FusionPolicy(_given(arguments.policy, "LTXKERN_POLICY")))
    backends = admission.attempt("", lambda: _find_backends(arguments.backend, backend_names))
    device = admission.attempt("", lambda: find_device(arguments.device))
    model = admission.attempt("model", lambda: FoundModel.of(arguments.model, variant=arguments.variant, **parts))
    small = model is not None and model.is_demo and device is not None and device.type == "cpu"
    dtype = admission.attempt("", lambda: _find_dtype(arguments.dtype or ("fp32" if small else "bf16")))
    if preset is None or backends is None or device is None or model is None or dtype is None:
        return None
    warn_if_unfit(preset, model, (first, second))
    distilled = arguments.distilled_lora or model.distilled_lora
    if attention is not None:
        admission.attempt("", partial(attention.require, device, dtype, model.config("transformer")))
    return ModelOptions(
        model=model,
        preset=preset,
        device=device,
        dtype=dtype,
        device_mode=arguments.device_mode,
        attention=arguments.attention,
        policy=arguments.policy,
        audio_stream=arguments.audio_stream,
        backends=backends,
        loras=loras,
        distilled_lora=None if distilled is None else str(distilled),
        distilled_strengths=(first, second),
        embedding_cache={None: True, "off": False}.get(arguments.embedding_cache, arguments.embedding_cache),
    )


def _given(value: str, variable: str) -> str | None:
    """An option's value; None where it is the variable's, so that a check names that. What `ltxkern resume` keeps has the value."""
    return None if value == os.environ.get(variable) else value


def _find_backends(text: str | None, names: Callable[[str, str], Iterable[str]]) -> tuple[str, ...]:
    """The backends that --backend names; refuses those that cannot run here."""
    backends = tuple(names(text, "backend")) if text else ()
    with _backend_choice(backends):
        return backends


def make_request(arguments: argparse.Namespace, chosen: ModelOptions, admission: Admission) -> GenerationRequest:
    """What to generate; each picture is checked by itself into `admission`, the rest here.

    Raises:
        ValueError, TypeError: an option that cannot be served.
    """
    from ltxkern.pipeline.planning.admission import admit_images
    from ltxkern.pipeline.run.request import GenerationRequest

    # Options that bear a field's name; what was not given keeps the request's default.
    named = {field.name: getattr(arguments, field.name, None) for field in fields(GenerationRequest)}
    given = {name: value for name, value in named.items() if value is not None}
    request = GenerationRequest(images=arguments.image, preset=chosen.preset, **{**chosen.sizes, **given})
    if arguments.image_crf is not None:
        request = replace(request, images=[replace(image, crf=arguments.image_crf) for image in request.images])
    admit_images(admission, request.images, request.num_frames)
    scales = request.guidance(chosen.model.geometry)
    for modality in ("video", "audio"):
        changes = _guidance_changes(arguments, modality)
        if changes:
            request = replace(request, **{f"{modality}_guidance": replace(getattr(scales, modality), **changes)})
    replace(request, images=()).validate(chosen.model.geometry)
    return request


def _guidance_changes(arguments: argparse.Namespace, modality: str) -> dict[str, Any]:
    """The scales of one modality that were given."""
    given = {name: getattr(arguments, f"{modality}_{name}_scale") for name in GUIDANCE}
    given["skip_step"] = getattr(arguments, f"{modality}_skip_step")
    listed = getattr(arguments, f"{modality}_stg_blocks")
    if listed is not None:
        try:
            given["stg_blocks"] = tuple(int(part) for part in str(listed).split(",") if part.strip())
        except ValueError as error:
            wrong = f"{modality}-stg-blocks must be whole numbers separated by commas, got {listed!r}"
            raise ValueError(wrong) from error
    return {name: value for name, value in given.items() if value is not None}


def _find_dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def with_strength(text: str) -> tuple[str, float]:
    """ "PATH[:STRENGTH]" as path and strength, with a sign or without; an existing file wins over a suffix."""
    path, colon, strength = text.rpartition(":")
    if Path(os.path.expanduser(text)).exists() or not colon:
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError as error:
        if path.endswith(".safetensors") or Path(os.path.expanduser(path)).exists():
            raise ValueError(
                f"lora {path}: the strength must be a finite number such as -0.5, got {strength!r}"
            ) from error
        return text, 1.0


def expected_errors() -> tuple[type[BaseException], ...]:
    """Errors that carry a sentence for the user; anything else is a fault of ours and shows its traceback."""
    import torch

    from ltxkern.dispatch import BackendError

    return (ValueError, TypeError, OSError, ArithmeticError, BackendError, torch.OutOfMemoryError)


def _backend_choice(names: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
    """The context in which ops run: free choice, or the named backends."""
    from ltxkern.dispatch import use_backend

    return use_backend(*names) if names else contextlib.nullcontext()
