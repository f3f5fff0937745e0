"""The plan of a request: against the measured peak, what it refuses and what it advises, without any weight."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from ltxkern.pipeline import generator
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.planning.plan import plan
from ltxkern.pipeline.run.request import PRESETS, GenerationRequest
from tests.pipeline import golden_hq
from tests.pipeline.planning.measured import measured_peak

SMALL = GenerationRequest(prompt="a", height=192, width=128, num_frames=17)
MIB = 1 << 20


@pytest.fixture(scope="module")
def demo_plan():
    return plan("demo", SMALL, dtype=torch.float32, device_free=1 << 30, host_free=1 << 30)


@pytest.mark.parametrize("mode", MODES)
def test_the_peak_is_within_ten_percent_of_the_measured_one(mode, demo_plan):
    def generate():
        pipeline = generator.HQTwoStagePipeline.from_pretrained(
            "demo", device="cpu", dtype=torch.float32, device_mode=mode
        )
        pipeline("a cat", height=192, width=128, num_frames=17, steps=2)

    measured = measured_peak(generate)
    assert demo_plan.peak_bytes(mode) == pytest.approx(measured, rel=0.1)


def test_nothing_is_loaded_for_a_plan(demo_plan):
    made = measured_peak(lambda: plan("demo", replace(SMALL, height=64, width=64, num_frames=9)))
    assert made < sum(demo_plan.sizes.nbytes.values()) / 10


def test_stages_components_and_forwards(demo_plan):
    names = [stage.name for stage in demo_plan.stages]
    assert names == ["text", "stage 1", "upsampling", "stage 2", "audio decoding", "video decoding"]
    assert [stage.forwards for stage in demo_plan.stages] == [0, 93, 0, 7, 0, 0]
    assert demo_plan.forwards == 100
    assert demo_plan.stages[0].components == ("text_encoder", "connectors")


def test_a_one_stage_request_has_no_upsampling():
    request = replace(SMALL, preset=PRESETS["one-stage"], height=64, width=64, num_frames=9)
    names = [stage.name for stage in plan("demo", request).stages]
    assert names == ["text", "stage 1", "audio decoding", "video decoding"]


def test_what_stands_beside_the_transformer_on_a_gpu(demo_plan):
    there = replace(demo_plan, device=torch.device("cuda"))
    weights = demo_plan.needs["resident"].device_bytes
    assert there.beside_transformer == there.peak_bytes("resident") - weights


def test_modes_differ_by_what_they_keep(demo_plan):
    weights = demo_plan.sizes.transformer
    assert demo_plan.needs["resident"].device_bytes - demo_plan.needs["original"].device_bytes == weights.patched
    assert demo_plan.needs["inplace"].host_bytes < demo_plan.needs["original"].host_bytes
    assert demo_plan.needs["snapshot"].host_bytes - demo_plan.needs["original"].host_bytes == weights.patched
    assert demo_plan.chosen_mode == "resident"


def test_a_request_that_fits_passes_and_one_that_does_not_gets_advice(demo_plan):
    demo_plan.check()
    needed = demo_plan.peak_bytes("original")
    tight = replace(demo_plan, device_free=needed - 20 * MIB, host_free=needed - 20 * MIB)
    with pytest.raises(
        ValueError, match=r"needs .* of memory at its peak .video decoding., and .* are free: use "
    ) as error:
        tight.check()
    advice = str(error.value).split(": use ")[1]
    size = advice.split(" or ")[0]
    height, width = map(int, size.split("x"))
    assert height * width < 192 * 128
    fitting = plan("demo", replace(SMALL, height=height, width=width), dtype=torch.float32)
    assert fitting.peak_bytes("original") <= tight.device_free


def test_another_mode_is_advised_where_it_fits(demo_plan):
    free = demo_plan.peak_bytes("resident") - 1000
    tight = replace(demo_plan, mode="resident", device_free=free, host_free=free)
    with pytest.raises(ValueError, match='use device mode "inplace"'):
        tight.check()
    assert replace(tight, mode="auto").chosen_mode == "inplace"


def test_nothing_fits_into_nothing(demo_plan):
    with pytest.raises(ValueError, match="nothing smaller fits, the transformer's weights alone take"):
        replace(demo_plan, device_free=1000, host_free=1000).check()


def test_device_and_host_are_counted_apart_on_a_gpu(demo_plan):
    there = replace(demo_plan, device=torch.device("cuda"), device_free=1 << 34, host_free=1 << 34)
    assert there.peak_bytes("snapshot") < there.peak_bytes("resident")
    assert there.host_bytes("snapshot") > there.host_bytes("inplace")
    full_host = replace(there, mode="snapshot", host_free=there.host_bytes("snapshot") - 1)
    with pytest.raises(ValueError, match="of host memory at its peak"):
        full_host.check()


def test_the_table_names_every_stage_and_mode(demo_plan):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(demo_plan.table())
    text = console.export_text()
    for word in (*MODES, "text", "stage 1", "upsampling", "stage 2", "video decoding", "peak", "host", "fits", "93"):
        assert word in text


def test_an_unknown_mode_and_an_illegal_size_are_refused():
    with pytest.raises(ValueError, match="mode must be one of auto"):
        plan("demo", SMALL, mode="fast")
    with pytest.raises(ValueError, match="height 200 is not a multiple of 64: use 192"):
        plan("demo", replace(SMALL, height=200))


def test_components_that_do_not_say_their_geometry_are_planned_by_the_pipelines() -> None:
    """Its transformer has 8 channels of sound in 2 x 4: no configuration says so without an audio VAE."""
    pipeline = golden_hq.pipeline()
    request = GenerationRequest("a", height=128, width=192, num_frames=17, steps=2)
    found = plan(pipeline.components, request, geometry=pipeline.geometry)
    assert found.sizes.geometry == pipeline.geometry
    assert found.forwards > 0
