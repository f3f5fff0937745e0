"""Options that several commands share, and the request and pipeline that they describe."""

from __future__ import annotations

import argparse
import difflib
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

DEMO_DEFAULTS = {"height": 128, "width": 192, "num_frames": 25}
DEVICE_MODES = ("auto", "resident", "snapshot", "inplace", "original")
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
    group.add_argument("--height", type=int, help="multiple of 64 (default 1088; demo 128)")
    group.add_argument("--width", type=int, help="multiple of 64 (default 1920; demo 192)")
    group.add_argument("--num-frames", type=int, help="8k+1 (default 121; demo 25)")
    group.add_argument("--frame-rate", type=float, default=24.0, help="frames per second (default 24)")
    group.add_argument("--seed", type=int, default=10, help="seed of the initial noise (default 10)")
    group.add_argument("--steps", type=int, help="stage-1 steps (default 15 for hq, else 30)")
    group.add_argument("--eta", type=float, default=0.5, help="noise share of a res2s step (default 0.5)")
    group.add_argument("--audio-source", default="stage1", help="stage1 (as published, default) or stage2")
    scales = parser.add_argument_group("guidance of stage 1 (defaults: the pipeline's preset)")
    for modality in ("video", "audio"):
        for name, text in GUIDANCE.items():
            scales.add_argument(f"--{modality}-{name}-scale", type=float, metavar="F", help=f"{modality}: {text}")
        scales.add_argument(
            f"--{modality}-skip-step", type=int, metavar="N", help=f"{modality}: forwards run every N+1 steps"
        )
        scales.add_argument(f"--{modality}-stg-blocks", metavar="N,N", help=f"{modality}: blocks that STG perturbs")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where it computes, and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="demo", help='"demo", an official file, a diffusers folder or a hub id (default demo)'
    )
    group.add_argument("--pipeline", default="hq", help="hq (default), two-stage or one-stage")
    group.add_argument("--upsampler", metavar="PATH", help="latent upsampler, where it does not lie with the model")
    group.add_argument("--text-encoder", metavar="PATH", help="Gemma 3 folder, where it does not lie with the model")
    group.add_argument(
        "--embedding-cache", metavar="DIR", help="keeps prompt embeddings (default: the user's cache; off: none)"
    )
    group.add_argument("--lora", action="append", default=[], metavar="PATH[:STRENGTH]", help="user LoRA; repeatable")
    group.add_argument("--distilled-lora", metavar="PATH", help="distilled LoRA (the demo brings its own)")
    group.add_argument(
        "--distilled-strength-stage-1", type=float, metavar="F", help="default 0.25 for hq, 0 for two-stage"
    )
    group.add_argument(
        "--distilled-strength-stage-2", type=float, metavar="F", help="default 0.5 for hq, 1 for two-stage"
    )
    group = parser.add_argument_group("device")
    group.add_argument("--device", help="cuda, cuda:1 or cpu (default: the first CUDA device, else cpu)")
    group.add_argument("--dtype", default=None, help="bf16, fp16 or fp32 (default bf16; fp32 for the demo on a CPU)")
    group.add_argument(
        "--device-mode",
        default=os.environ.get("LTXKERN_DEVICE_MODE", "auto"),
        help="auto (default), resident, snapshot, inplace or original",
    )
    group.add_argument("--backend", help="force a backend, or several in order: cuda,nvrtc,triton,cpu,torch")
    group.add_argument("--max-batch-size", type=int, default=1, help="guidance branches per forward (default 1)")


def split_suffix(text: str, kind: str) -> tuple[str, float]:
    """ "PATH[:STRENGTH]" as path and strength; an existing file wins over a suffix."""
    path, colon, strength = text.rpartition(":")
    if Path(text).exists() or not colon:
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        return text, 1.0


