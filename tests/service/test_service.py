"""The service with a real worker and the demo model: a video from the request to its bytes, kills, limits, and what is refused."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.results.probe import probe_mp4
from ltxkern.service.store import Store
from tests.service.serving import LONG, SMALL, Client, offer, serving, until


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Any]]:
    with serving(tmp_path_factory.mktemp("served"), queue=2, keep=6, most_bytes=100_000) as found:
        yield found


def folder_of(service: Any, video: str) -> Path:
    return Path(service.supervisor.folder_of(video))


def in_stage_1(client: Client, video: str, done: int = 3) -> bool:
    progress = client("GET", f"/v1/videos/{video}").json["progress"]
    return progress is not None and progress["stage"] == "stage 1" and progress["done"] >= done


def plain_run(path: Path, request: dict[str, Any]) -> bytes:
    """The bytes of the same request run without a service."""
    with HQTwoStagePipeline.from_pretrained("demo-random", device="cpu", dtype=torch.float32) as pipe:
        pipe.generate(offer().request(request, []), output_type="stream").save(path)
    return path.read_bytes()


def test_a_video_from_request_to_bytes(served: tuple[Client, Any], tmp_path: Path) -> None:
    client, service = served
    answer = client("POST", "/v1/videos", SMALL, idempotency_key="one")
    assert answer.status == 202
    video = answer.json["id"]
    assert answer.headers["location"] == f"/v1/videos/{video}"
    assert client("GET", f"/v1/videos/{video}/content").status == 409
    told = list(client.events(video))
    assert told[-1]["status"] == "done"
    assert told[-1]["error"] is None
    assert told[-1]["request"] == SMALL
    seen = [one["progress"] for one in told if one["progress"] is not None]
    assert "stage 1" in {one["stage"] for one in seen}
    assert set(seen[0]) == {"stage", "done", "total", "seconds", "remaining"}
    content = client("GET", f"/v1/videos/{video}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert content.body == plain_run(tmp_path / "plain.mp4", SMALL)
    assert probe_mp4(tmp_path / "plain.mp4").frames == 9
    head = client("HEAD", f"/v1/videos/{video}/content")
    assert (head.status, head.headers["content-length"], head.body) == (200, str(len(content.body)), b"")
    part = client("GET", f"/v1/videos/{video}/content", range="bytes=0-9")
    assert (part.status, part.body) == (206, content.body[:10])
    preview = client("GET", f"/v1/videos/{video}/preview")
    assert Image.open(io.BytesIO(preview.body)).format == "PNG"
    assert not (folder_of(service, video) / "work").exists()
    # The same key again is the same video; with another request it is refused.
    again = client("POST", "/v1/videos", SMALL, idempotency_key="one")
    assert (again.status, again.json["id"]) == (200, video)
    other = client("POST", "/v1/videos", SMALL | {"seed": 3}, idempotency_key="one")
    assert (other.status, other.error) == (422, "Idempotency-Key was used for another request: use a new one")
    assert client("GET", "/v1/videos").json["videos"][0]["id"] == video


def test_pictures_come_as_files(served: tuple[Client, Any]) -> None:
    client, service = served

    def post(picture: bytes, request: bytes = b'{"prompt": "a kite"}', name: str = "../../kite.png") -> Any:
        part = b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
        body = part % (b"request", b"", request)
        body += part % (b"images", b'; filename="%b"' % name.encode(), picture) + b"--b--\r\n"
        return client("POST", "/v1/videos", body, content_type="multipart/form-data; boundary=b")

    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    small = (
        b'{"prompt": "a kite", "height": 64, "width": 128, "num_frames": 9, "steps": 2, "images": [{"strength": 0.7}]}'
    )
    answer = post(buffer.getvalue(), small)
    assert answer.status == 202
    assert sorted(path.name for path in (folder_of(service, answer.json["id"]) / "images").iterdir()) == ["00"]
    assert client.ended(answer.json["id"])["status"] == "done"
    before = set(service.store.names())
    for refusal, sentence in (
        (post(b"no picture"), "image '../../kite.png' is not a picture that can be read"),
        (post(b"GIF89a\xff\xff\xff\xff\x00\x00\x00", name="bomb.gif"), "image 'bomb.gif'"),
        (post(buffer.getvalue(), b'{"prompt": "a", "images": [{}, {}]}'), "images must be sent with their files: 2"),
        (post(buffer.getvalue(), b'{"prompt": "a", "images": [{"frame": 25}]}'), "image "),
    ):
        assert refusal.status == 422
        assert refusal.error.startswith(sentence)
        assert str(service.settings.folder) not in refusal.error
    assert post(b"a" * 200_000).status == 413
    bad = client("POST", "/v1/videos", b"--b\r\nnonsense", content_type="multipart/form-data; boundary=b")
    assert bad.status in (400, 422)
    assert set(service.store.names()) == before
    assert {path.name for path in (service.settings.folder / "jobs").iterdir()} == before


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/videos/../../etc/passwd", 404),
        ("GET", "/v1/videos/%2e%2e/content", 404),
        ("DELETE", "/v1/videos/.", 404),
        ("GET", "/v1/videos/a%00b/content", 404),
        ("GET", "/v1/videos/" + "a" * 5000, 404),
        ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos?limit=0", 422),
        ("GET", "/v1/videos?before=nobody", 404),
        ("GET", "/docs", 404),
    ],
)
def test_paths_that_lead_nowhere(served: tuple[Client, Any], method: str, path: str, status: int) -> None:
    answer = served[0](method, path)
    assert answer.status == status
    assert answer.error


def test_requests_that_are_refused(served: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    client, service = served
    for body, status, sentence in (
        (b"{", 400, "the body is not JSON"),
        ({}, 422, "prompt is missing"),
        (SMALL | {"height": 65}, 422, "height 65 is not a multiple of 64: use 64 or 128"),
        ({"prompt": "a" * 2**20}, 413, "the body must have at most 1048576 bytes"),
    ):
        answer = client("POST", "/v1/videos", body, content_type="application/json")
        assert answer.status == status
        assert answer.error.startswith(sentence)
    assert client("POST", "/v1/videos", b"{}", content_type="text/plain").status == 415
    # The planner says what fits.
    monkeypatch.setattr(service, "_problem", service._check_plan)
    monkeypatch.setattr(service.supervisor, "free", (4 * 10**7, 4 * 10**7))
    answer = client("POST", "/v1/videos", SMALL)
    assert answer.status == 422
    assert "needs" in answer.error
    assert "are free: " in answer.error
    monkeypatch.undo()
    document = client("GET", "/openapi.json").json
    assert "VideoRequest" in document["components"]["schemas"]
    assert set(document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }


def test_the_page_loads_nothing_from_elsewhere(served: tuple[Client, Any]) -> None:
    answer = served[0]("GET", "/")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    text = answer.body.decode()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_a_killed_worker_loses_nothing_and_others_wait_their_turn(served: tuple[Client, Any], tmp_path: Path) -> None:
    client, service = served
    starts = service.supervisor.starts
    video = client.submit(**LONG)
    until(lambda: in_stage_1(client, video))
    os.kill(service.supervisor._process.pid, signal.SIGKILL)
    # The queue takes two that wait, and the killed one waits until it runs again.
    until(lambda: service.supervisor.starts > starts)
    until(lambda: client("GET", f"/v1/videos/{video}").json["status"] == "running")
    os.kill(service.supervisor._process.pid, signal.SIGSTOP)
    waiting = [client.submit(**SMALL, seed=seed) for seed in (1, 2)]
    full = client("POST", "/v1/videos", SMALL)
    assert (full.status, full.error) == (429, "2 videos wait already: try again later")
    assert int(full.headers["retry-after"]) >= 1
    assert client("GET", f"/v1/videos/{waiting[1]}").json["ahead"] == 2
    gone = client("DELETE", f"/v1/videos/{waiting[1]}")
    assert (gone.status, gone.json["status"]) == (200, "cancelled")
    os.kill(service.supervisor._process.pid, signal.SIGCONT)
    assert client.ended(video)["status"] == "done"
    assert client("GET", f"/v1/videos/{video}/content").body == plain_run(tmp_path / "plain.mp4", LONG)
    assert client.ended(waiting[0])["status"] == "done"
    assert service.supervisor.starts == starts + 1
    text = client("GET", "/metrics").body.decode()
    assert f"ltxkern_worker_starts_total {starts + 1}\n" in text
    assert 'ltxkern_http_responses_total{method="POST",status="429"} 1\n' in text


def test_a_worker_that_cannot_be_started_is_tried_again(
    served: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the process that forks workers is killed at that moment."""
    client, service = served
    supervisor = service.supervisor
    with monkeypatch.context() as patched:
        patched.setattr(supervisor._context.Process, "_Popen", staticmethod(_no_fork))
        os.kill(supervisor._process.pid, signal.SIGKILL)
        until(lambda: supervisor._process.pid is None)
    assert client.ended(client.submit(**SMALL, seed=12))["status"] == "done"


