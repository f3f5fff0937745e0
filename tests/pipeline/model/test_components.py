"""The production modules have the published sizes, and the set of components knows its names."""

import json

import pytest

from ltxkern.patching.report import give_back
from ltxkern.patching.watch import Part
from ltxkern.pipeline import HQTwoStagePipeline
from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.model.components import COMPONENT_NAMES, FUSED, PRODUCTION_CONFIGS, Components, build
from tests.golden import DATA

OFFICIAL = json.loads((DATA / "official_shapes.json").read_text())


def test_production_sizes() -> None:
    def size(component: str, part: str | None = None) -> int:
        module = build(component, PRODUCTION_CONFIGS[component])
        return sum(p.numel() for p in (getattr(module, part) if part else module).state_dict().values())

    assert size("transformer") == 18_988_838_144 == OFFICIAL["transformer"]["parameters"]
    assert (
        len(build("transformer", PRODUCTION_CONFIGS["transformer"]).state_dict()) == OFFICIAL["transformer"]["tensors"]
    )
    for name, (component, part) in {
        "upsampler": ("upsampler", None),
        "video_decoder": ("video_vae", "decoder"),
        "video_encoder": ("video_vae", "encoder"),
        "audio_decoder": ("audio_vae", "decoder"),
    }.items():
        statistics = sum(
            OFFICIAL[name]["shapes"].get(f"per_channel_statistics.{k}-of-means", [0])[0] for k in ("mean", "std")
        )
        counted = OFFICIAL[name]["parameters"]
        assert size(component, part) in (counted, counted - statistics), name
    vocoder = build("vocoder", PRODUCTION_CONFIGS["vocoder"])
    assert len(vocoder.state_dict()) == OFFICIAL["vocoder"]["tensors"]
    connectors = build("connectors", PRODUCTION_CONFIGS["connectors"])
    assert sum(p.numel() for p in connectors.video_connector.parameters()) == 1_612_546_304
    assert sum(p.numel() for p in connectors.audio_connector.parameters()) == 403_620_096


def test_components_refuse_unknown_names() -> None:
    with pytest.raises(TypeError, match="unet"):
        Components(unet=None)
    with pytest.raises(AttributeError, match="unet"):
        _ = Components().unet  # type: ignore[attr-defined]


def fused_norms(components: Components) -> set[str]:
    modules = {name: getattr(components, name) for name in FUSED}
    return {name for name, module in modules.items() if any(isinstance(part, Part) for part in module.modules())}


@pytest.mark.parametrize(("policy", "fused"), [("rounded", {*FUSED}), ("exact", set())])
def test_the_exact_policy_fuses_no_norm(policy: str, fused: set[str]) -> None:
    # Made here, and loaded when first read.
    for model in ("demo-random", "demo"):
        opened = HQTwoStagePipeline.from_pretrained(model, policy=policy, device="cpu", embedding_cache=False)
        assert fused_norms(opened.components) == fused, model
    parts = build_demo()
    given = {name: getattr(parts, name) for name in COMPONENT_NAMES}
    for name in FUSED:
        give_back(given[name], "for this test")
    assert fused_norms(parts) == set()
    with HQTwoStagePipeline.from_components(**given, policy=policy) as pipeline:
        assert fused_norms(pipeline.components) == fused
    assert fused_norms(parts) == set()
