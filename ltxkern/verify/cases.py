"""The one table of the ops: how each is called, with all its tensors by name, for `ltxkern verify` and for the tests of all ops.

A new op gets an entry here and a tests/ops/test_<op>.py. They put it through the proof on a card and at first use, the tests of
aliasing, arguments, instruction sets, large offsets and GPUs, and its CUDA kernels through the shim and the sanitizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ltxkern
from ltxkern import res2s_steps
from ltxkern.ops.checks import ACTIVATION_DTYPES, SAMPLER_DTYPES
from ltxkern.verify.values import channels_last, noise

F16, BF16, F32, F64, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn
STEP = res2s_steps([0.9, 0.7])[0]
# Arguments whose dtype no activation changes.
ALWAYS = {"mask": F32, "noise_stats": F64, "rows": torch.int64, "k_rows": torch.int32}
Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Size(NamedTuple):
    """Batch, tokens and width that the shapes of a case are made of."""

    batch: int = 2
    tokens: int = 6
    width: int = 8

    def __str__(self) -> str:
        return "x".join(map(str, self))


SMALL = Size()


@dataclass(frozen=True)
class OpCase:
    """A call of an op.

    Attributes:
        op: name in `ltxkern`.
        arguments: shapes of the tensor arguments: "x y: B T W; weight: W" with the letters of a `Size`: 2W is twice the width, N
            one element less than B T W.
        out: for each output the arguments that it may be, "x y; x"; it has shape and dtype of the first.
        others: the other arguments.
        dtypes: of the activations.
        fixed: dtypes of tensors that do not follow the activations.
        optional: tensor arguments that may each be left out.
        last: tensors of four dims have their channels innermost in memory.
        by_row: a row of a result depends on the same row of the arguments alone, and one launch writes all of them.
        beside: sines lie behind their cosines, of k too.
        variant: what sets it apart from the op's main case, which has none.
    """

    op: str
    arguments: str
    out: str = ""
    others: dict[str, Any] = field(default_factory=dict)
    dtypes: Sequence[torch.dtype] = ACTIVATION_DTYPES
    fixed: dict[str, torch.dtype] = field(default_factory=dict)
    optional: str = ""
    last: bool = False
    by_row: bool = False
    beside: bool = False
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.variant}" if self.variant else self.op

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        function: Callable[..., Any] = getattr(ltxkern, self.op)
        return function

    @property
    def in_place(self) -> bool:
        return self.op.endswith("_")

    @property
    def may_be(self) -> list[list[str]]:
        """For each output the arguments that it may be."""
        return [names.split() for names in self.out.split(";") if names]

    @property
    def like(self) -> list[str]:
        """For each output the argument whose shape and dtype it has; none where the table names no output."""
        return [names[0] for names in self.may_be]

    def shapes(self, size: Size = SMALL) -> Shapes:
        """Of the tensor arguments."""
        letters = dict(zip("BTW", size, strict=True)) | {"N": torch.Size(size).numel() - 1, "": 1}
        made: Shapes = {}
        for group in self.arguments.split(";"):
            names, extents = group.split(":")
            parts = re.findall(r"(\d*)([BTWN]?)(?: |$)", extents.strip() + " ")
            shape = tuple(int(factor or 1) * letters[letter] for factor, letter in parts if factor or letter)
            made |= dict.fromkeys(names.split(), shape)
        return made

    def drawn(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Values of an argument: a mask lies between 0 and 1, a row index in three rows, statistics differ by slice."""
        if name.endswith("rows"):
            value = torch.arange(torch.Size(shape).numel()).mul(7).remainder(3).view(shape)
        elif name == "noise_stats":
            slices = torch.arange(1.0, shape[0] + 1, dtype=F64)
            value = torch.stack([slices * 0 + 100, slices / 4, 99 * slices.square()], dim=1)
        else:
            value = noise(*shape, seed=seed)
        value = (value.sigmoid() if name == "mask" else value).to(self.fixed.get(name, ALWAYS.get(name, dtype)))
        return channels_last(value) if self.last and value.dim() == 4 else value

    def tensors(self, dtype: torch.dtype = F32, size: Size = SMALL) -> Tensors:
        """The tensor arguments; in fp32 those of a main case have one dtype, so that an output may be any of its shape."""
        made = {
            name: self.drawn(name, shape, dtype, seed) for seed, (name, shape) in enumerate(self.shapes(size).items())
        }
        for names in (("cos", "sin"), ("k_cos", "k_sin")) if self.beside else ():
            made |= zip(names, torch.stack([made[name] for name in names], dim=-1).unbind(-1), strict=True)
        return made

    def outputs(self, tensors: Tensors) -> list[Tensor]:
        """Outputs of their own memory, full of NaN."""
        return [torch.full_like(tensors[name], torch.nan) for name in self.like]

    def run(self, tensors: Tensors, outputs: Sequence[Tensor] = (), **changed: Any) -> list[Tensor]:
        """The results; `changed` replaces arguments."""
        given = {**tensors, **self.others, **changed}
        if outputs:
            given["out"] = outputs[0] if len(outputs) == 1 else tuple(outputs)
        result = self.function(**given)
        return [result] if isinstance(result, Tensor) else list(result)


