"""The body of a request: its fields are those of `GenerationRequest`, and what is wrong is said in one sentence."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.service.fields import RefusedError, body_model, read_body
from tests.service.serving import offer

MODEL = body_model({"height": 128})


def test_the_fields_are_those_of_the_request() -> None:
    names = [field.name for field in fields(GenerationRequest) if field.name != "preset"]
    assert list(MODEL.model_fields) == names
    schema = MODEL.model_json_schema()
    assert schema["properties"]["height"]["default"] == 128
    assert schema["properties"]["width"]["default"] == 1920
    assert set(schema["$defs"]["ImageCondition"]["properties"]) == {"frame", "strength", "crf"}
    assert set(schema["$defs"]["GuidanceScales"]["properties"]) >= {"cfg", "stg_blocks"}


def test_what_a_body_says_reaches_the_request() -> None:
    said = {
        "prompt": "a kite",
        "num_frames": 17,
        "images": [{"frame": 8, "strength": 0.5}],
        "video_guidance": {"cfg": 2, "stg_blocks": [1]},
        "audio_guidance": None,
        "distilled_strengths": [0.1, 0.2],
        "stage2_sigmas": [0.9, 0.5, 0],
    }
    found = offer().request(read_body(MODEL, json.dumps(said).encode()), [Path("here/00"), Path("here/01")])
    assert (found.prompt, found.height, found.width, found.num_frames) == ("a kite", 128, 192, 17)
    assert [(str(one.path), one.frame, one.strength) for one in found.images] == [
        ("here/00", 8, 0.5),
        ("here/01", 0, 1.0),
    ]
    assert found.video_guidance is not None
    assert (found.video_guidance.cfg, found.video_guidance.stg_blocks) == (2, (1,))
    # As on the command line, a scale that is not named is the preset's.
    assert found.video_guidance.rescale == found.preset.guidance.video.rescale
    assert (found.audio_guidance, found.distilled_strengths) == (None, (0.1, 0.2))
    assert found.stage2_sigmas == (0.9, 0.5, 0.0)


REFUSED = [
    ("{", 400, "the body is not JSON"),
    ("\xff", 400, "the body is not JSON"),
    ("[" * 100_000, 400, "the body is not JSON"),
    ("[]", 422, "the body: must be an object, got []"),
    ('{"prompt": 5}', 422, "prompt: must be a valid string, got 5"),
    ('{"heigth": 5}', 422, "unknown field 'heigth': did you mean height?"),
    ('{"preset": "hq"}', 422, "unknown field 'preset'"),
    ('{"images": [{"path": "/etc/passwd"}]}', 422, "unknown field 'images.0.path'"),
    ('{"height": "64"}', 422, "height: must be a valid integer, got '64'"),
    ('{"height": true}', 422, "height: must be a valid integer, got True"),
    ('{"height": 1e400}', 422, "height: must be a valid integer"),
    ('{"num_frames": 80000000001}', 422, "num_frames must be at most 8193, got 80000000001: use 8193"),
    (
        '{"steps": 1001, "eta": NaN}',
        422,
        "steps must be at most 1000, got 1001: use 1000; eta: must be a finite number",
    ),
    ('{"video_guidance": {"cfg": 1, "color": 2}}', 422, "unknown field 'video_guidance.color'"),
    (json.dumps({"prompt": "a" * 20_001}), 422, "prompt: String should have at most 20000 characters"),
    (json.dumps({"stage1_sigmas": [0.5] * 1001}), 422, "stage1_sigmas: List should have at most 1000 items"),
]


@pytest.mark.parametrize(("body", "status", "sentence"), REFUSED, ids=[case[0][:30] for case in REFUSED])
def test_what_is_wrong_is_said(body: str, status: int, sentence: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        read_body(MODEL, body.encode("latin-1"))
    assert refusal.value.status == status
    assert str(refusal.value).startswith(sentence)
    assert len(str(refusal.value)) < 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["cfg", "frame", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*MODEL.model_fields, "other"]), VALUES, max_size=5))
def test_any_body_gives_a_request_or_a_sentence(said: dict[str, Any]) -> None:
    with contextlib.suppress(RefusedError, ValueError, TypeError):
        offer().request(read_body(MODEL, json.dumps({"prompt": "a"} | said).encode()), [])
