"""Module names of version 0.1.0: imported under them, a module is found where it stands today, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Room to its modules: one word where the name stayed, "old>new" where it did not.
_ROOMS = {
    "": "hq>generator output>result",
    "planning": "planner>plan activation_sizes>activations model_sizes>weights memory_trace>meta_trace",
    "run": "request stage denoising_run>denoising prompt_encoder>prompts",
    "sampling": "res2s euler schedule guidance latents stage_check>finite",
    "model": "transformer attention components text decode tiling conditioning transformer_block>block "
    "transformer_inputs>inputs",
    "memory": "host_copy host_memory devices>manager device_modes>modes mode_choice>modes phase_stores>stores "
    "snapshot_store>snapshot offload_store>offload phase_merge>merge correction>inplace factor_cache>factors "
    "weight_table>table home>origin component_device>lending forward_hooks>hooks stream_clock>streams",
    "files": "checkpoint hub official_names official_config lora lora_file demo weights_file>headers model_geometry>found",
    "results": "media output_file>atomic embedding_cache",
    "parallel": "ranks collectives cfg_parallel>by_branch sequence_parallel>by_token",
}
_PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    f"{_PACKAGE}.{old}": ".".join(part for part in (_PACKAGE, room, new or old) if part)
    for room, modules in _ROOMS.items()
    for old, _, new in (module.partition(">") for module in modules.split())
}
# By name alone: nothing here imports a command.
MOVED |= {
    f"{_PACKAGE}.{old}": f"ltxkern.commands.batching.{new}" for old, new in (("batch", "items"), ("batch_ray", "ray"))
}


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