def family(main: OpCase, **variants: dict[str, Any]) -> list[OpCase]:
    """The main case of an op, and what its variants change of it."""
    return [main, *(replace(main, variant=name, **changed) for name, changed in variants.items())]


def rotated() -> dict[str, dict[str, Any]]:
    """Heads, layouts and dtypes of the tables that the main case of qk_norm_rope does not have."""
    arguments = "q k: B T {0}W; q_weight k_weight: {0}W; cos sin: B {1} T W"
    return {
        f"{heads}_heads_{layout}{'_wide_tables' * wide}": {
            **{"arguments": arguments.format(2 * heads, heads), "others": {"layout": layout}, "by_row": heads == 1},
            "fixed": {"cos": F32, "sin": F32} if wide else {},
        }
        for heads in (1, 3)
        for layout in ("split", "interleaved")
        for wide in (False, True)
    }


def rotated_by_row() -> dict[str, dict[str, Any]]:
    """Tables of qk_norm_rope with a row per coordinate: of three axes, of one, and such that only the general kernels take."""
    own, wide = "k_cos k_sin: 3 2W; k_rows: 1 3 2T", dict.fromkeys(("cos", "sin", "k_cos", "k_sin"), F32)
    longer = f"q: B T 12W; k: B 2T 12W; q_weight k_weight: 12W; cos sin: 3 2W; rows: B 3 T; {own}"
    pairs, fixed = "q k: B T {0}W; q_weight k_weight: {0}W; cos sin: 3 {1}W; rows: {2} T", {"rows": torch.int32}
    rows = {"arguments": longer, "others": {"heads": 6}, "fixed": {**fixed, **wide}}
    return {
        "rows": rows,
        "rows_side_by_side": {**rows, "beside": True},
        "rows_one_axis": {"arguments": pairs.format(4, 2, "B 1"), "others": {"heads": 2}, "fixed": {**fixed, **wide}},
        "rows_3_heads": {"arguments": pairs.format(6, "", "1 3"), "others": {"heads": 3}, "fixed": fixed},
        "rows_2_heads_interleaved": {
            **{"arguments": pairs.format(4, "", "B 2"), "others": {"heads": 2, "layout": "interleaved"}, "fixed": fixed}
        },
    }


SCALES = {"cfg_scale": 3.0, "stg_scale": 1.0, "modality_scale": 2.0, "rescale_scale": 0.5}
IN_FP32, IN_FP64 = ({"step": STEP, "compute_dtype": dtype} for dtype in (F32, F64))
STATES = "latent x0 noise clean: B T W; mask: B T 1"
PREDICTIONS = "anchor x0 x0_mid noise clean: B T W; mask: B T 1"
RAW = {"noise": F64}
LAST: dict[str, Any] = {"last": True}
BY_ROW: dict[str, Any] = {"by_row": True}
NORM: dict[str, Any] = {"optional": "weight", "by_row": True}

