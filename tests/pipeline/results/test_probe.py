"""What an mp4 holds, read back, and what is no video."""

from pathlib import Path

import pytest

from ltxkern.pipeline.results.probe import probe_mp4


def test_probe_refuses_what_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a video"):
        probe_mp4(path)
