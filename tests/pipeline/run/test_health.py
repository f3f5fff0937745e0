"""NaN is traced to the LoRA or the component that holds it; where none does, precision is what may help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltxkern.pipeline.files.demo import build_demo, demo_distilled_lora
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.run.health import explained
from ltxkern.pipeline.sampling.finite import NonFiniteError
from tests.commands.typed import run


@pytest.fixture(scope="module")
def components() -> Components:
    return build_demo()


@pytest.mark.parametrize(
    ("breaks", "words", "finite"),
    [
        ([], "transformer, upsampler: all weights are finite, so the values outgrew the dtype: run it in fp32", True),
        (["upsampler"], "; the upsampler holds non-finite weights in final_conv.weight$", False),
        (["lora"], r"; LoRA demo distilled LoRA holds non-finite weights in \S+, \S+, \S+ and \d+ more$", False),
        (["lora", "upsampler"], "LoRA demo distilled LoRA holds", False),
    ],
)
def test_who_holds_it(components: Components, breaks: list[str], words: str, finite: bool) -> None:
    lora = demo_distilled_lora()
    weight = components.upsampler.final_conv.weight  # type: ignore[union-attr]
    before = weight.detach().clone()
    with torch.no_grad():
        if "upsampler" in breaks:
            weight[0, 0] = float("inf")
        for change in lora.factors.values() if "lora" in breaks else ():
            change.b[0, 0] = float("nan")
    try:
        with (
            pytest.raises(NonFiniteError, match=f"stage 2: NaN.*{words}") as caught,
            explained("stage2", components, ["transformer", "upsampler"], [lora]),
        ):
            raise NonFiniteError("stage 2: NaN")
        assert (caught.value.stage, caught.value.finite_weights) == ("stage2", finite)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_stage_in_fp32_where_bf16_overflowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder of sound stands for what outgrows a dtype: the stages before it stay as they are."""
    from ltxkern.pipeline.run import decoding

    whole = decoding.decode_audio

    def overflows(audio_vae: torch.nn.Module, *others: torch.Tensor, **named: object) -> torch.Tensor:
        waveform = whole(audio_vae, *others, **named)  # type: ignore[arg-type]
        is_wide = next(audio_vae.parameters()).dtype == torch.float32
        return waveform if is_wide else waveform * float("nan")

    monkeypatch.setattr(decoding, "decode_audio", overflows)
    work, output = tmp_path / "work", tmp_path / "out.mp4"
    options = ("--dtype", "bf16", "--work-dir", str(work), "-o", str(output))
    assert run(*options) == 2
    said = capsys.readouterr().err
    assert f"what is done is kept: ltxkern resume {work}" in said
    assert "audio decoding: the waveform has" in said
    assert "all weights are finite" in said
    before = (work / "stage2.safetensors").stat().st_mtime_ns
    assert run("--on-nan", "retry-fp32", *options) == 0
    assert "trying again from decode on" in capsys.readouterr().err
    assert output.exists()
    assert (work / "stage2.safetensors").stat().st_mtime_ns == before
    assert run("--on-nan", "hope", *options) == 2
    assert "on-nan must be one of stop, retry-fp32, got 'hope'" in capsys.readouterr().err
