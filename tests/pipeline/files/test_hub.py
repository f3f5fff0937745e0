"""Hub ids against a hub of our own: what is asked for, what is downloaded, what is refused before the first byte."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from ltxkern.pipeline.files.checkpoint import CheckpointError, load_components
from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.files.headers import warn_once
from ltxkern.pipeline.files.hub import local_lora, local_path
from tests.official_files import write_diffusers_demo

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves each folder of `root / owner / name` as a repository, and counts the files it hands out."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.sent: list[str] = []
        self.asked: list[str] = []
        self.forbidden: set[str] = set()

    def add(self, repository: str, *names: str) -> None:
        for name in names:
            file = self.root / repository / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode())


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self, body: bool) -> None:
        self.server.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "api" in self.server.forbidden:
            self.send(b"", body, 403)
            return
        if parts[:2] == ["api", "models"]:
            folder = self.server.root / parts[2] / parts[3]
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            names = [str(file.relative_to(folder)) for file in files]
            if "tree" in parts:
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                    for name, file in zip(names, files, strict=True)
                ]
                self.send(json.dumps(entries).encode(), body)
            else:
                about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.send(json.dumps(about).encode(), body)
            return
        name = "/".join(parts[4:])
        if name in self.server.forbidden:
            self.send(b"", body, 403)
            return
        file = self.server.root / parts[0] / parts[1] / name
        if not file.is_file():
            self.send(b"", body, 404)
            return
        content = file.read_bytes()
        if body:
            self.server.sent.append(name)
        self.send(content, body)

    def send(self, content: bytes, body: bool, status: int = 200) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_model_is_loaded_from_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = build_demo()
    write_diffusers_demo(hub.root / "owner/model", demo)
    hub.add("owner/model", "all-in-one.safetensors", "README.md")
    loaded = load_components("owner/model", dtype=torch.float32)
    for name in ("transformer", "vocoder"):
        want, got = getattr(demo, name).state_dict(), getattr(loaded, name).state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key].float(), got[key].float()) for key in want)
    assert "all-in-one.safetensors" not in hub.sent
    before = len(hub.sent)
    offline(monkeypatch)
    assert load_components("owner/model", dtype=torch.float32).vocoder is not None
    assert FoundModel.of("owner/model").transformer_shapes["proj_in.weight"] == (64, 16)
    assert len(hub.sent) == before


def test_several_single_files_are_refused_before_the_first_byte(hub: Hub) -> None:
    hub.add("owner/files", "dev.safetensors", "distilled.safetensors", "README.md")
    with pytest.raises(CheckpointError, match=r"name the one to load, for example owner/files/dev\.safetensors; ") as e:
        local_path("owner/files")
    assert "distilled.safetensors (0.0 GB)" in str(e.value)
    assert hub.sent == []


def test_one_file_of_several(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/files", "dev.safetensors", "loras/distilled.safetensors")
    assert local_path("owner/files/loras/distilled.safetensors").read_bytes() == b"loras/distilled.safetensors"
    assert hub.sent == ["loras/distilled.safetensors"]
    offline(monkeypatch)
    assert local_path("owner/files/loras/distilled.safetensors").is_file()


@pytest.mark.parametrize("files", [("one.safetensors",), ("a-1.safetensors", "a-2.safetensors", "config.json")])
def test_a_repository_that_leaves_no_choice(hub: Hub, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]) -> None:
    hub.add("owner/plain", *files)
    assert sorted(path.name for path in local_path("owner/plain").iterdir()) == sorted(files)
    offline(monkeypatch)
    assert sorted(path.name for path in local_path("owner/plain").iterdir()) == sorted(files)


def test_offline_and_never_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"nobody/no-such-model: no such path here, and the hub did not deliver"
    ) as e:
        load_components("nobody/no-such-model")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("files", "name", "wanted"),
    [
        (["lora.safetensors", "README.md"], "owner/lora", "lora.safetensors"),
        (
            ["adapter_model.safetensors", "adapter_config.json", "old.safetensors"],
            "owner/lora",
            "adapter_model.safetensors",
        ),
        (
            ["a.safetensors", "b/adapter_config.json", "b/c.safetensors"],
            "owner/lora/b/c.safetensors",
            "b/c.safetensors",
        ),
    ],
)
def test_a_lora_by_its_hub_name_with_its_configuration(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, files: list[str], name: str, wanted: str
) -> None:
    hub.add("owner/lora", *files)
    beside = str(Path(wanted).with_name("adapter_config.json"))
    path = local_lora(name)
    assert path.read_bytes() == wanted.encode()
    assert hub.sent == [wanted, *([beside] if beside in files else [])]
    assert path.with_name("adapter_config.json").exists() == (beside in files)
    offline(monkeypatch)
    assert local_lora(name) == path


@pytest.mark.parametrize(
    ("files", "beside"),
    [
        (["l.safetensors", "l.json", "config.yaml", "README.md", "x.yaml"], ["config.yaml", "l.json"]),
        (["s/l_step_0500.safetensors", "s/l_step_0250.safetensors", "s/config.yaml", "config.json"], ["s/config.yaml"]),
        (["l.safetensors", "other.safetensors", "config.json", "adapter_config.json"], ["adapter_config.json"]),
    ],
)  # fmt: skip
def test_configurations_come_with_a_lora(hub: Hub, files: list[str], beside: list[str]) -> None:
    hub.add("owner/lora", *files)
    local_lora(f"owner/lora/{files[0]}")
    assert sorted(hub.sent) == sorted([files[0], *beside])


def test_a_configuration_that_the_hub_withholds_is_no_missing_one(hub: Hub) -> None:
    hub.add("owner/lora", "l.safetensors", "adapter_config.json")
    hub.forbidden.add("adapter_config.json")
    with pytest.raises(CheckpointError, match=r"owner/lora/adapter_config\.json: .* the hub did not deliver it"):
        local_lora("owner/lora/l.safetensors")


def test_what_cannot_be_known_about_a_configuration_is_said(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("owner/lora", "l.safetensors", "m.safetensors")
    local_path("owner/lora/l.safetensors")  # as another tool downloads it
    hub.forbidden.add("api")
    assert local_lora("owner/lora/l.safetensors").is_file()
    assert (
        "owner/lora/l.safetensors: whether a configuration that tells its alpha lies beside it is not known"
        in caplog.text
    )
    hub.forbidden.clear()
    local_lora("owner/lora/l.safetensors")
    caplog.clear()
    offline(monkeypatch)
    assert local_lora("owner/lora/l.safetensors").is_file()
    assert caplog.text == ""


def test_a_lora_that_is_one_of_several_is_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/lora", "a.safetensors", "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"owner/lora: expected one \.safetensors file, found a.*, b.*; name the file"
    ):
        local_lora("owner/lora")
    with pytest.raises(CheckpointError, match=r"expected one \.safetensors file, found none"):
        local_lora(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"")
    assert local_lora(tmp_path) == tmp_path / "mine.safetensors"


@pytest.mark.parametrize("name", ["owner/files", "owner/files/a.safetensors"])
def test_a_download_is_pinned_or_warned_about(hub: Hub, caplog: pytest.LogCaptureFixture, name: str) -> None:
    hub.add("owner/files", "a.safetensors")
    warn_once.cache_clear()
    found = local_path(name)
    assert local_lora(name).samefile(found / "a.safetensors" if found.is_dir() else found)
    said = [record.getMessage() for record in caplog.records if "which may change" in record.getMessage()]
    assert said == [
        f"owner/files: what it has today is taken, which may change: owner/files@{COMMIT} always names these files"
    ]
    caplog.clear()
    pinned = name.replace("owner/files", f"owner/files@{COMMIT}")
    assert local_path(pinned).samefile(found)
    assert local_lora(pinned).read_bytes() == b"a.safetensors"
    assert not caplog.records
    with pytest.raises(CheckpointError, match=r"owner/files@v9/b\.safetensors: no such path here, and the hub did not"):
        local_path("owner/files@v9/b.safetensors")
    assert any("/resolve/v9/b.safetensors" in asked for asked in hub.asked)
