"""The commands of the demo's model: what they refuse before any work, and which files they write."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ltxkern.pipeline.files.hub import DEMO_FOLDER, DEMO_NAMES
from tools.demo_model import __main__ as training
from tools.demo_model import measure, options
from tools.demo_model.judge import Verdict
from tools.demo_model.runs import Made
from tools.demo_model.training import checkpoint, progress_of

LORA_ANEW = ["--from-files", str(DEMO_FOLDER)]


class TrainedError(Exception):
    pass


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise TrainedError

    monkeypatch.setattr(training, "train", train)
    monkeypatch.chdir(tmp_path)


def begin(*arguments: str) -> None:
    with pytest.raises(TrainedError):
        training.main(arguments)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The last line that a command says when it refuses its arguments."""

    def call(main: Callable[[list[str]], None], *arguments: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(list(arguments))
        return capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--workers 0", "a whole number from 1"),
        ("--workers -1", "a whole number from 1"),
        ("--share -1", "a number above 0"),
        ("--share nan", "a number above 0"),
        ("--share half", "a number above 0"),
        ("--folder file", "a folder"),
        ("--from-files .", "a folder of files as in ltxkern/demo"),
    ],
)
def test_wrong_arguments_are_refused(arguments: str, expected: str, refused: Callable[..., str]) -> None:
    Path("file").touch()
    assert refused(training.main, *arguments.split()).endswith(f"expected {expected}")


def test_a_folder_goes_on_with_what_it_was_begun_with(refused: Callable[..., str]) -> None:
    begin("--folder", "a", "--share", "0.01")
    begin("--folder", "a", "--share", "0.01")
    assert "begun with another --share (" in refused(training.main, "--folder", "a")
    assert "another --share and --workers (" in refused(training.main, "--folder", "a", "--workers", "3")
    assert "another --from-files (" in refused(training.main, "--folder", "a", "--share", "0.01", *LORA_ANEW)
    Path("b").mkdir()
    Path("b/video_vae.pt").touch()
    for arguments in ([], LORA_ANEW):
        assert refused(training.main, "--folder", "b", *arguments).endswith("choose another --folder")
    assert [path.name for path in Path("b").iterdir()] == ["video_vae.pt"]


def test_each_kind_of_training_has_a_folder_of_its_own() -> None:
    begin()
    begin("--share", "0.01")
    begin(*LORA_ANEW)
    begin(*LORA_ANEW, "--share", "1.5")
    lora = Path("build/demo_model_lora")
    folders = {Path("build") / name for name in ("demo_model", "demo_model_rehearsal", "demo_model_lora_rehearsal")}
    assert set(Path("build").iterdir()) == {lora, *folders}
    assert progress_of(lora, "video_vae") > 0
    assert not checkpoint(Path("build/demo_model"), "video_vae").exists()


def made(fit: float, count: int) -> list[Made]:
    return [Made(Verdict(True, True, True, True, True, True), 5.0, fit, 1.0, None)] * count


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A folder of files whose videos are not made."""
    place = tmp_path / "files"
    place.mkdir()
    for name in DEMO_NAMES[:3]:
        (place / name).write_text(name)
    for command in (measure, options):
        monkeypatch.setattr(command, "workers", nullcontext)
        monkeypatch.setattr(
            command, "run", lambda setting, files, chosen, *_: made(0.8 - bool(setting.fault), len(chosen))
        )
    monkeypatch.setattr(options, "likeness", lambda *_: None)
    return str(place)


@pytest.mark.parametrize(
    ("command", "name", "row"),
    [(measure, "measured.json", measure.ONE), (options, "options.json", options.REFERENCE)],
    ids=["measure", "options"],
)
def test_figures_come_beside_the_files_only_when_asked(command: Any, name: str, row: str, files: str) -> None:
    arguments = ["--files", files, "--only", row, "--prompts", "4"]
    command.main(arguments)
    assert row in json.loads(Path("build/demo_model", name).read_text())["rows"]
    assert not Path(files, name).exists()
    command.main([*arguments, "--keep"])
    assert Path(files, name).read_text() == Path("build/demo_model", name).read_text()


def test_an_option_is_compared_with_videos_that_are_there(files: str, refused: Callable[..., str]) -> None:
    """Rows beside the files do not say that the videos of these files are in build/."""
    option = ["--files", files, "--only", "--eta 0", "--prompts", "4"]
    reference = ["--files", files, "--only", options.REFERENCE, "--prompts", "4", "--keep"]
    assert refused(options.main, *option).endswith("add --only 'defaults, fp32'")
    options.main(reference)
    options.main(option)
    Path("build/demo_model/options.json").unlink()
    assert refused(options.main, *option, "--keep").endswith("add --only 'defaults, fp32'")


def test_a_fault_is_measured_beside_as_many_videos_without_it(files: str, refused: Callable[..., str]) -> None:
    fault = ["--files", files, "--only", "guidance sign"]
    assert refused(measure.main, *fault).endswith("add --only 'one shape'")
    measure.main([*fault, "--only", measure.ONE, "--prompts", "4"])
    assert json.loads(Path("build/demo_model/measured.json").read_text())["rows"]["guidance sign"]["worse"] == 100
    measure.main([*fault, "--prompts", "4"])
    assert "of 3 prompts" in refused(measure.main, *fault, "--prompts", "3")
    with pytest.raises(ValueError, match="argument 2 is longer"):
        measure.told(made(0.8, 2), {"fits": [80.0, 80.0, 80.0]})
