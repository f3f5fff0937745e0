"""The res2s sampler: toy golden, an independent fp64 loop, noise order, masks, dtypes, callbacks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.pipeline.sampling.res2s import TAIL_SIGMA, res2s_sample
from ltxkern.pipeline.sampling.schedule import STAGE_2_SIGMAS, ltx2_sigmas
from tests.pipeline.sampling.toy_denoiser import SIGMAS, Toy, draw
from tests.serving import over_backends, serving

TOY_VIDEO = [
    0.412109375, 0.259765625, 0.40234375, 0.4140625, 0.3359375, 0.435546875, 0.33203125, 0.361328125, 0.43359375,
    0.412109375, 0.296875, 0.43359375, 0.322265625, 0.384765625, 0.267578125, 0.283203125, 0.34765625, 0.3828125,
    0.1474609375, 0.365234375, 0.357421875, 0.421875, 0.3984375, 0.376953125,
]  # fmt: skip
TOY_AUDIO = [
    -0.201171875, -0.326171875, -0.275390625, -0.30859375, -0.1357421875, 0.0062255859375, -0.3515625, -0.2265625,
    -0.3828125, -0.373046875, -0.2197265625, -0.2080078125,
]  # fmt: skip
TOY_VIDEO_STAGE_2 = [
    0.1591796875, 0.34765625, 0.265625, 0.1396484375, 0.384765625, 0.3203125, 0.42578125, 0.435546875, 0.2353515625,
    0.392578125, 0.439453125, 0.42578125, 0.427734375, 0.3203125, 0.224609375, 0.37890625, 0.431640625, 0.392578125,
    0.435546875, 0.341796875, 0.2734375, 0.220703125, 0.392578125, 0.27734375,
]  # fmt: skip
TOY_AUDIO_STAGE_2 = [
    -0.279296875, -0.031982421875, -0.341796875, -0.337890625, -0.220703125, -0.19140625, -0.212890625, -0.271484375,
    0.07568359375, -0.375, -0.326171875, -0.07421875,
]  # fmt: skip


def near(actual: Tensor, expected: Sequence[float]) -> None:
    """Within two units in the last place of bf16."""
    torch.testing.assert_close(actual.float().flatten(), torch.tensor(expected), atol=0, rtol=2.0**-7)


@over_backends("res2s_midpoint", on_device=False)
def test_toy_stage_1(backend: str) -> None:
    latents = draw()
    near(latents["video"].flatten()[:4], [-0.81640625, -0.5546875, -0.828125, -1.296875])
    with serving(backend):
        result = res2s_sample(Toy(), latents, ltx2_sigmas(15, 8160))
    near(result["video"], TOY_VIDEO)
    near(result["audio"], TOY_AUDIO)


@over_backends("res2s_midpoint", on_device=False)
def test_toy_masked_tokens_stay_clean(backend: str) -> None:
    latents = draw()
    mask = torch.ones(1, 6, 1)
    mask[:, :2] = 0
    clean = torch.zeros(1, 6, 4, dtype=torch.bfloat16)
    clean[:, :2] = torch.linspace(-1, 1, 8).reshape(1, 2, 4)
    latents["video"] = torch.where(mask.bool(), latents["video"], clean)
    with serving(backend):
        result = res2s_sample(Toy(), latents, ltx2_sigmas(15, 8160), masks={"video": mask}, clean={"video": clean})
    assert torch.equal(result["video"][:, :2], clean[:, :2])
    near(result["video"][:, 2:], TOY_VIDEO[8:])
    near(result["audio"], TOY_AUDIO)


@over_backends("res2s_midpoint", on_device=False)
def test_toy_stage_2(backend: str) -> None:
    with serving(backend):
        result = res2s_sample(Toy(), draw(scale=STAGE_2_SIGMAS[0]), STAGE_2_SIGMAS)
    near(result["video"], TOY_VIDEO_STAGE_2)
    near(result["audio"], TOY_AUDIO_STAGE_2)


def naive_loop(
    denoiser: Callable[..., Mapping[str, Tensor]],
    latents: Mapping[str, Tensor],
    sigmas: Sequence[float],
    *,
    eta: float = 0.5,
    seeds: tuple[int, int] = (-1, 9999),
    refine: bool = True,
    masks: Mapping[str, Tensor] | None = None,
    clean: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The algorithm written out plainly, with 100 refinement iterations and eager fp64 ops."""
    step_generator, substep_generator = (torch.Generator().manual_seed(seed) for seed in seeds)
    levels = torch.tensor(sigmas, dtype=torch.float32).double().tolist()
    clean_end = levels[-1] == 0
    if clean_end:
        levels[-1] = torch.tensor(0.0011).double().item()
    names = [name for name in ("video", "audio") if name in latents]
    state = dict(latents)
    dtypes = {name: latent.dtype for name, latent in latents.items()}

    def post(name: str, value: Tensor) -> Tensor:
        if masks is None or clean is None or name not in masks:
            return value
        return (value * masks[name] + clean[name].float() * (1 - masks[name])).to(value.dtype)

    def noise(name: str, generator: torch.Generator) -> Tensor:
        raw = torch.randn(latents[name].shape, dtype=torch.float64, generator=generator)
        raw = (raw - raw.mean()) / raw.std()
        return (raw - raw.mean((-2, -1), keepdim=True)) / raw.std((-2, -1), keepdim=True)

    def sde(x: Tensor, d: Tensor, sigma: float, sigma_next: float, n: Tensor, share: float) -> Tensor:
        up = min(share * sigma_next, 0.9999 * sigma_next)
        resid = math.sqrt(max(sigma_next**2 - up**2, 0.0))
        alpha = 1 - sigma_next + resid
        if up == 0:
            return d
        eps = (x - d) / (sigma - sigma_next)
        return alpha * ((x - sigma * eps) + resid / alpha * eps) + up * n

    def phi(order: int, z: float) -> float:
        return math.expm1(z) / z if order == 1 else (math.exp(z) - 1 - z) / z**2

    for index in range(len(levels) - 1):
        sigma, sigma_next = levels[index], levels[index + 1]
        h = -math.log(sigma_next / sigma)
        sigma_sub = math.sqrt(sigma * sigma_next)
        a21, b2 = 0.5 * phi(1, -h / 2), 2 * phi(2, -h)
        b1 = phi(1, -h) - b2
        first = denoiser(state, sigma, step=index, substep=False)
        draws = {name: noise(name, substep_generator) for name in names}
        anchor, middle, e1 = {}, {}, {}
        for name in names:
            d1 = post(name, first[name]).double()
            anchor[name] = state[name].double()
            e1[name] = d1 - anchor[name]
            middle[name] = anchor[name] + h * a21 * e1[name]
            middle[name] = post(name, sde(anchor[name], middle[name], sigma, sigma_sub, draws[name], 0.5))
            if refine and h < 0.5 and sigma > 0.03:
                for _ in range(100):
                    anchor[name] = middle[name] - h * a21 * e1[name]
                    e1[name] = d1 - anchor[name]
        second = denoiser({name: middle[name].to(dtypes[name]) for name in names}, sigma_sub, step=index, substep=True)
        draws = {name: noise(name, step_generator) for name in names}
        for name in names:
            e2 = post(name, second[name]).double() - anchor[name]
            moved = anchor[name] + h * (b1 * e1[name] + b2 * e2)
            moved = post(name, sde(anchor[name], moved, sigma, sigma_next, draws[name], eta))
            state[name] = moved.to(dtypes[name])
    if clean_end:
        last = denoiser(state, levels[-1], step=len(levels) - 1, substep=False)
        state = {name: post(name, last[name]) for name in names}
    return state