def resolve_defaults(arguments: argparse.Namespace) -> None:
    """Fill sizes that were not given: the demo's small ones, or the published ones."""
    defaults = DEMO_DEFAULTS if arguments.model == "demo" else {"height": 1088, "width": 1920, "num_frames": 121}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def guidance(arguments: argparse.Namespace, modality: str, default: Any, blocks: int) -> Any:
    """Scales of one modality: the preset's, changed by the options that were given; None where none was."""
    from dataclasses import replace

    changes: dict[str, Any] = {}
    for name in GUIDANCE:
        value = getattr(arguments, f"{modality}_{name}_scale")
        if value is not None:
            changes[name] = value
    if getattr(arguments, f"{modality}_skip_step") is not None:
        changes["skip_step"] = getattr(arguments, f"{modality}_skip_step")
    listed = getattr(arguments, f"{modality}_stg_blocks")
    if listed is not None:
        try:
            changes["stg_blocks"] = tuple(int(part) for part in str(listed).split(",") if part.strip())
        except ValueError as error:
            raise ValueError(
                f"{modality}-stg-blocks must be whole numbers separated by commas, got {listed!r}"
            ) from error
    if not changes:
        return None
    from ltxkern.pipeline.run.request import scale_blocks

    moved = scale_blocks(default, blocks)
    assert moved is not None
    return replace(moved, **changes)


def request_arguments(arguments: argparse.Namespace, geometry: Any) -> dict[str, Any]:
    """Keyword arguments of the pipeline call (and of `GenerationRequest`, less the preset)."""
    from dataclasses import replace

    from ltxkern.pipeline.run.request import find_preset, image_conditions

    preset = find_preset(arguments.pipeline)
    images = image_conditions(arguments.image)
    if arguments.image_crf is not None:
        images = tuple(replace(image, crf=arguments.image_crf) for image in images)
    result = {
        "prompt": arguments.prompt or "",
        "images": images,
        "seed": arguments.seed,
        "height": arguments.height,
        "width": arguments.width,
        "num_frames": arguments.num_frames,
        "frame_rate": arguments.frame_rate,
        "steps": arguments.steps,
        "eta": arguments.eta,
        "audio_source": arguments.audio_source,
        "max_batch_size": arguments.max_batch_size,
        "video_guidance": guidance(arguments, "video", preset.guidance.video, geometry.blocks),
        "audio_guidance": guidance(arguments, "audio", preset.guidance.audio, geometry.blocks),
    }
    if arguments.negative_prompt is not None:
        result["negative_prompt"] = arguments.negative_prompt
    return result


def strengths(arguments: argparse.Namespace) -> tuple[float, float]:
    """Distilled strengths of both stages: given, or the preset's."""
    from ltxkern.pipeline.run.request import find_preset

    defaults = find_preset(arguments.pipeline).distilled_strengths
    given = (arguments.distilled_strength_stage_1, arguments.distilled_strength_stage_2)
    first, second = (default if value is None else value for value, default in zip(given, defaults, strict=True))
    return first, second


def find_dtype(arguments: argparse.Namespace) -> Any:
    """The torch dtype that --dtype names."""
    import torch

    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if arguments.dtype is None:
        on_cpu = not torch.cuda.is_available() if arguments.device is None else str(arguments.device) == "cpu"
        return torch.float32 if arguments.model == "demo" and on_cpu else torch.bfloat16
    if arguments.dtype not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}, got {arguments.dtype!r}")
    return names[arguments.dtype]


def check_files(arguments: argparse.Namespace) -> None:
    """Refuse, from headers alone, paths that do not exist and LoRAs that fit nothing of the model."""
    from ltxkern.pipeline.files.checkpoint import component_config, find_model
    from ltxkern.pipeline.files.lora_file import check_lora_file
    from ltxkern.pipeline.model.components import build

    for name in ("upsampler", "text_encoder"):
        given = getattr(arguments, name)
        if given is not None and "/" not in given.strip("./") and not Path(given).expanduser().exists():
            raise ValueError(f"{name.replace('_', '-')}: there is no file or folder {given}")
    files = [split_suffix(text, "lora")[0] for text in arguments.lora]
    for path in files:
        _require_file("lora", path)
    if arguments.distilled_lora is not None:
        _require_file("distilled-lora", arguments.distilled_lora)
        files.append(arguments.distilled_lora)
    if not files:
        return
    if arguments.model == "demo":
        from ltxkern.pipeline.files.demo import DEMO_CONFIGS

        config = DEMO_CONFIGS["transformer"]
    elif Path(arguments.model).expanduser().exists():
        config = dict(component_config(find_model(arguments.model), "transformer"))
    else:
        config = None
    transformer = None if config is None else build("transformer", config)
    for path in files:
        check_lora_file(path, transformer=transformer)


def _require_file(name: str, path: str) -> None:
    if not Path(path).expanduser().is_file():
        raise ValueError(f"{name}: there is no file {path}")


