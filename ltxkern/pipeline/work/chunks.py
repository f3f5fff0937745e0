"""Decoded frames of one video as they are consumed; those that a writer has taken are kept in the form it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from ltxkern.pipeline.work.kept import KeptWork

_FRAMES, _COUNT = "frames", "count"


class VideoChunks(Iterator[Tensor]):
    """(F, H, W, 3) in [0, 1] each, decoded when asked for, once.

    Args:
        decode: the chunks from one on, by number.
        work: keeps them.
        name: of the video in its run.
    """

    def __init__(self, decode: Callable[[int], Iterator[Tensor]], work: KeptWork, name: str) -> None:
        self._decode = decode
        self._work = work
        self._name = name
        self._rest: Iterator[Tensor] | None = None

    def begin(self) -> None:
        """Decode the first chunk now, unless an earlier process did."""
        if self._work.folder is None or not self._work.folder.names("chunk"):
            rest = self._decode(0)
            self._rest = chain((next(rest),), rest)

    def _from(self, number: int) -> Iterator[Tensor]:
        if number or self._rest is None:
            self._rest = self._decode(number)
        return self._rest

    def __next__(self) -> Tensor:
        try:
            return next(self._rest or self._from(0))
        except StopIteration:
            self._work.done()
            raise

    def written(self, form: str, convert: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """The chunks for a writer that takes them converted as well: what an earlier process decoded is not decoded again.

        Args:
            form: name of the conversion.
            convert: from a chunk to the uint8 tensor of which the writer makes what it makes of the chunk. Without a folder
                chunks go through as they are.
        """
        if self._work.folder is None:
            yield from self
            return
        prefix = f"chunk-{form}-{self._name}"
        done = 0
        while (found := self._work.take(f"{prefix}-{done:05d}")) is not None:
            yield found[_FRAMES].cpu()
            done += 1
        ended = self._work.take(f"{prefix}-end")
        if ended is None or int(ended[_COUNT]) != done:
            for chunk in self._from(done):
                frames = convert(chunk)
                self._work.leave(f"{prefix}-{done:05d}", {_FRAMES: frames})
                yield frames
                done += 1
            self._work.leave(f"{prefix}-end", {_COUNT: torch.tensor(done)})
        self._work.done()
