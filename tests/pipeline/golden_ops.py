"""Golden checks of single ops, on every backend of this process; collected through test_golden.py."""

import re

import torch
from torch import Tensor

import ltxkern
from tests.golden import matching
from tests.golden import open_golden as golden
from tests.pipeline.golden_sampler import DTYPES, close
from tests.serving import over_backends, serving

COVERS = (
    "sde/step/",
    "noise/new_noise/",
    "noise/channelwise/",
    "guider/v/",
    "guider/a/",
    "guider/b2/",
    "lora/",
    "gnsilu/",
)
SDE_TOLERANCE = {"f64": 1e-12, "f64_sig32": 6e-5, "f32": 2e-4}
CHANNELWISE_TOLERANCE = {"f64": 1e-13, "f32": 1e-6, "bf16": 6e-2}
# In bf16 two units in the last place: the op rounds once, as the official guider does.
GUIDANCE_TOLERANCE = {"f32": (1e-5, 1e-5), "bf16": (1e-3, 2.0**-7)}
GROUP_NORM_TOLERANCE = {torch.float32: 5e-6, torch.float16: 8e-3, torch.bfloat16: 4e-2}
SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def stored(key: str) -> Tensor:
    """The stored tensor on the device of the backend under test."""
    return golden()[key].to(torch.get_default_device())


@over_backends("res2s_sde_step")
def test_sde_step(backend: str) -> None:
    for match in matching(r"sde/step/(\w+)/(f64|f64_sig32|f32)/out/s([\d.]+)_to_([\d.]+)/eta([\d.]+)"):
        sample, denoised, noise = (
            stored(f"sde/step/{match[1]}/{match[2]}/{name}") for name in ("sample", "denoised", "noise")
        )
        sigmas = torch.tensor([float(match[3]), float(match[4])], dtype=torch.float64)
        if match[2] != "f64":
            sigmas = sigmas.float()
        with serving(backend):
            out = ltxkern.res2s_sde_step(sample, denoised, *sigmas.tolist(), noise, eta=float(match[5]))
        close(match[0], out, stored(match[0]), SDE_TOLERANCE[match[2]])


@over_backends("normalize_noise")
def test_new_noise(backend: str) -> None:
    for match in matching(r"noise/new_noise/(\w+)/seed(-?\d+)/raw"):
        with serving(backend):
            out = ltxkern.normalize_noise(stored(match[0]))
        key = match[0].replace("/raw", "/out")
        close(key, out, stored(key), 1e-13)


@over_backends("channelwise_normalize")
def test_channelwise(backend: str) -> None:
    for match in matching(r"noise/channelwise/(\w+)/(f32|f64|bf16)/in"):
        with serving(backend):
            out = ltxkern.channelwise_normalize(stored(match[0]))
        key = match[0].replace("/in", "/out")
        close(key, out, stored(key), CHANNELWISE_TOLERANCE[match[2]], relative=0.0)


@over_backends("noise_statistics")
def test_statistics_of_new_noise(backend: str) -> None:
    """Raw noise with its statistics is what the sampler ops take: the two together are the normalised noise."""
    for match in matching(r"noise/new_noise/(\w+)/seed(-?\d+)/raw"):
        raw = stored(match[0])
        with serving(backend):
            count, mean, deviation = ltxkern.noise_statistics(raw).unbind(1)
        shape = (*raw.shape[:-2], 1, 1)
        out = (raw - mean.reshape(shape)) / (deviation / (count - 1)).sqrt().reshape(shape)
        key = match[0].replace("/raw", "/out")
        close(key, out, stored(key), 1e-13)


@over_backends("combine_guidance")
def test_guidance(backend: str) -> None:
    for match in matching(r"guider/(v|a|b2)/(f32|bf16)/out/(\w+)"):
        cond, uncond, perturbed, isolated = (
            stored(f"guider/{match[1]}/{match[2]}/{name}") for name in ("cond", "uncond", "perturbed", "modality")
        )
        scales = golden().metadata["meta"][match[0]]
        with serving(backend):
            out = ltxkern.combine_guidance(cond, uncond, perturbed, isolated, **scales)
        tolerance, relative = GUIDANCE_TOLERANCE[match[2]]
        close(match[0], out, stored(match[0]), tolerance, relative=relative)


def loras(key: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Factors and strengths of a key that ends in one/s0.25 or two/s0.8_s0.25."""
    scales = [float(part[1:]) for part in key.rsplit("/", 1)[1].split("_")]
    pairs = [[stored(f"lora/lora{k + 1}_{side}").to(dtype) for k in range(len(scales))] for side in "AB"]
    return pairs[0], pairs[1], scales


@over_backends("merge_lora_")
def test_lora_official(backend: str) -> None:
    """rounding="reference" is the official fuse: bit-equal in bf16."""
    for match in matching(r"lora/fused/(bf16|f32)/(one|two)/.+"):
        dtype = DTYPES[match[1]]
        with serving(backend):
            out = ltxkern.merge_lora_(
                stored("lora/weight").to(dtype, copy=True), *loras(match[0], dtype), rounding="reference"
            )
        tolerance = 1e-6 if dtype == torch.float32 else 0.0
        # A vendor GEMM may sum in another order, which moves a bf16 delta by one ulp at a tie.
        allowance = 0.0 if out.device.type == "cpu" else 2.0**-8
        close(match[0], out, stored(match[0]), tolerance, relative=max(tolerance, allowance))


@over_backends("merge_lora_")
def test_lora_exact(backend: str) -> None:
    """rounding="single" is the correctly rounded sum, up to fp32 accumulation."""
    for match in matching(r"lora/(exact_f64|exact_f64_from_bf16)/one/.+"):
        dtype = torch.float32 if match[1] == "exact_f64" else torch.bfloat16
        with serving(backend):
            out = ltxkern.merge_lora_(stored("lora/weight").to(dtype, copy=True), *loras(match[0], dtype))
        close(match[0], out.double(), stored(match[0]), 1e-6 if dtype == torch.float32 else 4e-3)


@over_backends("group_norm_silu")
def test_group_norm_silu(backend: str) -> None:
    for match in matching(r"gnsilu/(\w+)/x"):
        group = {name: stored(f"gnsilu/{match[1]}/{name}") for name in golden().group(f"gnsilu/{match[1]}/")}
        meta = golden().metadata["meta"][match[0]]
        for dtype, tolerance in GROUP_NORM_TOLERANCE.items():
            x, weight, bias, residual = (group[name].to(dtype) for name in ("x", "weight", "bias", "residual"))
            for name, affine, added in (
                ("out_f64", (weight, bias), None),
                ("out_residual_f64", (weight, bias), residual),
                ("out_noaffine_f64", (None, None), None),
            ):
                with serving(backend):
                    out = ltxkern.group_norm_silu(x, *affine, meta["groups"], meta["eps"], residual=added)
                assert out.dtype == dtype
                close(f"{match[1]}/{name} {dtype}", out.double(), group[name], tolerance)
                rounded = group.get(name.replace("f64", f"torch_{SHORT[dtype]}"))
                if rounded is not None:
                    close(f"{match[1]}/{name} {dtype} of torch", out, rounded, tolerance)


def test_every_group_norm_input_is_known() -> None:
    known = r"gnsilu/\w+/(x|weight|bias|residual|out(_residual|_noaffine)?_f64|out(_residual)?_torch_(f32|bf16|f16))"
    unknown = [key for key in golden().keys("gnsilu/") if not re.fullmatch(known, key)]
    assert not unknown
