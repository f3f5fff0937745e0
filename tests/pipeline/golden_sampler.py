"""Golden checks of schedule, coefficients, samplers and whole loops; collected through test_golden.py."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ltxkern.pipeline.sampling.euler import euler_sample, euler_step
from ltxkern.pipeline.sampling.res2s import TAIL_SIGMA, res2s_sample
from ltxkern.pipeline.sampling.schedule import (
    DISTILLED_SIGMAS,
    STAGE_2_SIGMAS,
    ltx2_sigmas,
    res2s_coefficients,
    res2s_steps,
    sde_coefficients,
)
from tests.golden import matching
from tests.golden import open_golden as golden

COVERS = (
    "sched/ltx2/", "sched/ltx2_nostretch/", "sched/ltx2_term", "sched/ltx2_shift/", "sched/const/", "res2s/coeffs/",
    "res2s/step_sizes/", "res2s/sub_sigmas/", "sde/coeff_up/", "sde/coeff_down/", "euler/", "loop/sigmas/", "loop/init/",
    "loop/case/", "loop/euler_",
)  # fmt: skip
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}
BF16_ULP = 2.0**-8


def close(key: str, actual: Tensor, expected: Tensor, tolerance: float, *, relative: float | None = None) -> None:
    """Same shape and dtype, and values within the tolerance (relative to 1 or to the value, whichever is larger)."""
    relative = tolerance if relative is None else relative
    torch.testing.assert_close(
        actual, expected, atol=tolerance, rtol=relative, equal_nan=True, msg=lambda text: f"{key}: {text}"
    )


def rows(key: str) -> list[list[float]]:
    return golden()[key].tolist()


def test_schedule() -> None:
    for match in matching(r"sched/ltx2/steps(\d+)/tokens(\d+|default)"):
        tokens = () if match[2] == "default" else (int(match[2]),)
        close(match[0], ltx2_sigmas(int(match[1]), *tokens), golden()[match[0]], 1e-6)


def test_schedule_variants() -> None:
    for match in matching(r"sched/ltx2_nostretch/steps(\d+)/tokens(\d+)"):
        close(match[0], ltx2_sigmas(int(match[1]), int(match[2]), stretch=False), golden()[match[0]], 1e-6)
    for match in matching(r"sched/ltx2_term([\d.]+)/steps(\d+)/tokens(\d+)"):
        sigmas = ltx2_sigmas(int(match[2]), int(match[3]), terminal=float(match[1]))
        close(match[0], sigmas, golden()[match[0]], 1e-6)
    for match in matching(r"sched/ltx2_shift/steps(\d+)/tokens(\d+)/max([\d.]+)_base([\d.]+)"):
        sigmas = ltx2_sigmas(int(match[1]), int(match[2]), max_shift=float(match[3]), base_shift=float(match[4]))
        close(match[0], sigmas, golden()[match[0]], 1e-6)


def test_constant_schedules() -> None:
    constants = {"distilled": DISTILLED_SIGMAS, "stage2_distilled": STAGE_2_SIGMAS}
    for match in matching(r"sched/const/(\w+)"):
        close(match[0], torch.tensor(constants[match[1]]), golden()[match[0]], 0.0)


def test_runge_kutta_coefficients() -> None:
    for match in matching(r"res2s/coeffs/c2_([\d.]+)"):
        for h, *expected in rows(match[0]):
            actual = torch.tensor(res2s_coefficients(h, float(match[1])), dtype=torch.float64)
            close(f"{match[0]} h={h}", actual, torch.tensor(expected, dtype=torch.float64), 1e-300, relative=1e-11)


def real_schedule(name: str) -> Tensor:
    """Schedule that a key of step sizes or sub-sigmas was made from: stage2, or a prefix, steps and tokens."""
    if name == "stage2":
        return torch.tensor(STAGE_2_SIGMAS)
    found = re.fullmatch(r"[a-z]+(\d+)_(\d+)", name)
    assert found, f"cannot tell the schedule of {name!r}"
    return ltx2_sigmas(int(found[1]), int(found[2]))


def test_steps_of_real_schedules() -> None:
    for match in matching(r"res2s/(step_sizes|sub_sigmas)/(\w+)"):
        steps = res2s_steps([*real_schedule(match[2])[:-1].tolist(), TAIL_SIGMA])
        actual = [step.h if match[1] == "step_sizes" else step.sigma_sub for step in steps]
        # h is a logarithm of a quotient of fp32 sigmas: across CPUs the schedule differs by an fp32 ulp.
        close(match[0], torch.tensor(actual, dtype=torch.float64), golden()[match[0]], 1e-12, relative=2e-6)


def test_sde_coefficients() -> None:
    for match in matching(r"sde/coeff_(up/eta|down/ratio)([\d.]+)"):
        share = float(match[2])
        for sigma_next, *expected in rows(match[0]):
            given = {"sigma_up" if match[1].startswith("up") else "sigma_down": share * sigma_next}
            actual = torch.tensor(sde_coefficients(sigma_next, **given), dtype=torch.float64)
            close(f"{match[0]} {sigma_next}", actual, torch.tensor(expected, dtype=torch.float64), 1e-12)


def test_euler_step() -> None:
    sample, denoised = golden()["sde/step/a/f32/sample"], golden()["sde/step/a/f32/denoised"]
    for match in matching(r"euler/(f32|bf16)/s([\d.]+)_to_([\d.]+)"):
        dtype = DTYPES[match[1]]
        out = euler_step(sample.to(dtype), denoised.to(dtype), float(match[2]), float(match[3]))
        close(match[0], out, golden()[match[0]], 5e-6 if dtype == torch.float32 else 2 * BF16_ULP)


class Analytic:
    """The analytic denoisers of the golden loops, recording the noise levels they are called at."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.sigmas: list[float] = []

    def __call__(self, latents: Mapping[str, Tensor], sigma: float, *, step: int, substep: bool) -> dict[str, Tensor]:
        self.sigmas.append(sigma)
        states = {name: latent.float() for name, latent in latents.items()}
        predictions = {}
        for name, x in states.items():
            if self.kind == "A":
                x0 = 0.9 * torch.tanh(x)
            else:
                x0 = 0.7 * torch.tanh(x) + 0.2 * torch.sin(torch.tensor(3.0 * sigma))
                others = [state.mean() for other, state in states.items() if other != name]
                x0 = x0 + 0.05 * others[0] if others else x0
            predictions[name] = x0.to(latents[name].dtype)
        return predictions


