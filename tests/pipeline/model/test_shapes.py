"""Shapes from configurations alone: those of the built modules, of the published files, and of any size hypothesis draws."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxkern.pipeline.files.demo import DEMO_CONFIGS
from ltxkern.pipeline.files.official_names import official_name
from ltxkern.pipeline.model.components import BUILDABLE, PRODUCTION_CONFIGS, build
from ltxkern.pipeline.model.shapes import Shapes, expected_shapes
from tests.processes import python

PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "official_shapes.json").read_text())


def built(component: str, config: dict[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in build(component, config).state_dict().items()}


@pytest.mark.parametrize("component", BUILDABLE)
@pytest.mark.parametrize("configs", [DEMO_CONFIGS, PRODUCTION_CONFIGS], ids=["demo", "published"])
def test_shapes_are_those_of_the_built_module(component: str, configs: dict[str, dict[str, Any]]) -> None:
    assert expected_shapes(component, configs[component]) == built(component, configs[component])


@pytest.mark.parametrize(("component", "start"), [("transformer", "model.diffusion_model."), ("upsampler", "")])
def test_shapes_are_those_of_the_published_files(component: str, start: str) -> None:
    """The data lists one block of the transformer, and counts them all."""
    shapes = expected_shapes(component, PRODUCTION_CONFIGS[component])
    named = {official_name(component, name).removeprefix(start): list(shape) for name, shape in shapes.items()}
    published = PUBLISHED[component]
    assert len(named) == published["tensors"]
    assert sum(math.prod(shape) for shape in named.values()) == published["parameters"]
    assert {name: named[name] for name in published["shapes"]} == published["shapes"]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans())
def test_any_transformer_and_connectors(
    heads: int, layers: int, gated: bool, bias: bool, projection_bias: bool
) -> None:
    changes = {"num_attention_heads": heads, "num_layers": layers, "gated_attn": gated, "ff_bias": bias}
    config = DEMO_CONFIGS["transformer"] | changes | {"audio_in_channels": 24, "cross_attention_dim": 48}
    assert expected_shapes("transformer", config) == built("transformer", config)
    config = DEMO_CONFIGS["connectors"] | {
        "video_gated_attn": gated,
        "proj_bias": projection_bias,
        "video_connector_num_layers": layers,
    }
    assert expected_shapes("connectors", config) == built("connectors", config)


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("audio_vae", {"mid_block_add_attention": True}),
        ("upsampler", {"use_rational_resampler": True, "rational_spatial_scale": 1.5}),
    ],
)
def test_an_unusual_model_is_asked_for_its_shapes(component: str, changes: dict[str, Any]) -> None:
    config = DEMO_CONFIGS[component] | changes
    assert expected_shapes(component, config) == built(component, config) != built(component, DEMO_CONFIGS[component])


def test_a_configuration_that_lacks_something_or_has_the_wrong_kind_is_refused() -> None:
    config = dict(DEMO_CONFIGS["transformer"])
    with pytest.raises(ValueError, match="configuration of the transformer has a value of the wrong kind"):
        expected_shapes("transformer", config | {"num_layers": "two"})
    del config["num_layers"]
    with pytest.raises(ValueError, match="configuration of the transformer lacks 'num_layers'"):
        expected_shapes("transformer", config)


def test_shapes_need_no_model_library() -> None:
    code = (
        "import sys\nfrom ltxkern.pipeline.model.shapes import expected_shapes\n"
        "from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS\n"
        "expected_shapes('transformer', PRODUCTION_CONFIGS['transformer'])\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    python("-c", code)
