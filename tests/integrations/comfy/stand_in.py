"""The part of ComfyUI that a node pack meets, by the names, signatures and order of calls of its published interface."""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.integrations.comfy import models

Backup = namedtuple("Backup", ("weight", "inplace_update"))


class PatcherInjection:
    def __init__(self, inject: Callable[..., None], eject: Callable[..., None]) -> None:
        self.inject, self.eject = inject, eject


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"


class WrapperExecutor:
    """Wrappers about a method, the first one outside; each is called with the executor of the rest."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.execute(*args, **keywords)

    def execute(self, *args: Any, **keywords: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **keywords)
        rest = WrapperExecutor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](rest, *args, **keywords)


class ModelPatcher:
    """A handle of a model that it shares with its clones; weights and modules are changed while it is loaded."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, Any] = {}
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.attachments: dict[str, Any] = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.injections: dict[str, list[Any]] = {}
        self.is_injected = self.skip_injection = False
        self.patches_uuid = uuid.uuid4()
        if not hasattr(model, "current_weight_patches_uuid"):
            model.current_weight_patches_uuid = None

    def clone(self) -> ModelPatcher:
        new = type(self)(self.model, self.load_device, self.offload_device)
        new.patches = {key: entries[:] for key, entries in self.patches.items()}
        new.patches_uuid, new.object_patches = self.patches_uuid, self.object_patches.copy()
        new.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        new.backup, new.object_patches_backup = self.backup, self.object_patches_backup
        new.attachments = dict(self.attachments)
        new.wrappers = {kind: {key: held[:] for key, held in keys.items()} for kind, keys in self.wrappers.items()}
        new.injections = {key: held[:] for key, held in self.injections.items()}
        new.is_injected = self.is_injected
        return new

    def is_clone(self, other: ModelPatcher) -> bool:
        return self.model is other.model

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key, None)

    def set_injections(self, key: str, injections: list[Any]) -> None:
        self.injections[key] = injections

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    @contextmanager
    def use_ejected(self, inject_on_exit_only: bool = False) -> Iterator[None]:
        was, skipped = self.is_injected, self.skip_injection
        self.skip_injection = self.skip_injection or inject_on_exit_only
        self.eject_model()
        yield
        self.skip_injection = skipped
        if was or inject_on_exit_only:
            self.inject_model()

    def inject_model(self) -> None:
        if self.is_injected or self.skip_injection:
            return
        for injections in self.injections.values():
            for injection in injections:
                injection.inject(self)
                self.is_injected = True

    def eject_model(self) -> None:
        if self.is_injected:
            for injections in self.injections.values():
                for injection in injections:
                    injection.eject(self)
        self.is_injected = False

    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        with self.use_ejected():
            taken, held = [], self.model.state_dict()
            for key, patch in patches.items():
                name, offset, function = (*((key,) if isinstance(key, str) else key), None, None)[:3]
                if name in held:
                    taken.append(key)
                    self.patches.setdefault(name, []).append((strength_patch, patch, strength_model, offset, function))
            self.patches_uuid = uuid.uuid4()
            return taken

    def patch_weight_to_device(self, key: str) -> None:
        module, _, name = key.rpartition(".")
        owner = self.model.get_submodule(module)
        weight = getattr(owner, name)
        self.backup.setdefault(key, Backup(weight.to(self.offload_device, copy=False), False))
        out = calculate_weight(self.patches[key], weight.to(torch.float32, copy=True), key).to(weight.dtype)
        setattr(owner, name, torch.nn.Parameter(out, requires_grad=False))

    def patch_model(self) -> Any:
        with self.use_ejected():
            for name, new in self.object_patches.items():
                owner, _, last = name.rpartition(".")
                self.object_patches_backup.setdefault(name, self.model.get_submodule(name))
                setattr(self.model.get_submodule(owner), last, new)
        self.inject_model()
        return self.model

    def unpatch_model(self, unpatch_weights: bool = True) -> None:
        self.eject_model()
        if unpatch_weights:
            for key, kept in self.backup.items():
                owner, _, name = key.rpartition(".")
                setattr(self.model.get_submodule(owner), name, kept.weight)
            self.backup.clear()
            self.model.current_weight_patches_uuid = None
        for name, old in self.object_patches_backup.items():
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, old)
        self.object_patches_backup.clear()

    def partially_load(self) -> None:
        with self.use_ejected(inject_on_exit_only=True):
            there = self.model.current_weight_patches_uuid
            self.unpatch_model(unpatch_weights=there is not None and there != self.patches_uuid)
            self.patch_model()
            if self.model.current_weight_patches_uuid is None:
                for key in self.patches:
                    self.patch_weight_to_device(key)
                self.model.current_weight_patches_uuid = self.patches_uuid

    def detach(self, unpatch_all: bool = True) -> None:
        self.eject_model()
        if unpatch_all:
            self.unpatch_model()

    def __del__(self) -> None:
        self.detach(unpatch_all=False)


def calculate_weight(patches: list[Any], weight: Tensor, key: str) -> Tensor:
    for strength, patch, strength_model, offset, function in patches:
        part = weight if offset is None else weight.narrow(*offset)
        given = (lambda value: value) if function is None else function
        out = patch.calculate_weight(part, key, strength, strength_model, offset, given, torch.float32, None)
        weight = out if offset is None else weight
    return weight


loaded_models: list[ModelPatcher] = []


