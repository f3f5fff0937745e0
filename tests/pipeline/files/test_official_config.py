"""Published headers give the production model."""

from typing import Any

import pytest

from ltxkern.pipeline.files import official_config
from ltxkern.pipeline.model.components import BUILDABLE, PRODUCTION_CONFIGS, build
from tests.official_files import PRODUCTION_SECTIONS, PRODUCTION_UPSAMPLER


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
