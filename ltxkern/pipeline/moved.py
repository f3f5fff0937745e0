"""Module names of version 0.1.0: imported under them, a module is found where it stands today, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOMS = {
    "": {"hq": "generator", "output": "result"},
    "planning": {
        "planner": "plan",
        "activation_sizes": "activations",
        "model_sizes": "weights",
        "memory_trace": "meta_trace",
    },
    "run": {"request": "request", "stage": "stage", "denoising_run": "denoising", "prompt_encoder": "prompts"},
    "sampling": {
        **{stem: stem for stem in ("res2s", "euler", "schedule", "guidance", "latents")},
        "stage_check": "finite",
    },
    "model": {
        **{
            stem: stem
            for stem in ("transformer", "attention", "components", "text", "decode", "tiling", "conditioning")
        },
        "transformer_block": "block",
        "transformer_inputs": "inputs",
    },
    "memory": {
        **{stem: stem for stem in ("host_copy", "host_memory")},
        **{"devices": "manager", "device_modes": "modes", "mode_choice": "modes", "phase_stores": "stores"},
        **{"snapshot_store": "snapshot", "offload_store": "offload", "phase_merge": "merge"},
        **{"correction": "exact_subtraction", "factor_cache": "factors", "weight_table": "table", "home": "origin"},
        **{"component_device": "lending", "forward_hooks": "hooks", "stream_clock": "streams"},
    },
    "files": {
        **{
            stem: stem
            for stem in ("checkpoint", "hub", "official_names", "official_config", "lora", "lora_file", "demo")
        },
        "weights_file": "headers",
        "model_geometry": "geometry",
    },
    "results": {"media": "media", "output_file": "atomic", "embedding_cache": "embedding_cache"},
    "parallel": {
        **{stem: stem for stem in ("ranks", "collectives")},
        "cfg_parallel": "by_branch",
        "sequence_parallel": "by_token",
    },
}
_PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    f"{_PACKAGE}.{old}": ".".join(part for part in (_PACKAGE, room, new) if part)
    for room, stems in _ROOMS.items()
    for old, new in stems.items()
}
# By name alone: nothing here imports a command.
MOVED |= {f"{_PACKAGE}.batch{end}": f"ltxkern.commands.batch{end or '_items'}" for end in ("", "_ray")}


class _Forwarding(MetaPathFinder, Loader):
    """Answers for the old names only; what it loads is the module of the new name itself, not a copy."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(
            f"{old} is {MOVED[old]} now; the old name goes in the next version", DeprecationWarning, stacklevel=2
        )
        # The import system hands out what stands here once the loader is done.
        sys.modules[old] = importlib.import_module(MOVED[old])


def install() -> None:
    """Once per process, behind every other finder."""
    if not any(isinstance(finder, _Forwarding) for finder in sys.meta_path):
        sys.meta_path.append(_Forwarding())