def both(**options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    latents = draw(3, dtype=torch.float64)
    sigmas = options.pop("sigmas", SIGMAS)
    ours = dict(options)
    if "seeds" in ours:
        ours["noise_seed"], ours["substep_seed"] = ours.pop("seeds")
    if "refine" in ours:
        ours["anchor_refinement"] = ours.pop("refine")
    double = Coupled()
    return res2s_sample(double, latents, sigmas, **ours), naive_loop(double, latents, sigmas, **options)


class Coupled:
    """A denoiser in fp64 in which each modality sees the other."""

    def __call__(self, latents: Mapping[str, Tensor], sigma: float, *, step: int, substep: bool) -> dict[str, Tensor]:
        total = sum(float(x.double().mean()) for x in latents.values())
        return {name: 0.6 * torch.tanh(x + 0.1 * total) + 0.2 * math.sin(3 * sigma) for name, x in latents.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eta": 0.0},
        {"eta": 0.8},
        {"refine": False},
        {"seeds": (5, 6)},
        {"sigmas": (1.0, 0.99, 0.97, 0.9)},
        {"sigmas": (0.5, 0.0)},
        {"sigmas": (0.04, 0.035, 0.025, 0.02, 0.0)},
    ],
    ids=str,
)
def test_agrees_with_the_algorithm_written_out(options: dict[str, Any]) -> None:
    ours, plain = both(**options)
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], atol=1e-10, rtol=1e-10)


