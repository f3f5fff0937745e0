"""The transformer: official conditioning, perturbations per item, batched branches, compilation, no host reads."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model import transformer as module
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS, build
from ltxkern.pipeline.model.inputs import ModalityInput, device_tensors
from ltxkern.pipeline.model.transformer import (
    LTX2Transformer,
    predict_velocity,
    predict_velocity_batched,
    predict_x0,
    predict_x0_batched,
)
from tests.pipeline.model.demo_inputs import (
    AUDIO_TOKENS,
    FLAGS,
    ISOLATED,
    VIDEO_TOKENS,
    close,
    differ,
    inputs,
    of_diffusers,
    with_mask,
)


class Written(TorchDispatchMode):
    """Counts the ops that write tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += not func.is_view
        return func(*args, **(kwargs or {}))


def stock(model: LTX2Transformer) -> LTX2VideoTransformer3DModel:
    """diffusers' model with the same weights."""
    made = LTX2VideoTransformer3DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("use_cross_timestep", [True, False])
def test_the_fix_is_still_needed(model: LTX2Transformer, use_cross_timestep: bool) -> None:
    """If this fails, diffusers follows the official timesteps of a partly masked video: the override may go."""
    pair = inputs()
    pair["video"] = with_mask(pair["video"])
    theirs = of_diffusers(stock(model), pair, use_cross_timestep=use_cross_timestep)
    assert any(differ(*both) for both in zip(predict_velocity(model, **pair), theirs, strict=True))


@pytest.mark.parametrize("multiplier", [1000, 250])
def test_equals_diffusers_where_they_agree(model: LTX2Transformer, multiplier: int) -> None:
    """With one sigma and no mask both conditionings of diffusers are the official one, also where gates have their own scale."""
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    scaled = LTX2Transformer(**config | {"cross_attn_timestep_scale_multiplier": multiplier}).eval()
    scaled.load_state_dict(model.state_dict())
    pair = inputs(batch=2, sigma=0.25)
    assert all((device_tensors(item, 1000.0).sigma == 250).all() for item in pair.values())
    close(predict_velocity(scaled, **pair), of_diffusers(stock(scaled), pair), 2e-5)


