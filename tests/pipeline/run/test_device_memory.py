"""A device that runs out of memory in any stage gets room made for it, and the result is that of a run that had enough."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ltxkern.pipeline.files.lora import NO_LORA
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.model.tiling import VideoTiling
from ltxkern.pipeline.result import HQOutput
from ltxkern.pipeline.run.decoding import decode
from ltxkern.pipeline.run.device_memory import with_room
from ltxkern.pipeline.run.request import GenerationRequest
from tests.pipeline.demo_runs import SMALL, latents, make, same

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 80 GiB"


REQUEST = GenerationRequest("a kite", **SMALL)


@pytest.fixture(scope="module")
def whole(pipeline: HQTwoStagePipeline) -> HQOutput:
    return pipeline.generate(REQUEST)


@contextlib.contextmanager
def full(module: Any, is_full: Callable[[], bool]) -> Iterator[None]:
    """A module that runs out of memory whenever it is asked to compute and the device counts as full."""

    def hook(*_: Any) -> None:
        if is_full():
            raise torch.OutOfMemoryError(FULL)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("stage", "last"), [("stage 1", "original"), ("stage 2", "inplace")])
def test_a_stage_goes_on_in_the_mode_that_fits(
    whole: HQOutput, caplog: pytest.LogCaptureFixture, last: str, stage: str, tmp_path: Path
) -> None:
    tried: list[str | None] = []
    told: list[tuple[str, int]] = []
    with make(device_mode="resident") as pipe:

        def is_full() -> bool:
            reached = (stage, 1) in told
            if reached and MODES.index(str(pipe.manager.mode)) < MODES.index(last):
                tried.append(pipe.manager.mode)
                return True
            return False

        changes: dict[str, Any] = {"callback": lambda name, done, *_: told.append((name, done)), "work_dir": tmp_path}
        with full(pipe.components.transformer, is_full):
            found = latents(pipe, **changes)
        assert same(found, whole.latents)
        assert pipe.manager.mode == last
    assert tried
    said = [r.getMessage() for r in caplog.records if "ran out of memory" in r.getMessage()]
    assert said[-1] == (
        f"{stage}: the device ran out of memory: going on in device mode {last} instead of {tried[-1]} "
        "(CUDA out of memory. Tried to allocate 2.00 GiB.)"
    )
    assert len(said) == len(tried)
    # What was kept is not computed again.
    assert told.count((stage, 1)) == 1


def test_nothing_left_to_take_off(whole: HQOutput) -> None:
    """It ends with a sentence; the pipeline serves the next request."""
    with make() as pipe:
        with (
            full(pipe.components.transformer, lambda: True),
            pytest.raises(
                torch.OutOfMemoryError, match=r"stage 1: the device ran out of memory, and .*smaller or shorter"
            ),
        ):
            latents(pipe)
        assert same(latents(pipe), whole.latents)


def test_weights_that_do_not_fit_when_they_are_merged(whole: HQOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltxkern.pipeline.memory.stores import ResidentStore

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(ResidentStore, "prepare", no_room)
    with make(device_mode="resident") as pipe:
        assert same(latents(pipe), whole.latents)
        assert pipe.manager.mode == "inplace"


@pytest.mark.parametrize("name", ["connectors", "upsampler", "video_vae.decoder", "vocoder"])
def test_other_components_get_the_device_for_themselves(
    whole: HQOutput, caplog: pytest.LogCaptureFixture, name: str, pipeline: HQTwoStagePipeline
) -> None:
    pipeline.attach(REQUEST, [NO_LORA])
    module: Any = pipeline.components
    for part in name.split("."):
        module = getattr(module, part)
    with full(module, lambda: pipeline.manager.is_attached):
        found = pipeline.generate(REQUEST)
    assert torch.equal(found.video, whole.video)
    assert torch.equal(found.audio, whole.audio)
    assert "everything else was taken off it" in caplog.text


def test_a_decoder_that_has_no_room_gets_smaller_tiles(
    caplog: pytest.LogCaptureFixture, pipeline: HQTwoStagePipeline
) -> None:
    """In the middle of a video too: the chunks that are out stay, and the rest joins them."""
    draw = torch.Generator().manual_seed(3)
    drawn = {"video": torch.randn(1, 16, 9, 4, 6, generator=draw), "audio": torch.randn(1, 2, 9, 16, generator=draw)}
    tiling = VideoTiling(128, 192, frames=48)

    def decoded() -> torch.Tensor:
        videos, _ = decode(pipeline.components, pipeline.manager, drawn, tiling, None, streamed=False)
        return videos[0]

    expected = decoded()
    tiles: list[int] = []

    def small(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        tiles.append(given[0].shape[4])
        if len(tiles) > 1 and tiles[-1] > 4:
            raise torch.OutOfMemoryError(FULL)

    handle = pipeline.components.video_vae.decoder.register_forward_pre_hook(small)
    try:
        pipeline.detach()
        found = decoded()
    finally:
        handle.remove()
    assert "tiles of 128x128 from here on" in caplog.text
    assert tiles[:3] == [6, 6, 4]
    assert found.shape == expected.shape
    assert torch.equal(found[:16], expected[:16])
    assert (found - expected).abs().mean() < 0.05


def test_what_a_failed_try_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> bool:
        if held:
            return held[0]() is None
        big = torch.zeros(1)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError(FULL)

    assert with_room("work", work, lambda: "a thing was freed")
