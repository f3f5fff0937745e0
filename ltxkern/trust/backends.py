"""Which backends an op trusts in this process: by what `ltxkern verify` stored of the devices, else by a probe at first use."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger("ltxkern")


@functools.cache
def probing() -> bool:
    """Whether LTXKERN_SELFCHECK asks for a probe at first use: "first", the default, or "off"; ValueError for what is neither."""
    text = os.environ.get("LTXKERN_SELFCHECK") or "first"
    if text not in ("first", "off"):
        raise ValueError(
            f"LTXKERN_SELFCHECK={text}: expected first (a probe at the first call of each op and backend) or off"
        )
    return text == "first"


_ignoring = False


def ignore() -> None:
    """Trust every backend in this process: for who is to find out what can be trusted."""
    global _ignoring
    _ignoring = True


class Trust:
    """Of one op.

    Args:
        name: of the op.
        backends: its own, by name.
        order: of preference, where no proof has another.

    Attributes:
        serving: backends that serve without a further question.
        refused: those that never serve, with the reason.
        order: of preference.
    """

    def __init__(self, name: str, backends: dict[str, Any], order: Sequence[str]) -> None:
        self._name = name
        self._backends = backends
        self._heeded: set[str] = set()
        self.serving: set[str] = set()
        self.refused: dict[str, str] = {}
        self.order = tuple(order)

    def heed(self, kind: str) -> bool:
        """Read the proofs of the devices of a kind, "cpu" or "cuda": what is wrong is refused, the quickest is first.

        Returns:
            Whether this was the first time, so that choices made before are to be made again.
        """
        if kind in self._heeded:
            return False
        self._heeded.add(kind)
        if _ignoring:
            return True
        # Here and below: an import of the package needs no proofs.
        from ltxkern.trust import proofs

        for backend in self._backends:
            for device, verdict in proofs.verdicts(kind, self._name, backend).items():
                if verdict is not None and not verdict.passed:
                    self.refused[backend] = f"`ltxkern verify` found it wrong on {device}: {verdict.reason}"
        timed = proofs.order(kind, self._name)
        self.order = (*timed, *(backend for backend in self.order if backend not in timed))
        return True

    def admit(self, backend: str, op: Any, args: Any, device: torch.device) -> bool:
        """Whether a backend may serve a call; one that nobody proved is probed first, or during a capture later.

        Args:
            backend: none that was refused.
            op: handed to the probe, with the arguments of the call.
            args: of the call.
            device: of its tensors.
        """
        from ltxkern.trust import proofs

        asked = not _ignoring and backend != "torch" and probing()
        if asked and None in proofs.verdicts(device.type, self._name, backend).values():
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return True
            # By name: the probe's cases are calls of the public functions, rooms above this one.
            probe = importlib.import_module("ltxkern.verify.probe")
            if (reason := probe.mismatch(op, self._backends[backend], args, device)) is not None:
                self.refused[backend] = f"the probe at first use found it wrong on {device}: {reason}"
                logger.warning("ltxkern.%s is not served by %s: %s", self._name, backend, self.refused[backend])
                return False
        self.serving.add(backend)
        return True
