"""Every example runs as it is, on a CPU and without a download, and prints what it says."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import ltxkern

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRINTED = {
    "generate_with_progress.py": r"kite\.mp4: \(9, 64, 128, 3\) at 24 fps, \d+ samples of sound",
    "guidance_policy.py": r"latents of the video \(1, 16, 2, 2, 4\), of the sound \(1, 2, 9, 16\)",
    "sampler_alone.py": r"31 steps; mean 0\.70\d for 0\.7, deviation 0\.19\d for 0\.2",
    "patch_vae.py": r"22 norms fused, largest difference (\d\.\de-0[567]|0\.0e\+00)",
    "device_manager.py": r"both phases were run, and the pristine weights are back",
}


def test_every_example_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTED.keys()
    listed = (EXAMPLES / "README.md").read_text()
    assert [name for name in PRINTED if f"({name})" not in listed] == []


@pytest.mark.parametrize("name", PRINTED)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out)


def test_own_policy_equals_guidance_where_nothing_is_clipped() -> None:
    from ltxkern.pipeline.sampling.guidance import GuidanceRequest, GuidanceScales

    example = runpy.run_path(str(EXAMPLES / "guidance_policy.py"))
    request = GuidanceRequest(GuidanceScales(cfg=3.0), GuidanceScales(cfg=7.0))
    policy = example["ClippedGuidance"].build(request, {}, {})
    near = {"cond": {"video": torch.full((4,), 1.0)}, "neg": {"video": torch.full((4,), 0.9)}}
    near = {branch: {**value, "audio": value["video"]} for branch, value in near.items()}
    combined = policy.combine(near)
    plain = ltxkern.combine_guidance(near["cond"]["video"], near["neg"]["video"], cfg_scale=3.0)
    torch.testing.assert_close(combined["video"], plain)
    torch.testing.assert_close(combined["audio"], near["cond"]["audio"] + example["LIMIT"])