def open_pipeline(arguments: argparse.Namespace) -> Any:
    """The pipeline that the model options describe."""
    from ltxkern.pipeline.generator import HQTwoStagePipeline

    return HQTwoStagePipeline.from_pretrained(
        arguments.model,
        device=arguments.device,
        dtype=find_dtype(arguments),
        preset=arguments.pipeline,
        device_mode=arguments.device_mode,
        loras=[split_suffix(text, "lora") for text in arguments.lora],
        distilled_lora=arguments.distilled_lora,
        distilled_strengths=strengths(arguments),
        upsampler=arguments.upsampler,
        text_encoder=arguments.text_encoder,
        embedding_cache={None: True, "off": False}.get(arguments.embedding_cache, arguments.embedding_cache),
    )


def backend_choice(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """The context in which ops run: free choice, or the backends that --backend names."""
    from ltxkern.dispatch import backend_names, use_backend

    if not arguments.backend:
        return nullcontext()
    return use_backend(*backend_names(arguments.backend, "backend"))


def read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Values of a YAML file as defaults of a command's options; dashes and underscores are alike.

    Raises:
        ValueError: the file is missing, is no mapping, names an unknown option, or has a value of the wrong type.
    """
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"config: there is no file {path}")
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config {path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected a mapping of options to values, got {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions or name in ("help", "config"):
            close = difflib.get_close_matches(name, actions, n=1)
            hint = f": did you mean {close[0].replace('_', '-')}?" if close else ""
            raise ValueError(f"config {path}: unknown option {key}{hint}")
        values[name] = _config_value(actions[name], key, value, path)
    return values


def _config_value(action: argparse.Action, key: str, value: Any, path: str) -> Any:
    """A YAML value as the option takes it; numbers, texts and switches are not turned into one another."""
    if isinstance(action.default, list):
        items = value if isinstance(value, list) else [value]
        return [_typed(str, key, item, path) for item in items]
    if isinstance(action, argparse._StoreTrueAction):
        return _typed(bool, key, value, path)
    if value is None:
        return None
    if isinstance(value, list) and action.type is None:
        return ",".join(str(_typed(int, key, item, path)) for item in value)
    if action.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _typed(str if action.type is None else action.type, key, value, path)


def _typed(kind: Any, key: str, value: Any, path: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"config {path}: {key} must be {names[kind]}, got {value!r}")
    return value


def model_geometry(arguments: argparse.Namespace) -> Any:
    """Latent geometry of the model that --model names, from its headers; nothing is loaded."""
    from ltxkern.pipeline.files.geometry import geometry_of

    return geometry_of(arguments.model)


def checked_request(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any, Any]:
    """The pipeline's keyword arguments, the validated request and the model's geometry; nothing is loaded.

    Raises:
        ValueError, TypeError: the first option that cannot be served.
    """
    from ltxkern.pipeline.run.request import GenerationRequest, find_device, find_preset, require_strength

    resolve_defaults(arguments)
    preset = find_preset(arguments.pipeline)
    geometry = model_geometry(arguments)
    asked = request_arguments(arguments, geometry)
    request = GenerationRequest(preset=preset, **asked)
    request.validate(geometry)
    for value in strengths(arguments):
        require_strength("distilled LoRA", value)
    for text in arguments.lora:
        path, strength = split_suffix(text, "lora")
        require_strength(f"lora {path}", strength)
    check_files(arguments)
    find_dtype(arguments)
    find_device(arguments.device)
    if arguments.device_mode not in DEVICE_MODES:
        raise ValueError(f"device-mode must be one of {', '.join(DEVICE_MODES)}, got {arguments.device_mode!r}")
    with backend_choice(arguments):
        return asked, request, geometry


def make_plan(arguments: argparse.Namespace, request: Any) -> Any:
    """The memory plan of a request, for the device that would be used."""
    import torch

    from ltxkern.pipeline.planning.plan import plan

    free = {name: getattr(arguments, f"{name}_gib", None) for name in ("device_free", "host_free")}
    files = [split_suffix(text, "lora")[0] for text in arguments.lora]
    if arguments.distilled_lora is not None:
        files.append(arguments.distilled_lora)
    return plan(
        arguments.model,
        request,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=find_dtype(arguments),
        mode=arguments.device_mode,
        loras=files or None,
        upsampler=arguments.upsampler,
        text_encoder=arguments.text_encoder,
        **{name: int(value * 2**30) for name, value in free.items() if value is not None},
    )