def test_masks_agree_with_the_algorithm_written_out() -> None:
    latents = draw(3, dtype=torch.float64)
    masks = {name: torch.linspace(0, 1, latent.shape[1]).reshape(1, -1, 1) for name, latent in latents.items()}
    clean = draw(4, dtype=torch.float64)
    ours = res2s_sample(Coupled(), latents, SIGMAS, masks=masks, clean=clean)
    plain = naive_loop(Coupled(), latents, SIGMAS, masks=masks, clean=clean)
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["video", "audio"])
def test_one_modality_alone(name: str) -> None:
    """Its noise is that of a run of its own: nothing is drawn for the absent one."""
    latents = {name: draw(3, dtype=torch.float64)[name]}
    ours = res2s_sample(Coupled(), latents, SIGMAS)
    plain = naive_loop(Coupled(), latents, SIGMAS)
    assert set(ours) == {name}
    torch.testing.assert_close(ours[name], plain[name], atol=1e-10, rtol=1e-10)


def test_order_of_the_given_dict_does_not_matter() -> None:
    latents = draw()
    swapped = {"audio": latents["audio"], "video": latents["video"]}
    ours, theirs = res2s_sample(Toy(), latents, SIGMAS), res2s_sample(Toy(), swapped, SIGMAS)
    assert all(torch.equal(ours[name], theirs[name]) for name in latents)


def test_evaluations() -> None:
    denoiser = Toy()
    res2s_sample(denoiser, draw(), (1.0, 0.5, 0.0))
    fp32 = torch.tensor([1.0, 0.5, 0.0011]).double().tolist()
    assert [call[1:] for call in denoiser.calls] == [(0, False), (0, True), (1, False), (1, True), (2, False)]
    expected = [1.0, math.sqrt(0.5), 0.5, math.sqrt(fp32[1] * fp32[2]), fp32[2]]
    assert [call[0] for call in denoiser.calls] == pytest.approx(expected, rel=1e-15)
    assert fp32[2] == TAIL_SIGMA


def test_a_schedule_without_zero_has_no_last_evaluation() -> None:
    denoiser = Toy()
    res2s_sample(denoiser, draw(), (1.0, 0.5, 0.25))
    assert [call[1:] for call in denoiser.calls] == [(0, False), (0, True), (1, False), (1, True)]


def test_a_list_of_floats_means_its_fp32_tensor() -> None:
    tensor = torch.tensor(STAGE_2_SIGMAS)
    runs = [res2s_sample(Toy(), draw(), sigmas) for sigmas in (STAGE_2_SIGMAS, tensor, tensor.double())]
    assert all(torch.equal(run["video"], runs[0]["video"]) for run in runs)


def test_same_seed_same_bits_and_another_seed_another_result() -> None:
    first, again = res2s_sample(Toy(), draw(), SIGMAS), res2s_sample(Toy(), draw(), SIGMAS)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for seeds in ({"noise_seed": 3}, {"substep_seed": 3}):
        other = res2s_sample(Toy(), draw(), SIGMAS[:-1], **seeds)
        assert not torch.equal(other["video"], res2s_sample(Toy(), draw(), SIGMAS[:-1])["video"])


def test_substep_seed_follows_the_noise_seed() -> None:
    default = res2s_sample(Toy(), draw(), SIGMAS[:-1], noise_seed=4)
    given = res2s_sample(Toy(), draw(), SIGMAS[:-1], noise_seed=4, substep_seed=10_004)
    assert torch.equal(default["video"], given["video"])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    res2s_sample(Toy(), draw(), SIGMAS)
    assert torch.equal(torch.get_rng_state(), before)


