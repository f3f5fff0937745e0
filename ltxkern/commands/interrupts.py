"""Ctrl-C that is not lost: Python drops an interrupt that arrives within a finalizer or a weak reference's callback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pressed = False


@contextmanager
def heeded() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt as ever, and `check` raises it again where that one was dropped.

    Handlers of others stay, and so does everything outside the main thread.
    """
    global _pressed
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def remember(number: int, frame: FrameType | None) -> None:
        global _pressed
        _pressed = True
        signal.default_int_handler(number, frame)

    _pressed = False
    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _pressed = False


def check() -> None:
    """Raise KeyboardInterrupt where Ctrl-C was pressed and the run goes on all the same."""
    if _pressed:
        raise KeyboardInterrupt
