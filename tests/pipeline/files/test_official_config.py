"""Published headers give the production model."""

import copy
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ltxkern.pipeline.files import official_config
from ltxkern.pipeline.files.checkpoint import component_problem, find_model
from ltxkern.pipeline.model.components import BUILDABLE, PRODUCTION_CONFIGS, build
from tests.official_files import DEMO_SECTIONS, PRODUCTION_SECTIONS, PRODUCTION_UPSAMPLER, write_official


def header_config(component: str) -> dict[str, Any]:
    """Arguments of the published component, from the published header."""
    if component == "upsampler":
        return official_config.upsampler_config(PRODUCTION_UPSAMPLER)
    section = PRODUCTION_SECTIONS["transformer" if component == "connectors" else component.replace("video_", "")]
    if component == "connectors":
        return official_config.connectors_config(section, 49 * 3840)
    return getattr(official_config, f"{component}_config")(section)


@pytest.mark.parametrize("component", BUILDABLE)
def test_header_gives_the_production_model(component: str) -> None:
    by_header = build(component, header_config(component)).state_dict()
    by_table = build(component, PRODUCTION_CONFIGS[component]).state_dict()
    assert {k: v.shape for k, v in by_header.items()} == {k: v.shape for k, v in by_table.items()}
    wanted = PRODUCTION_CONFIGS[component]
    got = build(component, header_config(component)).config
    assert {k: list(got[k]) if isinstance(got[k], tuple) else got[k] for k in wanted} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items()
    }


@pytest.mark.parametrize(
    ("component", "entry", "value", "words"),
    [
        ("transformer", "transformer.num_layers", 10**9, "at most 1000 num_layers in its configuration"),
        ("transformer", "transformer.num_layers", "2", "of the transformer has a value of the wrong kind"),
        ("connectors", "transformer.caption_channels", 0, "of the connectors has a value of the wrong kind"),
        ("video_vae", "vae.encoder_blocks", None, "of the video_vae has a value of the wrong kind"),
        ("vocoder", "vocoder.vocoder.upsample_rates", [2, 2], "as many upsample_rates as upsample_kernel_sizes"),
    ],
)
def test_a_header_that_describes_no_model(
    official: dict[str, Path], tmp_path: Path, component: str, entry: str, value: Any, words: str
) -> None:
    """Said early, with the file and the component, and without writing down the layers of a model that cannot be."""
    sections: Any = copy.deepcopy(DEMO_SECTIONS)
    *places, last = entry.split(".")
    inner = sections
    for place in places:
        inner = inner[place]
    inner[last] = value
    path = write_official(tmp_path / "h.safetensors", load_file(official["checkpoint"]), sections)
    problem = component_problem(find_model(path), component)
    assert problem is not None
    assert problem.startswith(f"{path}: ")
    assert words in problem
