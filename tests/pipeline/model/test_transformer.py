"""The transformer: official conditioning, perturbations per item, batched branches, compilation, no host reads."""

import dataclasses
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
    needs_cross_timestep_fix,
    predict_velocity,
    predict_velocity_batched,
    predict_x0,
    predict_x0_batched,
)

ISOLATED = {"disable_a2v_cross_attn": True, "disable_v2a_cross_attn": True}
VIDEO_TOKENS, AUDIO_TOKENS, TEXT_ROWS = 7, 5, 3


@pytest.fixture(scope="module")
def model() -> LTX2Transformer:
    transformer = build_demo().transformer
    assert transformer is not None
    return transformer


def inputs(seed: int = 0, batch: int = 1, sigma: float = 0.5, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    positions = [
        torch.rand(batch, axes, n, 2, generator=generator) * 10 for axes, n in ((3, VIDEO_TOKENS), (1, AUDIO_TOKENS))
    ]
    video = ModalityInput(normal(batch, VIDEO_TOKENS, 16), sigma, None, positions[0], normal(batch, TEXT_ROWS, 64))
    audio = ModalityInput(normal(batch, AUDIO_TOKENS, 32), sigma, None, positions[1], normal(batch, TEXT_ROWS, 32))
    return {"video": video, "audio": audio}


def with_mask(item: ModalityInput, kept: int = 2) -> ModalityInput:
    mask = torch.ones(*item.latent.shape[:2], 1)
    mask[:, :kept] = 0
    mask[:, kept] = 0.25
    return dataclasses.replace(item, mask=mask)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-3)


def test_the_fix_is_still_needed() -> None:
    state = torch.get_rng_state()
    assert needs_cross_timestep_fix(), "diffusers now follows the official timesteps: the override may go"
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_equals_diffusers_where_they_agree(model: LTX2Transformer) -> None:
    """With one sigma and no mask both conditionings of diffusers are the official one."""
    stock = LTX2VideoTransformer3DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    stock.load_state_dict(model.state_dict())
    pair = inputs(batch=2, sigma=0.25)
    video, audio = pair["video"], pair["audio"]
    theirs = stock(
        video.latent,
        audio.latent,
        video.context,
        audio.context,
        timestep=torch.full((2, VIDEO_TOKENS), 250.0),
        audio_timestep=torch.full((2, AUDIO_TOKENS), 250.0),
        sigma=torch.full((2,), 250.0),
        audio_sigma=torch.full((2,), 250.0),
        encoder_attention_mask=torch.ones(2, TEXT_ROWS),
        audio_encoder_attention_mask=torch.ones(2, TEXT_ROWS),
        video_coords=video.positions,
        audio_coords=audio.positions,
        return_dict=False,
    )
    close(predict_velocity(model, **pair), theirs, 2e-5)