CASES = [
    *family(
        OpCase(
            *("group_norm_silu", "x residual: B 8 T W; weight bias conv_bias: 8", "x residual", {"num_groups": 2}),
            optional="residual conv_bias",
        ),
        channels_last={"arguments": "x residual: B 2W T 5; weight bias conv_bias: 2W", **LAST},
    ),
    *family(
        OpCase("pixel_norm_silu", "x: B 8 T W; weight: 8", "x", optional="weight"),
        channels_last={"arguments": "x: B W T 5; weight: W", **LAST},
    ),
    *family(
        OpCase("rms_norm_modulate", "x scale: B T W; shift: B 1 W; weight: W", "x", **NORM),
        vectors={"arguments": "x: B T W; scale: B 1 W; shift: W", "fixed": {"scale": F32}},
        wide={"optional": "", "arguments": "x scale: B T W; shift: B 1 W", "fixed": {"scale": F32, "shift": F32}},
        rows={"arguments": "x: B T W; scale shift: 3 W; rows: B T"},
    ),
    *family(
        OpCase("gated_residual_rms_norm_modulate", "x y gate scale shift: B T W; weight: W", "x y; x y", **NORM),
        vectors={"arguments": "x y: B T W; gate scale: B 1 W; shift: W", "fixed": {"scale": F32}},
        wide={
            **{"optional": "", "arguments": "x y gate scale: B T W; shift: B 1 W"},
            "fixed": {"gate": F32, "scale": F32, "shift": F32},
        },
        rows={"arguments": "x y: B T W; gate scale shift: 3 W; rows: B T"},
    ),
    *family(
        OpCase(
            *("gated_residual_rms_norm_modulate_twice", "x y gate scale shift scale2 shift2: B T W; weight: W"),
            *("x y; x y; x y",),
            **NORM,
        ),
        vectors={
            "arguments": "x y: B T W; gate scale scale2 shift2: B 1 W; shift: W",
            "fixed": {"scale": F32, "scale2": F32},
        },
        rows={"arguments": "x y: B T W; gate scale shift scale2 shift2: 3 W; rows: B T"},
    ),
    *family(
        OpCase("gated_residual", "x y gate: B T W", "x y", **BY_ROW),
        row={"arguments": "x y: B T W; gate: B 1 W"},
        vector={"arguments": "x y: B T W; gate: W"},
        column={"arguments": "x y: B T W; gate: B T 1"},
        wide={"fixed": {"gate": F32}},
        rows={"arguments": "x y: B T W; gate: 3 W; rows: B T"},
    ),
    *family(
        OpCase("dual_add", "x first second: B T W", "x; x", dtypes=SAMPLER_DTYPES, **BY_ROW),
        # An odd number of elements, of several blocks of registers.
        flat={"arguments": "x first second: N"},
    ),
    *family(OpCase("head_gate", "x: B T 4 W; logits: B T 4", "x", **BY_ROW), wide={"fixed": {"logits": F32}}),
    *family(
        OpCase("qk_norm_rope", "q k: B T 4W; q_weight k_weight: 4W; cos sin: B 2 T W", "q; k"),
        wide={"fixed": {"cos": F32, "sin": F32}},
        own={"arguments": "q: B T 4W; k: B 2T 4W; q_weight k_weight: 4W; cos sin: B 2 T W; k_cos k_sin: 1 2 2T W"},
        **rotated(),
        **rotated_by_row(),
    ),
    OpCase("normalize_noise", "noise: B 8T W", "noise", dtypes=SAMPLER_DTYPES),
    OpCase("channelwise_normalize", "x: B 8T W", "x", dtypes=SAMPLER_DTYPES),
    OpCase("channelwise_normalize", "x: B 3 22", "x", dtypes=SAMPLER_DTYPES, variant="pairs"),
    OpCase("noise_statistics", "noise: B 8T W", dtypes=SAMPLER_DTYPES),
    *family(
        OpCase(
            *("combine_guidance", "cond uncond perturbed isolated: B T W", "cond uncond perturbed isolated", SCALES),
            dtypes=SAMPLER_DTYPES,
        ),
        three={"arguments": "cond uncond perturbed: B T W", "others": {**SCALES, "modality_scale": 1.0}},
        no_rescale={"others": {**SCALES, "rescale_scale": 0.0}},
    ),
    *family(
        OpCase(
            *("res2s_sde_step", "sample denoised noise: B T W", "sample denoised noise"),
            others={"sigma": 0.9, "sigma_next": 0.7},
            dtypes=SAMPLER_DTYPES,
            by_row=True,
        ),
        raw_noise={"arguments": "sample denoised noise: B T W; noise_stats: B 3", "fixed": RAW},
    ),
    *family(
        OpCase("res2s_midpoint", STATES, "latent x0 noise clean; latent x0 noise clean", IN_FP32, **BY_ROW),
        unmasked={"arguments": "latent x0 noise: B T W"},
        unmasked_fp64={"arguments": "latent x0 noise: B T W", "others": IN_FP64, "fixed": RAW},
        raw_noise={"arguments": f"{STATES}; noise_stats: B 3", "fixed": RAW},
        raw_noise_fp64={"arguments": f"{STATES}; noise_stats: B 3", "others": IN_FP64, "fixed": RAW},
    ),
    *family(
        OpCase(
            *("res2s_advance", PREDICTIONS, "anchor x0 x0_mid noise clean"),
            others={"step": STEP},
            fixed={"anchor": F32},
            by_row=True,
        ),
        raw_noise={"arguments": f"{PREDICTIONS}; noise_stats: B 3", "fixed": {**RAW, "anchor": F32}},
        raw_noise_fp64={"arguments": f"{PREDICTIONS}; noise_stats: B 3", "fixed": {**RAW, "anchor": F64}},
    ),
    *family(
        OpCase("merge_lora_", "weight: T W; lora_a: 2 W; lora_b: T 2"),
        reference={"others": {"rounding": "reference"}},
        large_rank={"arguments": "weight: T W; lora_a: 40 W; lora_b: T 40"},
        # A weight that no addmm takes: on tensor cores.
        half_factors={
            **{"arguments": "weight: T W; lora_a: 40 W; lora_b: T 40", "dtypes": (F16, BF16), "fixed": {"weight": F32}}
        },
        **{
            f"float8_{rounding}": {
                **{"arguments": "weight: T W; lora_a: 40 W; lora_b: T 40", "dtypes": (F16, BF16)},
                **{"fixed": {"weight": E4M3}, "others": {"rounding": rounding, "seed": 7}},
            }
            for rounding in ("single", "stochastic")
        },
    ),
]
MAIN = [case for case in CASES if not case.variant]
WITH_OUT = [case for case in CASES if case.out and case.variant in ("", "channels_last")]
BY_NAME = {str(case): case for case in CASES}