def loop_cases() -> list[tuple[str, dict[str, Any]]]:
    """Checked cases: those of the legacy mode, whose refinement ran to its fixed point."""
    found = []
    for match in matching(r"loop/case/(\w+)/denoiser_sigmas"):
        meta = golden().metadata["meta"][match[0]]
        if meta.get("legacy_mode", True) and meta.get("bongmath_max_iter", 100) == 100:
            found.append((match[1], meta))
    assert found, f"{golden().path} holds no loop case that is checked"
    return found


def start_of(name: str, meta: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the sampler that a case was run with, without its noise."""
    suffix = "_b2" if meta.get("b2") else ""
    latents = {"video": golden()[f"loop/init/v{suffix}"], "audio": golden()[f"loop/init/a{suffix}"]}
    if meta.get("only"):
        latents = {key: latent for key, latent in latents.items() if key[0] == meta["only"]}
    arguments: dict[str, Any] = {"sigmas": golden()[f"loop/sigmas/{meta['sg']}"], "model_dtype": dtype}
    if meta.get("i2v"):
        latents["video"] = golden()[f"loop/case/{name}/v_start"]
        arguments["masks"] = {"video": golden()["loop/init/v_mask"]}
        arguments["clean"] = {"video": golden()["loop/init/v_clean"]}
    arguments["latents"] = latents
    for key, ours in (
        ("noise_seed", "noise_seed"), ("noise_seed_substep", "substep_seed"), ("eta", "eta"),
        ("bongmath", "anchor_refinement"),
    ):  # fmt: skip
        if key in meta:
            arguments[ours] = meta[key]
    return arguments


def check_result(name: str, dtype: torch.dtype, result: Mapping[str, Tensor]) -> None:
    for modality, latent in result.items():
        key = f"loop/case/{name}/{modality[0]}_final"
        if dtype == torch.bfloat16:
            close(key, latent, golden()[key], 0.0, relative=2 * BF16_ULP)
        else:
            close(key, latent, golden()[key], 1e-5)


def check_loop(name: str, meta: Mapping[str, Any], noise: dict[str, list[Tensor]] | None) -> None:
    dtype = DTYPES[meta.get("model_dtype", "f32")]
    arguments = start_of(name, meta, dtype)
    denoiser = Analytic(meta["den"])
    result = res2s_sample(denoiser, **arguments, noise=noise)
    assert set(result) == set(arguments["latents"])
    check_result(name, dtype, result)
    key = f"loop/case/{name}/denoiser_sigmas"
    close(key, torch.tensor(denoiser.sigmas, dtype=torch.float64), golden()[key], 1e-12, relative=1e-7)


@pytest.mark.parametrize(("name", "meta"), loop_cases(), ids=[name for name, _ in loop_cases()])
def test_loop(name: str, meta: dict[str, Any]) -> None:
    check_loop(name, meta, None)


def test_loop_with_recorded_noise() -> None:
    recorded = {match[1] for match in matching(r"loop/case/(\w+)/noise_[va]")}
    for name, meta in loop_cases():
        if name in recorded:
            noise = {
                modality: list(golden()[f"loop/case/{name}/noise_{modality[0]}"])
                for modality in start_of(name, meta, torch.float32)["latents"]
            }
            check_loop(name, meta, noise)


def test_euler_loop() -> None:
    for match in matching(r"loop/euler_([a-z]+\d*)_([AB])/v_final"):
        schedule = matching(rf"loop/sigmas/({match[1]}\w*)")[0][0]
        latents = {"video": golden()["loop/init/v"], "audio": golden()["loop/init/a"]}
        result = euler_sample(Analytic(match[2]), latents, golden()[schedule])
        for modality, latent in result.items():
            key = match[0].replace("/v_final", f"/{modality[0]}_final")
            close(key, latent, golden()[key], 5e-6)
