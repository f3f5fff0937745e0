"""Transformer and latent upsampler against the official outputs, loaded through the official-name loader."""

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from ltxkern.pipeline.files.checkpoint import load_component
from ltxkern.pipeline.model.inputs import ModalityInput
from ltxkern.pipeline.model.transformer import LTX2Transformer, predict_velocity, predict_velocity_batched
from tests.golden import Golden, open_golden
from tests.official_files import upsampler_section, write_official

COVERS = ("transformer/", "upsampler/")
# 5e-6 was an independent implementation on the processor of the data; elsewhere fp32 exp, cos and sin of angles near
# 1000 differ by an ulp, which gives up to 1.1e-5. The data asks for 3 to 10 times its figure.
TRANSFORMER_TOLERANCE = 3e-5
UPSAMPLER_TOLERANCE = 1.5e-5
GOLDEN = open_golden()
CASES = sorted({key.split("/")[2] for key in GOLDEN.keys("transformer/velocity/")})


@cache
def transformer() -> LTX2Transformer:
    """The golden transformer, through its official names."""
    config = dict(GOLDEN.metadata["meta"]["transformer/config"], caption_proj_before_connector=True)
    weights = {f"model.diffusion_model.{key}": value for key, value in GOLDEN.group("transformer/weights/").items()}
    with TemporaryDirectory() as folder:
        path = write_official(Path(folder) / "dit.safetensors", weights, {"transformer": config})
        return load_component(path, "transformer", dtype=torch.float32)


@cache
def upsampler() -> torch.nn.Module:
    """The golden latent upsampler, through its official names."""
    weights = GOLDEN.group("upsampler/weights/")
    mid, channels = weights["initial_conv.weight"].shape[:2]
    blocks = len({key for key in weights if re.fullmatch(r"res_blocks\.\d+\.conv1\.weight", key)})
    config = upsampler_section(in_channels=channels, mid_channels=mid, num_blocks_per_stage=blocks)
    with TemporaryDirectory() as folder:
        path = write_official(Path(folder) / "upsampler.safetensors", weights, config)
        return load_component(path, "upsampler", dtype=torch.float32)


def branch(golden: Golden, case: str) -> dict:
    """Inputs of a case from its name: sigma after `s`, or `v<sigma>_a<sigma>`; what it leaves out before that."""
    kind, video_sigma, audio_sigma = case, None, None
    if both := re.fullmatch(r"v([\d.]+)_a([\d.]+)", case):
        kind, video_sigma, audio_sigma = "t2v", float(both[1]), float(both[2])
    elif one := re.fullmatch(r"(.+)_s([\d.]+)", case):
        kind, video_sigma, audio_sigma = one[1], float(one[2]), float(one[2])
    assert video_sigma is not None, f"unknown case {case}"
    # The official run held its sigmas in fp32.
    video_sigma, audio_sigma = (torch.tensor(s, dtype=torch.float32).item() for s in (video_sigma, audio_sigma))
    flags: dict = {}
    if kind == "isolated":
        flags = {"disable_a2v_cross_attn": True, "disable_v2a_cross_attn": True}
    elif stg := re.fullmatch(r"stg_(video_only_|audio_only_)?block(\d+)", kind):
        if stg[1] != "audio_only_":
            flags["skip_video_self_attn_blocks"] = (int(stg[2]),)
        if stg[1] != "video_only_":
            flags["skip_audio_self_attn_blocks"] = (int(stg[2]),)
    else:
        assert kind in ("t2v", "i2v"), f"unknown case {case}"
    part = golden.group("transformer/")
    mask = part["i2v_mask"] if kind == "i2v" else None
    video = ModalityInput(part["video_tokens"], video_sigma, mask, part["video_positions"], part["v_ctx_pos"])
    audio = ModalityInput(part["audio_tokens"], audio_sigma, None, part["audio_positions"], part["a_ctx_pos"])
    return {"video": video, "audio": audio, **flags}


def check(golden: Golden, case: str, outputs: tuple) -> None:
    for modality, actual in zip(("video", "audio"), outputs, strict=True):
        expected = golden[f"transformer/velocity/{case}/{modality}"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=TRANSFORMER_TOLERANCE)


def test_all_kinds_of_cases_are_there() -> None:
    for kind in ("t2v_s", "i2v_s", "isolated_s", "stg_block", "stg_video_only_block", "v"):
        assert [case for case in CASES if case.startswith(kind)], f"no transformer case {kind}*"


@pytest.mark.parametrize("case", CASES)
def test_velocity(case: str) -> None:
    arguments = branch(GOLDEN, case)
    check(GOLDEN, case, predict_velocity(transformer(), **arguments))


def test_unmasked_cases_in_one_forward() -> None:
    cases = [case for case in CASES if not case.startswith("i2v")]
    branches = [branch(GOLDEN, case) for case in cases]
    for case, outputs in zip(cases, predict_velocity_batched(transformer(), branches), strict=True):
        check(GOLDEN, case, outputs)


def test_all_ones_mask_is_no_mask() -> None:
    for case in (case for case in CASES if case.startswith("t2v")):
        arguments = branch(GOLDEN, case)
        for modality in ("video", "audio"):
            item = arguments[modality]
            ones = torch.ones(*item.latent.shape[:2], 1)
            arguments[modality] = ModalityInput(item.latent, item.sigma, ones, item.positions, item.context)
        check(GOLDEN, case, predict_velocity(transformer(), **arguments))


@torch.no_grad()
def test_upsampler() -> None:
    x = GOLDEN["upsampler/in"]
    torch.testing.assert_close(upsampler()(x), GOLDEN["upsampler/out_f32"], rtol=0, atol=UPSAMPLER_TOLERANCE)
    exact = upsampler().double()(x.double())
    torch.testing.assert_close(exact, GOLDEN["upsampler/out_f64"], rtol=0, atol=1e-12)
    upsampler().float()


@torch.no_grad()
def test_upsampler_block() -> None:
    actual = upsampler().res_blocks[0](GOLDEN["upsampler/resblock_in"])
    torch.testing.assert_close(actual, GOLDEN["upsampler/resblock0_out_f32"], rtol=0, atol=UPSAMPLER_TOLERANCE)
