"""Bytes of a model from configurations and headers: nothing is loaded, published sizes, what LoRA files patch."""

import pytest
import torch

from ltxkern.pipeline.files.demo import DEMO_CONFIGS
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.model.components import BUILDABLE, PRODUCTION_CONFIGS, Components
from ltxkern.pipeline.planning.plan import plan
from ltxkern.pipeline.planning.weights import meta_module, model_sizes
from ltxkern.pipeline.run.request import GenerationRequest

SMALL = GenerationRequest(prompt="a", height=192, width=128, num_frames=17)


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
    whole = model_sizes(FoundModel.of("demo-random"), dtype=torch.float32)
    assert set(made.sizes.nbytes) == set(DEMO_CONFIGS)
    assert all(made.sizes.nbytes[name] == whole.nbytes[name] for name in DEMO_CONFIGS)


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
    some, every = (
        model_sizes(FoundModel.of("demo-random"), loras=[path]).transformer,
        model_sizes(FoundModel.of("demo-random")).transformer,
    )
    assert 0 < some.patched < every.patched
    assert some.total == every.total
    assert some.factors == sum(tensor.nbytes for tensor in tensors.values())