def test_gate_follows_the_other_sigma_and_scale_the_own_tokens(model: LTX2Transformer, monkeypatch: Any) -> None:
    seen: dict[int, torch.Tensor] = {}
    real = module._embed

    def recorded(embedder: Any, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        seen[id(embedder)] = timestep
        return real(embedder, timestep, dtype)

    monkeypatch.setattr(module, "_embed", recorded)
    pair = inputs()
    video = with_mask(dataclasses.replace(pair["video"], sigma=0.5))
    audio = dataclasses.replace(pair["audio"], sigma=0.25)
    predict_velocity(model, video, audio)
    own = torch.tensor([0, 0, 125.0] + [500.0] * (VIDEO_TOKENS - 3))
    assert torch.equal(seen[id(model.av_cross_attn_video_scale_shift)][0], own)
    assert torch.equal(seen[id(model.time_embed)][0], own)
    assert seen[id(model.prompt_adaln)].flatten().tolist() == [500.0]
    assert seen[id(model.av_cross_attn_video_a2v_gate)].flatten().tolist() == [250.0]
    assert seen[id(model.av_cross_attn_audio_scale_shift)].flatten().tolist() == [250.0]
    assert seen[id(model.av_cross_attn_audio_v2a_gate)].flatten().tolist() == [500.0]


def test_no_attention_has_a_mask(model: LTX2Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    predict_velocity(model, **inputs())
    assert calls == [None] * 6 * len(model.transformer_blocks)


FLAGS: list[dict[str, Any]] = [
    {},
    {"skip_video_self_attn_blocks": [1]},
    {"skip_audio_self_attn_blocks": (0, 1)},
    {"skip_video_self_attn_blocks": [0], "skip_audio_self_attn_blocks": [1], "disable_v2a_cross_attn": True},
    {"disable_a2v_cross_attn": True},
    ISOLATED,
]


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


class Modulations(TorchDispatchMode):
    """Tables of modulation rows in a forward: how often they are written out token by token, and read by a row index instead."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.gathered, self.indexed = shape, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("aten.index", "aten.embedding", "aten.gather")) and result.shape[-3:] == self.shape:
            self.gathered += 1
        if name.startswith("ltxkern.") and any(value.dtype == torch.int64 for value in args if torch.is_tensor(value)):
            self.indexed += 1
        return result


@pytest.mark.parametrize("levels", [(1.0, 0.0, 0.25), None])
def test_no_modulation_is_written_out_token_by_token(model: LTX2Transformer, levels: tuple[float, ...] | None) -> None:
    """With known levels the blocks hand the row index on; only the output layer, which is no RMS norm, looks its rows up."""
    pair = inputs()
    pair["video"] = dataclasses.replace(with_mask(pair["video"]), levels=levels)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    with Modulations((1, VIDEO_TOKENS, width)) as seen:
        predict_velocity(model, **pair)
    # Self-attention, text and feed-forward: five calls; two more for the attentions between the modalities.
    assert seen.indexed == (7 * len(model.transformer_blocks) if levels else 0)
    assert seen.gathered == (1 if levels else 0)


def test_levels_are_checked(model: LTX2Transformer) -> None:
    pair = inputs()
    video, audio = pair["video"], pair["audio"]
    for item in (dataclasses.replace(video, levels=(1.0,)), dataclasses.replace(with_mask(video), levels=())):
        with pytest.raises(ValueError, match=r"video.levels: expected the distinct values of a mask, or None"):
            predict_velocity(model, item, audio)
    masked = [dataclasses.replace(with_mask(video), levels=levels) for levels in ((1.0, 0.0, 0.25), None)]
    with pytest.raises(ValueError, match=r"video.levels: expected the same in every branch"):
        predict_velocity_batched(model, [{"video": item, "audio": audio} for item in masked])


def test_timesteps_are_rounded_once() -> None:
    """An fp32 sigma takes the official fp32 order; a fp64 one (the substep) is rounded after the product."""
    item = inputs()["video"]
    fp32 = torch.tensor(0.9934906959533691).item()
    fp64 = (fp32 * 0.9860149025917053) ** 0.5
    for sigma in (fp32, fp64, 0.0011, 1.0, 0.0):
        tensors = device_tensors(dataclasses.replace(with_mask(item), sigma=sigma), 1000)
        single = torch.tensor(sigma).item() == sigma
        wide = torch.tensor(sigma, dtype=torch.float32 if single else torch.float64)
        mask = with_mask(item).mask
        assert mask is not None
        expected = (mask.to(wide.dtype) * wide * 1000).float().squeeze(-1)
        assert torch.equal(tensors.timestep, expected)
        assert torch.equal(tensors.sigma, (wide * 1000).float().reshape(1))


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


def test_blocks_compile_alone_and_mixed_batches_too() -> None:
    transformer = build_demo().transformer
    assert transformer is not None
    branches = [inputs(seed) | flags for seed, flags in enumerate(FLAGS)]
    expected = predict_velocity_batched(transformer, branches)
    torch.compiler.reset()
    for block in transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for outputs, plain in zip(predict_velocity_batched(transformer, branches), expected, strict=True):
        close(outputs, plain)


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


def test_wrong_arguments(model: LTX2Transformer) -> None:
    pair = inputs()
    video, audio = pair["video"], pair["audio"]
    replace = dataclasses.replace
    with pytest.raises(ValueError, match="both None"):
        predict_velocity(model, None, None)
    with pytest.raises(ValueError, match=r"video.latent: expected \(B, T, 16\)"):
        predict_velocity(model, replace(video, latent=video.latent[..., :8]), audio)
    with pytest.raises(ValueError, match=r"audio.positions: expected \(1, 1, 5, 2\), got \(1, 1, 4, 2\)"):
        predict_velocity(model, video, replace(audio, positions=audio.positions[:, :, 1:]))
    with pytest.raises(ValueError, match=r"video.mask: expected \(1, 7, 1\), got \(1, 7\)"):
        predict_velocity(model, replace(video, mask=torch.ones(1, 7)), audio)
    with pytest.raises(ValueError, match=r"audio.context: expected \(1, L, D\)"):
        predict_velocity(model, video, replace(audio, context=audio.context[0]))
    with pytest.raises(ValueError, match=r"skip_video_self_attn_blocks: expected block indices 0 to 1, got \[28\]"):
        predict_velocity(model, video, audio, skip_video_self_attn_blocks=[28])
    with pytest.raises(ValueError, match="audio: expected in every branch or in none"):
        predict_velocity_batched(model, [pair, {"video": video}])
    with pytest.raises(ValueError, match=r"video.mask: expected in every branch or in none"):
        predict_velocity_batched(model, [pair, {"video": with_mask(video), "audio": audio}])
    with pytest.raises(ValueError, match=r"video.latent: expected one shape"):
        predict_velocity_batched(model, [pair, inputs(batch=2)])
    with pytest.raises(TypeError, match="skip_self_attn"):
        predict_x0(model, video, audio, skip_self_attn=[1])
