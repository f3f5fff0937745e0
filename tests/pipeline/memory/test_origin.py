"""Where weights lie after `close`: where they came from, or nowhere if they are not needed any more.

Another place on the same machine stands for the host: "cpu:0" differs from "cpu", so that storages are really copied.
"""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ltxkern.pipeline.files.lora import lora_phases
from ltxkern.pipeline.memory import inplace, origin, stores
from ltxkern.pipeline.memory.host_copy import module_tensors, storages
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.memory.origin import Home
from tests.pipeline.memory.lora_models import assert_weights, random_lora

ELSEWHERE = torch.device("cpu", 0)


def pointers(module):
    return [tensor.data_ptr() for tensor in module_tensors(module)]


@pytest.mark.parametrize("mode", MODES)
def test_weights_whose_home_was_given_up_are_copied_there(model, pristine, mode, tmp_path):
    """With a checkpoint as source, and "inplace" always: nothing is kept on the host while the transformer is away."""
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    with TwoStageDeviceManager(mode) as manager:
        manager.attach(model, pristine=tmp_path)
        manager._home._places = [(tensor, ELSEWHERE) for tensor in module_tensors(model)]
        manager.prepare(*lora_phases([], random_lora("distilled", model, seed=1)))
        # Kept, so that no copy takes their place.
        away = [tensor.data for tensor in module_tensors(model)]
    assert not set(pointers(model)) & {data.data_ptr() for data in away}
    assert_weights(model, pristine)


def test_what_lies_elsewhere_than_on_the_device_is_left_alone(model):
    before = pointers(model)
    places = Home(model)
    places.let_go()
    places._places = [(tensor, ELSEWHERE) for tensor in module_tensors(model)]
    places.restore(torch.device("cuda", 0))
    assert pointers(model) == before


def test_tensors_share_memory_again():
    module = nn.Module()
    base = torch.arange(12.0)
    module.first, module.second = nn.Parameter(base[:8]), nn.Parameter(base[4:])
    places = Home(module)
    places.let_go()
    places._places = [(tensor, ELSEWHERE) for tensor in module_tensors(module)]
    places.restore(torch.device("cpu"))
    assert module.first.data_ptr() != base.data_ptr()
    assert len(storages(module)) == 1
    assert torch.equal(module.second, base[4:])


def test_weights_that_find_no_room_stay(monkeypatch, caplog):
    module = nn.Linear(8, 8, bias=False)
    places = Home(module)
    places.let_go()
    places._places = [(module.weight, ELSEWHERE)]
    before = pointers(module)
    monkeypatch.setattr(origin, "device_available", lambda place: 255)
    places.restore(torch.device("cpu"))
    assert pointers(module) == before
    assert "they take 256 bytes, and 255 bytes are free on cpu:0" in caplog.text
    monkeypatch.setattr(origin, "device_available", lambda place: 256)
    places.restore(torch.device("cpu"))
    assert pointers(module) != before


@pytest.mark.parametrize("settings", [*({"mode": mode} for mode in MODES), {"mode": "original", "offload": True}])
def test_a_transformer_that_is_discarded_is_freed_and_nothing_is_merged_for_it(model, settings, monkeypatch):
    manager = TwoStageDeviceManager(**settings)
    manager.attach(model)
    manager.prepare(*lora_phases([], random_lora("distilled", model, seed=1)))
    model(torch.randn(1, 48).bfloat16())
    for place, name in (
        *((stores, f"merge_phase{end}") for end in ("", "_beside", "_pair")),
        (inplace, "phase_deltas"),
    ):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("merged"))
    manager.close(discard=True)
    assert storages(model) == {}
    assert not model._forward_pre_hooks
    assert manager.budget.used == 0
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 48).bfloat16())


def test_a_pipeline_lets_go_of_the_transformer_that_it_read_itself():
    from ltxkern.pipeline.files.demo import build_demo, demo_distilled_lora
    from ltxkern.pipeline.generator import HQTwoStagePipeline
    from ltxkern.pipeline.model.components import Components

    class Source:
        reads = 0

        def has(self, name):
            return name == "transformer"

        def load(self, name):
            self.reads += 1
            return build_demo(dtype=torch.float32).transformer

        def config(self, name):
            return build_demo(dtype=torch.float32).transformer.config

    source, parts = Source(), vars(build_demo(dtype=torch.float32))
    given = {name: part for name, part in parts.items() if name not in ("transformer", "_source")}
    pipeline = HQTwoStagePipeline(Components(source=source, **given), distilled_lora=demo_distilled_lora())
    size = {"height": 64, "width": 64, "num_frames": 9, "steps": 2, "output_type": "latents"}
    first = pipeline("a cat", **size)
    transformer = pipeline.components.transformer
    pipeline.close()
    assert storages(transformer) == {}
    assert not pipeline.components.is_loaded("transformer")
    second = pipeline("a cat", **size)
    assert source.reads == 2
    assert all(torch.equal(latent, second.latents[name]) for name, latent in first.latents.items())
    pipeline.close()