def _no_fork(_: object) -> None:
    raise EOFError("unexpected EOF")


def test_what_runs_is_cancelled_and_what_has_ended_is_forgotten(served: tuple[Client, Any]) -> None:
    client, service = served
    video = client.submit(**LONG)
    until(lambda: in_stage_1(client, video, 1))
    deadly = client.submit(**SMALL)
    service.store._all("UPDATE jobs SET lives = 3 WHERE id = ?", deadly)
    assert client("DELETE", f"/v1/videos/{video}").status == 202
    last = client.ended(video)
    assert (last["status"], last["progress"]) == ("cancelled", None)
    assert client("GET", f"/v1/videos/{video}/content").error == "the video is cancelled"
    last = client.ended(deadly)
    assert last["status"] == "failed"
    assert last["error"] == "3 workers in a row died before one step of it was done"
    assert client("GET", f"/v1/videos/{deadly}/content").error == f"the video is failed: {last['error']}"
    assert not (folder_of(service, video) / "work").exists()
    assert client("DELETE", f"/v1/videos/{video}").status == 200
    assert client("GET", f"/v1/videos/{video}").status == 404
    assert not folder_of(service, video).exists()
    assert len(client("GET", "/v1/videos").json["videos"]) <= service.settings.keep


def test_another_server_goes_on_from_what_a_killed_one_left(
    served: tuple[Client, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied while a job is at work: what SIGKILL or a power cut would leave."""
    client, service = served
    video = client.submit(**LONG)
    until(lambda: in_stage_1(client, video, 2))
    os.kill(service.supervisor._process.pid, signal.SIGSTOP)
    left = tmp_path / "left"
    shutil.copytree(service.settings.folder, left)
    (left / "jobs" / "of a request that was not accepted").mkdir()
    os.kill(service.supervisor._process.pid, signal.SIGCONT)
    store = Store(left / "jobs.sqlite")
    assert [job.status for job in store.page(1)] == ["running"]
    store.close()
    steps = [path.name for path in sorted((left / "jobs" / video / "work").glob("steps-stage1-*"))]
    with serving(left) as (again, other):
        told = list(again.events(video))
        assert told[-1]["status"] == "done"
        done = [one["progress"]["done"] for one in told if (one["progress"] or {}).get("stage") == "stage 1"]
        assert 1 not in done, "a step was computed twice"
        assert other.supervisor.starts == 1
        assert not (left / "jobs" / "of a request that was not accepted").exists()
        result = again("GET", f"/v1/videos/{video}/content").body
    assert steps
    assert client.ended(video)["status"] == "done"
    assert client("GET", f"/v1/videos/{video}/content").body == result
