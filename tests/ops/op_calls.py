"""One small call of every op with all its tensors by name, for tests that go over all ops."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ltxkern
from ltxkern import res2s_steps
from tests.ops.contract import noise

STEP = res2s_steps([0.9, 0.7])[0]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OpCall:
    """A call of an op: all its tensors have one dtype, so that an output may be any of them that has its shape.

    Attributes:
        name: of the op, in `ltxkern`.
        tensors: makes the tensor arguments.
        others: the other arguments.
        may_be: for each output the arguments that it may be; empty for an op without outputs.
        like: for each output the argument whose shape and dtype it has.
    """

    name: str
    tensors: Callable[[], Tensors]
    others: dict[str, Any] = field(default_factory=dict)
    may_be: tuple[tuple[str, ...], ...] = ()
    like: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def op(self) -> Callable[..., Any]:
        """The public function."""
        function: Callable[..., Any] = getattr(ltxkern, self.name)
        return function

    def outputs(self, tensors: Tensors) -> list[Tensor]:
        """Outputs of their own memory, full of NaN."""
        return [torch.full_like(tensors[name], torch.nan) for name in self.like]

    def run(self, tensors: Tensors, outputs: list[Tensor] | None = None, **changed: Any) -> list[Tensor]:
        """The results; `changed` replaces arguments."""
        given = {**tensors, **self.others, **changed}
        if outputs is not None:
            given["out"] = outputs[0] if len(outputs) == 1 else tuple(outputs)
        result = self.op(**given)
        return [result] if isinstance(result, Tensor) else list(result)


def drawn(**shapes: tuple[int, ...]) -> Callable[[], Tensors]:
    """Maker of fp32 tensors of these shapes; masks are between 0 and 1."""

    def make() -> Tensors:
        tensors = {name: noise(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        return {name: value.sigmoid() if name == "mask" else value for name, value in tensors.items()}

    return make


def _group_norm() -> Tensors:
    return drawn(x=(2, 8, 3, 5), residual=(2, 8, 3, 5), weight=(8,), bias=(8,), conv_bias=(8,))()


def _group_norm_last() -> Tensors:
    tensors = _group_norm()
    return {
        name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in tensors.items()
    }


ROW, STATE = (2, 6, 8), (2, 6, 8)
LATENTS = dict.fromkeys(("latent", "x0", "noise", "clean"), STATE)
PREDICTIONS = dict.fromkeys(("anchor", "x0", "x0_mid", "noise", "clean"), STATE)
WITH_OUT = [
    OpCall("group_norm_silu", _group_norm, {"num_groups": 4}, (("x", "residual"),), ("x",)),
    OpCall("group_norm_silu", _group_norm_last, {"num_groups": 4}, (("x", "residual"),), ("x",)),
    OpCall("pixel_norm_silu", drawn(x=(2, 8, 15), weight=(8,)), {}, (("x",),), ("x",)),
    OpCall("rms_norm_modulate", drawn(x=ROW, scale=ROW, shift=(2, 1, 8), weight=(8,)), {}, (("x",),), ("x",)),
    OpCall(
        "gated_residual_rms_norm_modulate",
        drawn(x=ROW, y=ROW, gate=(2, 1, 8), scale=ROW, shift=ROW, weight=(8,)),
        {},
        (("x", "y"), ("x", "y")),
        ("x", "x"),
    ),
    OpCall("gated_residual", drawn(x=ROW, y=ROW, gate=ROW), {}, (("x", "y"),), ("x",)),
    OpCall("dual_add", drawn(x=ROW, first=ROW, second=ROW), {}, (("x",), ("x",)), ("x", "x")),
    OpCall("head_gate", drawn(x=(2, 3, 4, 5), logits=(2, 3, 4)), {}, (("x",),), ("x",)),
    OpCall(
        "qk_norm_rope",
        drawn(q=ROW, k=ROW, q_weight=(8,), k_weight=(8,), cos=(2, 2, 6, 2), sin=(2, 2, 6, 2)),
        {},
        (("q",), ("k",)),
        ("q", "k"),
    ),
    OpCall("normalize_noise", drawn(noise=(3, 40, 8)), {}, (("noise",),), ("noise",)),
    OpCall("channelwise_normalize", drawn(x=(3, 40, 8)), {}, (("x",),), ("x",)),
    OpCall(
        "combine_guidance",
        drawn(cond=STATE, uncond=STATE, perturbed=STATE, isolated=STATE),
        {"cfg_scale": 3.0, "stg_scale": 1.0, "modality_scale": 2.0, "rescale_scale": 0.5},
        (("cond", "uncond", "perturbed", "isolated"),),
        ("cond",),
    ),
    OpCall(
        "res2s_sde_step",
        drawn(sample=STATE, denoised=STATE, noise=STATE),
        {"sigma": 0.9, "sigma_next": 0.7},
        (("sample", "denoised", "noise"),),
        ("sample",),
    ),
    OpCall(
        "res2s_midpoint",
        drawn(**LATENTS, mask=(2, 6, 1)),
        {"step": STEP, "compute_dtype": torch.float32},
        (tuple(LATENTS), tuple(LATENTS)),
        ("latent", "latent"),
    ),
    OpCall("res2s_advance", drawn(**PREDICTIONS, mask=(2, 6, 1)), {"step": STEP}, (tuple(PREDICTIONS),), ("anchor",)),
]
STATISTICS = OpCall("noise_statistics", drawn(noise=(3, 40, 8)))
MERGE = OpCall("merge_lora_", drawn(weight=(6, 8), lora_a=(2, 8), lora_b=(6, 2)))
ALL = [*WITH_OUT, STATISTICS, MERGE]
