"""The ranks of one job: how they meet, compare what they were asked for, notice a failure in time, wait and part.

All of it goes through the key-value store of the job (TCP, text only), apart from the collectives that carry tensors.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

LIMIT_S = 30.0
EXIT_FAILED = 2

_MEET_S = 120.0  # a cold import of torch on a busy disk differs by tens of seconds between ranks
_COLLECTIVE_S = 1800.0  # bounds a rank that lives but never answers; the watch finds dead ones long before
_BEAT_S = 1.0
_CAUSE_BEATS = 8
_SHORTEST_S, _LONGEST_S = 0.005, 0.25  # between two looks at the store
_PARTING_S = 5.0
_FAILURE, _ASKED, _DONE = "failure", "asked", "done"


class RankError(RuntimeError):
    """A rank of the job failed, is gone, or was asked for something else; the message names it."""


class BranchError(RankError):
    """A rank's forward failed; every rank raises this at the same point, and all may go on with another run."""


@dataclass(frozen=True)
class Started:
    """What a launcher such as torchrun tells each process: its rank, its place on its machine, the number of ranks."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Started:
        """Read RANK, LOCAL_RANK and WORLD_SIZE; a process that no launcher started is rank 0 of 1.

        Raises:
            ValueError: some are set and others missing, or they do not fit each other.
        """
        found = os.environ if environment is None else environment
        given = {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in found}
        if "WORLD_SIZE" not in given or "RANK" not in given:
            if "RANK" in given or "WORLD_SIZE" in given:
                raise ValueError(f"RANK and WORLD_SIZE must both be set, got {given}: start the ranks with torchrun")
            return cls()
        for name, text in given.items():
            if not text.isdecimal():
                raise ValueError(f"{name} must be a whole number, got {text!r}: start the ranks with torchrun")
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        if not 0 <= rank < size:
            raise ValueError(f"RANK must be between 0 and WORLD_SIZE - 1, got {rank} of {size}")
        return cls(rank, int(given.get("LOCAL_RANK", rank)), size)


class Ranks:
    """The ranks of one job and the store they share; a context manager around all the work of a rank.

    While it is open a thread tells the store once a second that this rank lives, and watches the others. A rank that leaves by an
    exception posts its message; a rank that is killed stops beating. Either way every other rank ends: its main thread is
    interrupted, or the process is ended where that does not help, both within `limit_s`.

    Args:
        store: shared by the ranks, empty under its prefix.
        rank, size: of this process.
        limit_s: seconds within which a failure on one rank ends all of them.
    """

    def __init__(self, store: Any, rank: int, size: int, *, limit_s: float = LIMIT_S) -> None:
        if limit_s < 5:
            raise ValueError(f"limit_s must be at least 5 seconds, got {limit_s}: use 5")
        self.rank, self.size, self.limit_s = rank, size, limit_s
        self._store = store
        self._comparisons = 0
        # A blocking call holds its client: the watch needs one of its own.
        self._watch = _Watch(store.clone(), rank, size, limit_s)

    @classmethod
    def meet(cls, started: Started, *, backend: str, limit_s: float = LIMIT_S) -> Ranks:
        """Join the ranks that a launcher started and open the default process group.

        Args:
            started: from the environment; MASTER_ADDR and MASTER_PORT must be set.
            backend: "gloo" or "nccl".
            limit_s: as in the constructor.
        Raises:
            RankError: the ranks did not all arrive.
        """
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=_MEET_S)))
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"rank {started.rank}: the {started.size} ranks did not meet ({_first_line(error)})"
            ) from error
        return cls.join(store, rank, size, backend=backend, limit_s=limit_s)

    @classmethod
    def join(cls, store: Any, rank: int, size: int, *, backend: str, limit_s: float = LIMIT_S) -> Ranks:
        """`meet` with a store that is there already."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"ltxkern/{attempt}/groups", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=_COLLECTIVE_S),
            )
        except RuntimeError as error:
            raise RankError(f"rank {rank}: the {size} ranks did not meet ({_first_line(error)})") from error
        return cls(dist.PrefixStore(f"ltxkern/{attempt}/job", store), rank, size, limit_s=limit_s)

    def __enter__(self) -> Ranks:
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self._watch.acknowledge()
        except KeyboardInterrupt:  # the watch was quicker by a moment; its failure is what counts
            self._watch.acknowledge()
        if error is not None:
            self._leave_by(error)
        try:
            self._part()
        finally:
            self._watch.stop()

    def _leave_by(self, error: BaseException) -> None:
        """Post why this rank leaves. Raises RankError in place of the interrupt by which the watch ended the main thread."""
        if self._watch.failure is None:
            self.fail(str(error) if isinstance(error, RankError) else f"rank {self.rank}: {_describe(error)}")
        elif isinstance(error, KeyboardInterrupt):
            raise RankError(self._watch.failure) from error

    def _part(self) -> None:
        """Tell the others that this rank has left on purpose; rank 0, which may host the store, lets them read it first."""
        try:
            self._store.set(f"bye/{self.rank}", "1")
            end = time.monotonic() + _PARTING_S
            byes = [f"bye/{rank}" for rank in range(self.size)]
            while self.rank == 0 and not self._store.check(byes) and time.monotonic() < end:
                time.sleep(_SHORTEST_S)
        except dist.DistError as error:
            logger.info("rank %d parts without the others: %s", self.rank, _first_line(error))

    def fail(self, message: str) -> None:
        """Post a failure, unless another rank was first."""
        self._watch.post(message)

    @property
    def reports(self) -> bool:
        """Whether this rank was the first to post the job's failure: it alone prints it."""
        return self._watch.first

    def require_person(self, interrupt: KeyboardInterrupt) -> None:
        """Raise RankError where the watch sent this interrupt because the job failed, and not a person.

        For one that came while the block of `ranks` was being left, too late to be told apart there.
        """
        if self._watch.interrupted and self._watch.failure is not None:
            self._watch.acknowledge()
            raise RankError(self._watch.failure) from interrupt

    def compare(self, facts: Mapping[str, object]) -> None:
        """Make sure that every rank was asked for the same.

        Args:
            facts: name to value; compared as text.
        Raises:
            RankError: on every rank, naming the first rank and fact that differ from rank 0, or a rank that did not arrive.
        """
        mine = {name: str(value) for name, value in facts.items()}
        self._comparisons += 1
        key = f"facts/{self._comparisons}"
        self._store.set(f"{key}/{self.rank}", json.dumps(mine))
        everyone = [json.loads(self.wait(f"{key}/{rank}", rank, self.limit_s * 2 / 3)) for rank in range(self.size)]
        for rank, theirs in enumerate(everyone):
            for name in sorted({*everyone[0], *theirs}):
                ours, other = everyone[0].get(name, "not given"), theirs.get(name, "not given")
                if ours != other:
                    raise RankError(
                        f"rank {rank} was started with other arguments than rank 0: {name} is {other}, on rank 0 it is {ours}"
                    )

    def wait(self, key: str, rank: int, limit_s: float | None = None) -> bytes:
        """The value that `rank` sets under `key`; sleeps meanwhile and asks a few times a second.

        Blocking in the store itself would be deaf to an interrupt, and each of its time limits writes two warnings.

        Raises:
            RankError: the job failed meanwhile, or limit_s passed.
        """
        end = float("inf") if limit_s is None else time.monotonic() + limit_s
        pause = _SHORTEST_S
        try:
            while not self._store.check([key]):
                self.check()
                if time.monotonic() > end:
                    raise RankError(f"rank {rank} did not answer within {limit_s:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_S)
            return bytes(self._store.get(key))
        except dist.DistError as error:
            raise RankError(self.explain(error)) from error

    def check(self) -> None:
        """Raise RankError where a rank has failed."""
        if self._watch.failure is not None:
            raise RankError(self._watch.failure)

    def explain(self, error: BaseException) -> str:
        """Why a collective or the store failed: the message of the rank that caused it, awaited for a moment."""
        found = self._watch.find_cause()
        return found or f"rank {self.rank} cannot reach the other ranks ({_first_line(error)})"

    def finish(self) -> None:
        """Rank 0 says that the results are complete, once every other rank has shown that it is there; they block until it does.

        Raises:
            RankError: on every rank that lives, where a rank failed or is gone, even one that only waited.
        """
        if self.rank != 0:
            self.wait(_ASKED, 0)
            self._store.set(f"there/{self.rank}", "1")
            self.wait(_DONE, 0)
            return
        self.check()
        self._store.set(_ASKED, "1")
        for rank in range(1, self.size):
            self._await_answer(rank)
        self._store.set(_DONE, "1")

    def _await_answer(self, rank: int) -> None:
        """Wait for a rank to show that it is there, as long as it lives: it may still be putting its weights away."""
        while True:
            try:
                self.wait(f"there/{rank}", rank, self.limit_s / 10)
                return
            except RankError as error:
                cause = self._watch.find_cause()
                if cause is not None:
                    raise RankError(f"{cause}; the results of rank 0 are complete") from error


class _Watch(threading.Thread):
    """Says that this rank lives, and looks after the others."""

    def __init__(self, store: Any, rank: int, size: int, limit_s: float) -> None:
        super().__init__(name="ltxkern rank watch", daemon=True)
        self.failure: str | None = None
        self.first = False
        self.interrupted = False
        self._store, self._rank = store, rank
        self._others = [other for other in range(size) if other != rank]
        self._silence_s = limit_s * 2 / 3
        self._grace_s = limit_s / 6
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._ending = threading.Lock()

    def run(self) -> None:
        beat = 0
        while not self._halt.is_set():
            beat += 1
            try:
                with self._lock:
                    self._store.set(f"beat/{self._rank}", str(beat))
                    failure = self._posted() or self._silent(self._silence_s)
            except dist.DistError as error:
                failure = f"rank {self._rank} lost the store of the job: rank 0 or its launcher has ended ({_first_line(error)})"
            if failure is not None:
                self._end(failure)
                return
            self._halt.wait(_BEAT_S)

    def stop(self) -> None:
        """End the thread."""
        self._halt.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    def post(self, message: str) -> None:
        """Make `message` the failure of the job, unless there is one."""
        text = f"{self._rank}\n{message}"
        try:
            with self._lock:
                stored = bytes(self._store.compare_set(_FAILURE, "", text)).decode()
        except dist.DistError:
            stored = text
        self.first = stored == text
        self.failure = stored.split("\n", 1)[1]

    def acknowledge(self) -> None:
        """The main thread is on its way out: no need to interrupt it or to end the process."""
        with self._ending:
            self._halt.set()

    def find_cause(self) -> str | None:
        """A failure that was posted, or else the rank that says nothing through the next seconds.

        The whole window counts: on a busy machine a rank that lives may pause for several beats.
        """
        end = time.monotonic() + min(_CAUSE_BEATS * _BEAT_S, self._silence_s)
        try:
            with self._lock:
                before = self._beats()
            while time.monotonic() < end:
                with self._lock:
                    found = self.failure or self._posted()
                if found is not None:
                    return found
                time.sleep(_BEAT_S / 4)
            with self._lock:
                after = self._beats()
            gone = [other for other, beat in after.items() if beat == before.get(other)]
            if gone:
                return f"rank {gone[0]} is gone: it was killed, or its machine does not answer"
        except dist.DistError as error:
            logger.info("no cause found: %s", _first_line(error))
        return self.failure

    def _beats(self) -> dict[int, bytes]:
        """Last beat of every other rank that has not taken its leave."""
        living = [other for other in self._others if not self._store.check([f"bye/{other}"])]
        return {
            other: bytes(self._store.get(f"beat/{other}")) if self._store.check([f"beat/{other}"]) else b""
            for other in living
        }

    def _posted(self) -> str | None:
        if not self._store.check([_FAILURE]):
            return None
        return bytes(self._store.get(_FAILURE)).decode().split("\n", 1)[1]

    def _silent(self, seconds: float) -> str | None:
        now = time.monotonic()
        for other, beat in self._beats().items():
            last, since = self._seen.get(other, (None, now))
            if beat != last:
                self._seen[other] = (beat, now)
            elif now - since > seconds:
                return f"rank {other} is gone: it was killed, or its machine does not answer (silent for {now - since:.0f} s)"
        return None

    def _end(self, failure: str) -> None:
        self.post(failure)
        # Ranks often fail together: one that leaves by itself need not be interrupted on its way.
        if self._halt.wait(_BEAT_S):
            return
        with self._ending:
            if self._halt.is_set():
                return
            self.interrupted = True
            _thread.interrupt_main()
        if self._halt.wait(self._grace_s):
            return
        # The main thread sits in a call that no exception reaches.
        if self.first:
            # A progress bar may stand on the line.
            sys.stderr.write(f"\nltxkern: error: {self.failure}\n")
            sys.stderr.flush()
        os._exit(EXIT_FAILED)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _describe(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
