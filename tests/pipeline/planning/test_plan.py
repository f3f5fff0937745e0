"""The plan of a request: against the measured peak, what it refuses and what it advises, without any weight."""

import gc
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from ltxkern.pipeline import generator
from ltxkern.pipeline.files.demo import DEMO_CONFIGS
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.model.components import BUILDABLE, PRODUCTION_CONFIGS, Components
from ltxkern.pipeline.planning.meta_trace import peak_bytes, unfolded_bytes
from ltxkern.pipeline.planning.plan import plan
from ltxkern.pipeline.planning.weights import meta_module, model_sizes
from ltxkern.pipeline.run.request import PRESETS, GenerationRequest

SMALL = GenerationRequest(prompt="a", height=192, width=128, num_frames=17)
MIB = 1 << 20


@pytest.fixture(scope="module")
def demo_plan():
    return plan("demo", SMALL, dtype=torch.float32, device_free=1 << 30, host_free=1 << 30)


def measured_peak(work):
    """Peak bytes of torch's CPU allocator during `work`, kernels' own temporaries included."""
    # What earlier tests left would be freed in between and counted as negative.
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


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


def test_components_that_are_not_loaded_are_counted_without_loading():
    class Source:
        def has(self, name):
            return name in DEMO_CONFIGS or name == "text_encoder"

        def config(self, name):
            return DEMO_CONFIGS[name]

        def load(self, name):
            raise AssertionError(f"{name} was loaded")

    transformer = meta_module("transformer", DEMO_CONFIGS["transformer"], torch.float32)
    made = plan(Components(source=Source(), transformer=transformer), SMALL, dtype=torch.float32)
    whole = model_sizes("demo", dtype=torch.float32)
    assert set(made.sizes.nbytes) == set(DEMO_CONFIGS)
    assert all(made.sizes.nbytes[name] == whole.nbytes[name] for name in DEMO_CONFIGS)


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


@pytest.mark.parametrize("name", BUILDABLE)
def test_meta_modules_have_the_published_sizes(name):
    """Spec: transformer 18.99 B parameters, connectors 5.9 GiB, video VAE 1.35, upsampler 0.93, vocoder 0.5 GiB in fp32."""
    if name in ("transformer", "audio_vae"):
        module = meta_module(name, DEMO_CONFIGS[name], torch.bfloat16)
        assert all(tensor.device.type == "meta" for tensor in module.parameters())
        return
    module = meta_module(name, PRODUCTION_CONFIGS[name], torch.bfloat16)
    gib = sum(p.nbytes for p in module.parameters()) / 2**30
    assert gib == pytest.approx(
        {"connectors": 5.9, "video_vae": 1.35, "upsampler": 0.93, "vocoder": 0.5}[name], rel=0.05
    )


def test_lora_files_decide_what_is_patched(tmp_path):
    from safetensors.torch import save_file

    from ltxkern.pipeline.files.demo import demo_lora

    path = tmp_path / "lora.safetensors"
    tensors = {key: tensor for key, tensor in demo_lora().items() if ".transformer_blocks.0." in key}
    save_file(tensors, str(path))
    some, every = model_sizes("demo", loras=[path]).transformer, model_sizes("demo").transformer
    assert 0 < some.patched < every.patched
    assert some.total == every.total
    assert some.factors == sum(tensor.nbytes for tensor in tensors.values())


def test_unfolded_convolutions_match_what_torch_allocates():
    x, weight = torch.randn(1, 5, 4, 9, 7), torch.randn(6, 5, 3, 3, 3)
    settings = ([1, 1, 1], [1, 1, 1], [1, 1, 1], False, [0, 0, 0], 1)
    output = torch.convolution(x, weight, None, *settings)
    peak = measured_peak(lambda: torch.convolution(x, weight, None, *settings))
    unfolded = unfolded_bytes(output, x, weight, None, *settings)
    assert unfolded in (0, 5 * 27 * 4 * 9 * 7 * 4)
    assert output.nbytes + unfolded <= peak * 1.02


def test_attention_is_counted_without_its_scores():
    q = torch.empty(1, 2, 4096, 8, device="meta")
    peak = peak_bytes(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert peak == q.nbytes + 2 * 4096 * 4