def load_models_gpu(patchers: list[ModelPatcher]) -> None:
    """Of clones one is loaded at a time: each, itself too, is detached first, its weights left to the one that follows."""
    for patcher in patchers:
        for other in [other for other in loaded_models if patcher.is_clone(other)]:
            loaded_models.remove(other)
            other.detach(unpatch_all=False)
        loaded_models.append(patcher)
        patcher.partially_load()


class KSAMPLER:
    def __init__(self, sampler_function: Callable[..., Tensor], extra_options: dict[str, Any] = {}) -> None:  # noqa: B006
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        disable_pbar: bool,
    ) -> Tensor:
        extra_args["denoise_mask"] = None

        def model_k(x: Tensor, sigma: Tensor, denoise_mask: Any, model_options: Any, seed: int | None = None) -> Tensor:
            out: Tensor = model_wrap(x, sigma, model_options=model_options, seed=seed)
            return out

        def k_callback(x: dict[str, Any]) -> None:
            callback(x["i"], x["denoised"], x["x"], len(sigmas) - 1)

        return self.sampler_function(
            *(model_k, noise * sigmas[0], sigmas),
            extra_args=extra_args,
            callback=None if callback is None else k_callback,
            disable=disable_pbar,
            **self.extra_options,
        )


class CFGGuider:
    def __init__(self, model_patcher: ModelPatcher) -> None:
        self.model_patcher = model_patcher

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any, seed: int | None) -> Tensor:
        denoised: Tensor = self.model_patcher.model(x, sigma)
        return denoised

    def outer_sample(
        self, noise: Tensor, sampler: KSAMPLER, sigmas: Tensor, callback: Any, disable_pbar: bool, seed: int
    ) -> Tensor:
        load_models_gpu([self.model_patcher])
        extra_args = {"model_options": self.model_patcher.model_options, "seed": seed}
        return sampler.sample(self, sigmas, extra_args, callback, noise, disable_pbar)

    def sample(self, noise: Tensor, sampler: KSAMPLER, sigmas: Tensor, callback: Any = None, seed: int = 0) -> Tensor:
        wrappers = [one for held in self.model_patcher.wrappers.get("outer_sample", {}).values() for one in held]
        out: Tensor = WrapperExecutor(self.outer_sample, self, wrappers).execute(
            noise, sampler, sigmas, callback, True, seed
        )
        return out


class VAE:
    def __init__(self, first_stage_model: Any) -> None:
        self.first_stage_model = first_stage_model
        self.patcher = ModelPatcher(first_stage_model, torch.device("cpu"), torch.device("cpu"))

    def decode(self, samples: Tensor) -> Tensor:
        load_models_gpu([self.patcher])
        out: Tensor = self.first_stage_model.decode(samples)
        return out


class WeightAdapterBase:
    name: ClassVar[str] = ""

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights


class LoRAAdapter(WeightAdapterBase):
    name = "lora"

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        up, down, alpha, mid, dora, reshape = self.weights
        assert mid is reshape is None
        share = 1.0 if alpha is None else alpha / down.shape[0]
        delta = (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
        weight += function(strength * share * delta) * (1.0 if dora is None else dora)
        return weight


def load_lora(file: dict[str, Tensor], to_load: dict[str, Any], log_missing: bool = True) -> dict[Any, Any]:
    patches: dict[Any, Any] = {}
    for name, key in to_load.items():
        if f"{name}.lora_up.weight" in file:
            alpha = file[f"{name}.alpha"].item() if f"{name}.alpha" in file else None
            dora = file.get(f"{name}.dora_scale")
            factors = file[f"{name}.lora_up.weight"], file[f"{name}.lora_down.weight"]
            patches[key] = LoRAAdapter({name}, (*factors, alpha, None, dora, None))
    return patches


def model_lora_keys_unet(model: Any, key_map: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
    keys = {key.removesuffix(".weight"): key for key in model.state_dict() if key.endswith(".weight")}
    return {**key_map, **keys}


def load_custom_node(module_path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A file, or a folder with __init__.py, under a name made of its path; its classes under their names."""
    if os.path.isfile(module_path):
        name, path = os.path.splitext(module_path)[0], module_path
    else:
        name, path = module_path.replace(".", "_x_"), os.path.join(module_path, "__init__.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS, module.NODE_DISPLAY_NAME_MAPPINGS


def modules(loras: Path) -> dict[str, ModuleType]:
    """All that the pack imports, and what the models say they come from."""
    held: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.ops": {name: getattr(models, name) for name in ("cast_bias_weight", "uncast_bias_weight")},
        "comfy.patcher_extension": {"PatcherInjection": PatcherInjection, "WrappersMP": WrappersMP},
        "comfy.samplers": {"KSAMPLER": KSAMPLER, "CFGGuider": CFGGuider},
        "comfy.weight_adapter": {"LoRAAdapter": LoRAAdapter, "WeightAdapterBase": WeightAdapterBase},
        "comfy.lora": {"load_lora": load_lora, "model_lora_keys_unet": model_lora_keys_unet},
        "comfy.lora_convert": {"convert_lora": lambda file: file},
        "comfy.utils": {"load_torch_file": lambda path, safe_load=False: torch.load(path, weights_only=safe_load)},
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(path.name for path in loras.glob("*.pt")),
            "get_full_path_or_raise": lambda kind, name: str(loras / name),
        },
    }
    found = {}
    for name, content in held.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(content)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(found[parent], last, found[name])
    return found
