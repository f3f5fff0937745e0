"""What a result depends on is told apart: pictures by content, weights by values, files by size and time."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ltxkern import use_backend
from ltxkern.pipeline.files.demo import build_demo, demo_distilled_lora
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.pipeline.sampling.guidance import GuidanceScales
from ltxkern.pipeline.work.facts import changeable, differing, key, model_facts, plain, request_facts, run_facts

REQUEST = GenerationRequest("a kite", seed=[1], distilled_strengths=(0.25, 0.5))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seed": 2}, ["seed"]),
        ({"prompt": ["a kite"]}, ["prompt"]),
        ({"distilled_strengths": (0.25, 1.0)}, ["distilled_strength_stage_2"]),
        ({"video_guidance": GuidanceScales(cfg=2.0)}, ["video_guidance"]),
        ({"stage2_sigmas": torch.tensor([0.5, 0.0])}, ["stage2_sigmas"]),
    ],
)
def test_requests_differ_by_name(changes: dict[str, object], names: list[str]) -> None:
    facts = request_facts(REQUEST)
    assert differing(facts, request_facts(replace(REQUEST, **changes))) == names
    assert key(facts) == key(request_facts(replace(REQUEST)))


def test_pictures_count_by_content(tmp_path: Path) -> None:
    for name, colour in (("a", 9), ("b", 9), ("c", 8)):
        Image.new("L", (8, 8), colour).save(tmp_path / f"{name}.png")
    a, b, c = (request_facts(replace(REQUEST, images=(tmp_path / f"{name}.png",))) for name in "abc")
    assert a == b
    assert differing(a, c) == ["images"]


def test_weights_and_loras_count_by_value() -> None:
    demo, lora = build_demo(), demo_distilled_lora()
    facts = model_facts(demo, [(lora, 0.5)], lora)
    assert facts == model_facts(build_demo(), [(demo_distilled_lora(), 0.5)], demo_distilled_lora())
    with torch.no_grad():
        demo.vocoder.vocoder.conv_out.weight.mul_(2)  # type: ignore[union-attr]
    assert differing(facts, model_facts(demo, [(lora, 0.25)], None)) == ["loras", "distilled_lora", "model vocoder"]
    assert differing(facts, model_facts(demo, [(demo_distilled_lora(1), 0.5)], lora)) == ["loras", "model vocoder"]


class Files:
    """Components from one file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def has(self, name: str) -> bool:
        return name == "transformer"

    def paths(self, name: str) -> list[Path]:
        return [self.file]


def test_files_count_by_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1234")
    components = Components(source=Files(file))  # type: ignore[arg-type]
    before = model_facts(components, [], None)
    assert before["model transformer"][str(file)][0] == 4
    os.utime(file, ns=(1, 1))
    assert differing(before, model_facts(components, [], None)) == ["model transformer"]


def test_the_machine_and_what_a_call_was_given() -> None:
    cpu = torch.device("cpu")
    base = run_facts(REQUEST, cpu, torch.float32, embeddings=[torch.zeros(2)], policy=Files)
    assert base["policy"].endswith("test_facts.Files")
    assert differing(base, run_facts(REQUEST, cpu, torch.bfloat16, embeddings=[torch.ones(2)], policy=Files)) == [
        "embeddings",
        "dtype",
    ]
    with use_backend("torch"):
        forced = run_facts(REQUEST, cpu, torch.float32, embeddings=[torch.zeros(2)], policy=Files)
    assert forced["backends"] == ["torch"]
    assert differing(base | {"backends": ["cpu", "torch"]}, forced) == ["backends"]
    assert plain({"a": (1, Path("x"), None)}) == {"a": [1, "x", None]}


@pytest.mark.parametrize(
    ("name", "latest"),
    [
        ("prompt", "text"),
        ("model text_encoder", "text"),
        ("torch", "text"),
        ("steps", "stage1"),
        ("model transformer", "stage1"),
        ("loras", "stage1"),
        ("seed", "stage2"),
        ("distilled_strength_stage_2", "stage2"),
        ("audio_source", "decode"),
        ("dtype", "decode"),
    ],
)
def test_the_latest_stage_that_a_change_lets_stay(name: str, latest: str) -> None:
    stages = ["text", "stage1", "stage2", "decode"]
    assert [changeable(name, stage) for stage in stages] == [
        stages.index(stage) <= stages.index(latest) for stage in stages
    ]