def recorded(seeds: tuple[int, int], steps: int, latents: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    step, substep = (torch.Generator().manual_seed(seed) for seed in seeds)
    noise: dict[str, list[Tensor]] = {name: [] for name in latents}
    for _ in range(steps):
        for generator in (substep, step):
            for name, latent in latents.items():
                raw = torch.randn(latent.shape, dtype=torch.float64, generator=generator)
                noise[name].append(ltxkern.normalize_noise(raw))
    return noise


def test_replayed_noise_is_the_drawn_one() -> None:
    latents = draw(dtype=torch.float32)
    drawn = res2s_sample(Toy(), latents, SIGMAS)
    replayed = res2s_sample(Toy(), latents, SIGMAS, noise=recorded((-1, 9999), 4, latents), noise_seed=77)
    for name in latents:
        torch.testing.assert_close(drawn[name], replayed[name], atol=1e-6, rtol=1e-6)


def test_inputs_stay_as_they_were_and_results_are_fresh() -> None:
    latents = draw()
    kept = {name: latent.clone() for name, latent in latents.items()}
    handed: list[Tensor] = []

    class Keeping(Toy):
        def __call__(self, latents: Mapping[str, Tensor], sigma: float, **at: Any) -> dict[str, Tensor]:
            handed.append(latents["video"])
            copies.append(latents["video"].clone())
            return super().__call__(latents, sigma, **at)

    copies: list[Tensor] = []
    result = res2s_sample(Keeping(), latents, SIGMAS)
    assert all(torch.equal(latents[name], kept[name]) for name in latents)
    assert all(torch.equal(one, copy) for one, copy in zip(handed, copies, strict=True))
    assert all(result[name].data_ptr() != latents[name].data_ptr() for name in latents)


def test_a_denoiser_that_returns_its_input() -> None:
    result = res2s_sample(lambda latents, sigma, **_: latents, draw(dtype=torch.float64), (1.0, 0.9, 0.8))
    plain = naive_loop(lambda latents, sigma, **_: dict(latents), draw(dtype=torch.float64), (1.0, 0.9, 0.8))
    torch.testing.assert_close(result["video"], plain["video"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("model_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_model_dtype(model_dtype: torch.dtype) -> None:
    seen = set()

    def denoiser(latents: Mapping[str, Tensor], sigma: float, **at: Any) -> dict[str, Tensor]:
        seen.update(latent.dtype for latent in latents.values())
        return {name: 0.5 * latent for name, latent in latents.items()}

    result = res2s_sample(denoiser, draw(dtype=torch.float32), SIGMAS, model_dtype=model_dtype)
    assert seen == {model_dtype}
    assert {latent.dtype for latent in result.values()} == {model_dtype}


def test_predictions_of_a_wider_dtype() -> None:
    result = res2s_sample(lambda x, s, **_: {n: 0.5 * v.double() for n, v in x.items()}, draw(), SIGMAS)
    assert result["video"].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 7, 3), (3, 1, 5), (1, 13, 1)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    latents = {"video": torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    ours, plain = res2s_sample(Coupled(), latents, SIGMAS), naive_loop(Coupled(), latents, SIGMAS)
    torch.testing.assert_close(ours["video"], plain["video"], atol=1e-10, rtol=1e-10)


def test_non_contiguous_latents() -> None:
    latents = draw(dtype=torch.float64)
    views = {name: latent.repeat_interleave(2, dim=-1)[..., ::2] for name, latent in latents.items()}
    assert not views["video"].is_contiguous()
    ours, theirs = res2s_sample(Coupled(), latents, SIGMAS), res2s_sample(Coupled(), views, SIGMAS)
    assert torch.equal(ours["video"], theirs["video"])


def test_callback() -> None:
    seen: list[tuple[int, int, dict[str, Tensor]]] = []
    result = res2s_sample(Toy(), draw(), SIGMAS, callback=lambda *given: seen.append(given))
    assert [(done, total) for done, total, _ in seen] == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert torch.equal(seen[-1][2]["video"], result["video"])
    assert not torch.equal(seen[0][2]["video"], seen[1][2]["video"])
    seen.clear()
    res2s_sample(Toy(), draw(), SIGMAS[:-1], callback=lambda *given: seen.append(given))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]


class StoppedError(Exception):
    """Raised by a test's own callback or denoiser."""


def test_exceptions_pass_through() -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise StoppedError("enough")

    with pytest.raises(StoppedError, match="enough"):
        res2s_sample(Toy(), draw(), SIGMAS, callback=stop)
    with pytest.raises(StoppedError, match="enough"):
        res2s_sample(stop, draw(), SIGMAS)
    with pytest.raises(KeyboardInterrupt):
        res2s_sample(Toy(), draw(), SIGMAS, callback=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert torch.is_grad_enabled()


def test_gradients_are_off() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.5))
    result = res2s_sample(lambda x, s, **_: {n: weight * v for n, v in x.items()}, draw(), SIGMAS)
    assert not result["video"].requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees_with_the_cpu_on_the_same_noise() -> None:
    latents = draw(dtype=torch.float32)
    noise = recorded((-1, 9999), 4, latents)
    host = res2s_sample(Toy(), latents, SIGMAS, noise=noise)
    device = res2s_sample(
        Toy(),
        {name: latent.cuda() for name, latent in latents.items()},
        SIGMAS,
        noise={name: [tensor.cuda() for tensor in tensors] for name, tensors in noise.items()},
    )
    for name in latents:
        torch.testing.assert_close(device[name].cpu(), host[name], atol=1e-5, rtol=1e-5)