def test_gate_follows_the_other_sigma_and_scale_the_own_tokens(model: LTX2Transformer) -> None:
    """Each embedder sees the angles of its timesteps, and none is asked twice."""
    expected = {
        "time_embed": [0, 0, 125.0] + [500.0] * (VIDEO_TOKENS - 3),
        "audio_time_embed": [250.0],
        "prompt_adaln": [500.0],
        "audio_prompt_adaln": [250.0],
        "av_cross_attn_video_scale_shift": [0, 0, 125.0] + [500.0] * (VIDEO_TOKENS - 3),
        "av_cross_attn_video_a2v_gate": [250.0],
        "av_cross_attn_audio_scale_shift": [250.0],
        "av_cross_attn_audio_v2a_gate": [500.0],
    }
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in expected}
    hooks = [
        getattr(model, name).emb.timestep_embedder.register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0])
        )
        for name, kept in seen.items()
    ]
    pair = inputs()
    video = with_mask(dataclasses.replace(pair["video"], sigma=0.5))
    audio = dataclasses.replace(pair["audio"], sigma=0.25)
    predict_velocity(model, video, audio)
    for hook in hooks:
        hook.remove()
    for name, timesteps in expected.items():
        assert len(seen[name]) == 1, name
        close([seen[name][0][0]], [module._sinusoid(torch.tensor(timesteps), 256)], 1e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_branches_in_one_forward(model: LTX2Transformer, batch: int, masked: bool) -> None:
    branches = []
    for seed, flags in enumerate(FLAGS):
        pair = inputs(seed, batch, sigma=0.3 + 0.1 * seed)
        if masked:
            pair = {name: with_mask(item) for name, item in pair.items()}
        branches.append(pair | flags)
    together = predict_velocity_batched(model, branches)
    for branch, outputs in zip(branches, together, strict=True):
        close(outputs, predict_velocity(model, **branch), 4e-5)
    for branch, x0 in zip(branches, predict_x0_batched(model, branches), strict=True):
        alone = predict_x0(model, **branch)
        close(x0.values(), alone.values(), 4e-5)


def test_every_perturbation_does_something(model: LTX2Transformer) -> None:
    plain = predict_velocity(model, **inputs())
    for flags in FLAGS[1:]:
        assert any(differ(a, b) for a, b in zip(plain, predict_velocity(model, **inputs(), **flags), strict=True)), (
            flags
        )


def test_no_branches(model: LTX2Transformer) -> None:
    assert predict_velocity_batched(model, []) == []
    assert predict_x0_batched(model, []) == []


@pytest.mark.parametrize(("flags", "video_hears", "audio_sees"), [
    ({}, True, True),
    (ISOLATED, False, False),
])  # fmt: skip
def test_isolation(model: LTX2Transformer, flags: dict, video_hears: bool, audio_sees: bool) -> None:
    first, second = inputs(0), inputs(1)
    plain = predict_velocity(model, **first, **flags)
    other_audio = predict_velocity(model, first["video"], second["audio"], **flags)
    other_video = predict_velocity(model, second["video"], first["audio"], **flags)
    assert differ(plain[0], other_audio[0]) == video_hears
    assert differ(plain[1], other_video[1]) == audio_sees


def test_one_direction_alone(model: LTX2Transformer) -> None:
    first, second = inputs(0), inputs(1)
    flags = {"disable_a2v_cross_attn": True}
    plain = predict_velocity(model, **first, **flags)
    close(plain[:1], predict_velocity(model, first["video"], second["audio"], **flags)[:1], 0)
    assert differ(plain[1], predict_velocity(model, second["video"], first["audio"], **flags)[1])


def test_one_modality_equals_isolation(model: LTX2Transformer) -> None:
    pair = inputs()
    both = predict_velocity(model, **pair, **ISOLATED)
    video, nothing = predict_velocity(model, pair["video"], None)
    assert nothing is None
    close([video], both[:1], 0)
    nothing, audio = predict_velocity(model, None, pair["audio"])
    assert nothing is None
    close([audio], both[1:], 0)
    assert set(predict_x0(model, None, pair["audio"])) == {"audio"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sigma", [0.5, 0.9093749523162842, (0.99 * 0.73) ** 0.5])
def test_x0_has_the_bits_of_the_composition(dtype: torch.dtype, sigma: float) -> None:
    pair = inputs(batch=2, sigma=sigma, dtype=dtype)
    items, known = [pair["audio"], pair["video"], with_mask(pair["video"])], {}
    for item in items:
        velocity = torch.randn(item.latent.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        steps = torch.tensor(sigma).expand(2, 1, 1) if item.mask is None else (item.mask.double() * sigma).float()
        expected = (item.latent.float() - velocity.float() * steps).to(dtype)
        assert torch.equal(module._to_x0(item, velocity, known), expected)
    assert len(known) == 2


def test_x0_is_one_launch_a_branch(model: LTX2Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one for the timesteps of all branches."""
    branches = [inputs() | flags for flags in FLAGS[:3]]
    velocities = predict_velocity_batched(model, branches, most=1)
    monkeypatch.setattr(module, "predict_velocity_batched", lambda *_: velocities)
    with Written() as seen:
        predict_x0_batched(model, branches)
    assert seen.names == {"gated_residual": 2 * 3, "new_full": 1}


def test_x0(model: LTX2Transformer) -> None:
    pair = inputs(sigma=0.7)
    pair["video"] = with_mask(pair["video"])
    velocity = predict_velocity(model, **pair)
    x0 = predict_x0(model, **pair)
    video = pair["video"]
    assert torch.equal(x0["video"][:, :2], video.latent[:, :2])
    close([x0["video"]], [video.latent - velocity[0] * video.mask * 0.7], 1e-6)
    close([x0["audio"]], [pair["audio"].latent - velocity[1] * 0.7], 1e-6)


def test_all_ones_mask_is_no_mask(model: LTX2Transformer) -> None:
    pair = inputs()
    ones = {n: dataclasses.replace(i, mask=torch.ones(*i.latent.shape[:2], 1)) for n, i in pair.items()}
    close(predict_velocity(model, **pair), predict_velocity(model, **ones))


def embedded_rows(model: LTX2Transformer, branches: list[dict[str, Any]]) -> tuple[list[int], list[tuple]]:
    """Rows that the two widest timestep projections compute in one forward, and its velocities."""
    rows: list[int] = []
    hooks = [
        embedder.linear.register_forward_hook(lambda _, args, out: rows.append(out.numel() // out.shape[-1]))
        for embedder in (model.time_embed, model.audio_time_embed)
    ]
    outputs = predict_velocity_batched(model, branches)
    for hook in hooks:
        hook.remove()
    return rows, outputs


@pytest.mark.parametrize("sigma", [0.5, (0.9934906959533691 * 0.9860149025917053) ** 0.5])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_timestep_is_embedded_once_per_level(model: LTX2Transformer, batch: int, sigma: float) -> None:
    """Known mask levels give the numbers of the per-token path, with rows apart for each item of the batch."""
    branches, known = [], []
    for seed, flags in enumerate(FLAGS[:2]):
        pair = inputs(seed, batch, sigma=sigma * (1 - 0.3 * seed))
        video = with_mask(pair["video"])
        assert video.mask is not None
        video.mask[-1, :4] = torch.tensor([1.0, 0.25, 0.0, 1.0])[:, None]
        audio = dataclasses.replace(pair["audio"], mask=torch.ones(batch, AUDIO_TOKENS, 1))
        branches.append({"video": video, "audio": audio, **flags})
        known.append(
            branches[-1]
            | {
                "video": dataclasses.replace(video, levels=(1.0, 0.0, 0.25)),
                "audio": dataclasses.replace(audio, levels=(1.0,)),
            }
        )
    rows, expected = embedded_rows(model, branches)
    assert rows == [2 * batch * VIDEO_TOKENS, 2 * batch * AUDIO_TOKENS]
    rows, outputs = embedded_rows(model, known)
    assert rows == [2 * batch * 3, 2 * batch]
    for pair_of_outputs, pair_expected in zip(outputs, expected, strict=True):
        close(pair_of_outputs, pair_expected, 4e-5)


@pytest.mark.parametrize("timestep", [0.0, 1.1, 700.0, 993.49066])
def test_sinusoid(timestep: float) -> None:
    t = torch.tensor([timestep], dtype=torch.float32)
    frequencies = (10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)).float()
    angle = (t[:, None] * frequencies).double()
    # The fp32 exponent alone is worth a few ulp of the frequency.
    tolerance = 1e-6 + 3e-7 * timestep
    close([module._sinusoid(t, 256).double()], [torch.cat([angle.cos(), angle.sin()], -1)], tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    transformer = build_demo(dtype=dtype).transformer
    assert transformer is not None
    outputs = predict_x0(transformer, **inputs(dtype=dtype))
    assert {value.dtype for value in outputs.values()} == {dtype}
    reference = predict_x0(build_demo().transformer, **inputs())
    tolerance = 0.2 if dtype == torch.bfloat16 else 0.03
    close([value.float() for value in outputs.values()], reference.values(), tolerance)


@pytest.mark.parametrize("flags", [{}, {"skip_video_self_attn_blocks": [1]}, ISOLATED])
def test_compiles_without_graph_breaks(model: LTX2Transformer, flags: dict) -> None:
    torch.compiler.reset()
    expected = predict_velocity(model, **inputs(), **flags)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(predict_velocity(compiled, **inputs(), **flags), expected)


def test_no_host_reads() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        config = PRODUCTION_CONFIGS["transformer"] | {"num_layers": 2}
        transformer = LTX2Transformer(**config).eval()

        def item(axes: int, tokens: int, channels: int, width: int) -> ModalityInput:
            latent = torch.empty(1, tokens, channels)
            context = torch.empty(1, 1024, width)
            return ModalityInput(latent, 0.9, torch.ones(1, tokens, 1), torch.empty(1, axes, tokens, 2), context)

        pair = {"video": item(3, 510, 128, 4096), "audio": item(1, 126, 128, 2048)}
        results = predict_x0_batched(transformer, [pair | flags for flags in FLAGS])
        assert [tuple(r["video"].shape) for r in results] == [(1, 510, 128)] * len(FLAGS)


def test_other_generations_are_refused() -> None:
    for change in ({"cross_attn_mod": False, "audio_cross_attn_mod": False}, {"use_prompt_embeddings": True}):
        with pytest.raises(ValueError, match=r"not LTX-2\.3"):
            build("transformer", PRODUCTION_CONFIGS["transformer"] | {"num_layers": 1} | change)
