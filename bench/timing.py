"""One call timed over rotated buffers by wall clock, CUDA events or replays of a CUDA graph; its launches and memory; the roofs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import machine
from cases import Call, count_bytes, result_of, tensors_of

MAX_BUFFERS = 4096
DEVICE_ACTIVITIES = ("kernel", "gpu_memcpy", "gpu_memset")
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
GRAPH_BELOW = 100e-6
# Many small launches take this long between events on a stream that waits for the host, and far less on the GPU itself.
CAPTURE_BELOW = 1e-3
MIN_SAMPLES = 5
SLOW_CALL = 0.2
MAX_SAMPLES = 1000


@dataclass(frozen=True)
class Settings:
    """How long to measure: rounds over all providers, and milliseconds of warm-up and measuring in each round."""

    rounds: int = 3
    warmup_ms: float = 25.0
    rep_ms: float = 100.0

    def milliseconds(self, providers: int) -> float:
        """What measuring so many providers takes."""
        return self.rounds * providers * (self.warmup_ms + self.rep_ms)

    def scaled(self, factor: float) -> Settings:
        """The same rounds, shorter."""
        return replace(self, warmup_ms=self.warmup_ms * factor, rep_ms=self.rep_ms * factor)


@dataclass(frozen=True)
class Summary:
    """Order statistics of one provider's samples, in seconds."""

    minimum: float
    p20: float
    median: float
    p80: float
    count: int

    def fields(self) -> dict[str, Any]:
        """The fields of a `Record`, in microseconds."""
        seconds = {"median_us": self.median, "min_us": self.minimum, "p20_us": self.p20, "p80_us": self.p80}
        return {**{name: value * 1e6 for name, value in seconds.items()}, "samples": self.count}


def summarise(samples: Sequence[float]) -> Summary:
    """Order statistics, nearest rank."""
    ordered = sorted(samples)
    last = len(ordered) - 1

    def rank(share: float) -> float:
        return ordered[round(share * last)]

    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Summary(ordered[0], rank(0.2), median, rank(0.8), len(ordered))


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call with everything it queued finished."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


class CallTimer:
    """Times `function(*buffer)`, each call on the next buffer, so that no call finds its data in the last-level cache.

    Within a round results stay alive until their buffer comes round again: then fresh outputs lie in cold memory too.

    Args:
        function: what to time.
        buffers: argument tuples in distinct memory.
        device: where it runs; on a GPU calls under 100 us are timed as replays of a CUDA graph over all buffers, others by a pair
            of events each, gaps between their launches included.
        settings: durations.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        buffers: Sequence[tuple[Any, ...]],
        device: torch.device,
        settings: Settings,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._function = function
        self._buffers = buffers
        self._device = device
        self._settings = settings
        self._clock = clock
        self._next = 0
        self._kept: list[Any] = [None] * len(buffers)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: list[Any] = []
        self.kind = "wall"
        self.note = ""
        self._timed_wall(1)
        self._estimate = self._timed_wall(1)
        if self._estimate < SLOW_CALL:
            self._estimate = min(self._timed_wall(1) for _ in range(2))
        if device.type == "cuda":
            self.kind = "events"
            if self._estimate < SLOW_CALL:
                # The quickest: the first calls may find a host that is not warm yet, and what it adds is not the call's.
                self._estimate = self._events(2 * MIN_SAMPLES)[0]
            if self._may_be_short():
                self._capture()
        self._release()

    def _release(self) -> None:
        """Let go of the results, so that other providers of the case find the memory free."""
        self._kept = [None] * len(self._buffers)

    def _may_be_short(self) -> bool:
        """Whether the GPU may need less than 100 us: it does, or the host needs most of the time to issue the launches."""
        if self._estimate < GRAPH_BELOW or self._estimate >= CAPTURE_BELOW:
            return self._estimate < GRAPH_BELOW
        synchronize(self._device)
        start = self._clock()
        self._step()
        issued = self._clock() - start
        synchronize(self._device)
        return issued > self._estimate / 2

    def _step(self) -> None:
        index = self._next
        self._next = (index + 1) % len(self._buffers)
        self._kept[index] = self._function(*self._buffers[index])

    def _timed_wall(self, calls: int) -> float:
        synchronize(self._device)
        start = self._clock()
        for _ in range(calls):
            self._step()
        synchronize(self._device)
        return (self._clock() - start) / calls

    def _events(self, calls: int, run: Callable[[], None] | None = None) -> list[float]:
        """Seconds of each of so many calls on the device, sorted."""
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in pairs:
            start.record()
            (run or self._step)()
            end.record()
        synchronize(self._device)
        return sorted(start.elapsed_time(end) * 1e-3 for start, end in pairs)

    def _capture(self) -> None:
        """Capture one call per buffer and keep the graph where a call takes under 100 us in it.

        Without a graph (a call that cannot be captured) events stay, and the note says so.
        """
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(current)
        graph, outputs = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.stream(side), no_host_sync():
                for _ in range(2):
                    self._step()
            current.wait_stream(side)
            self._release()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for buffer in self._buffers:
                    outputs.append(self._function(*buffer))
        except RuntimeError as error:
            # A capture that fails leaves its own stream current.
            torch.cuda.set_stream(current)
            synchronize(self._device)
            first = error.__context__ or error
            self.note = f"not capturable, timed with launch overhead: {str(first).splitlines()[0]}"
            return
        self._graph, self._captured = graph, outputs
        graph.replay()
        took = self._graph_replays(2)[0]
        if took < GRAPH_BELOW:
            self.kind, self._estimate = "graph", took
        else:
            self._graph, self._captured = None, []

    def _graph_replays(self, replays: int) -> list[float]:
        assert self._graph is not None
        return [seconds / len(self._buffers) for seconds in self._events(replays, self._graph.replay)]

    def _sample(self, milliseconds: float, least: int) -> list[float]:
        """Calls for about that long; a few at least, and a single one where a call takes very long."""
        if self._estimate >= SLOW_CALL:
            least = 1
        per_sample = self._estimate * (len(self._buffers) if self._graph is not None else 1)
        count = max(least, min(MAX_SAMPLES, int(milliseconds * 1e-3 / max(per_sample, 1e-9))))
        if self._graph is not None:
            return self._graph_replays(count)
        if self._device.type == "cuda":
            return self._events(count)
        return [self._timed_wall(1) for _ in range(count)]

    def call_once(self) -> None:
        """One call on the next buffer, finished when this returns; for clocks outside."""
        self._step()
        synchronize(self._device)

    def sample_round(self, settings: Settings | None = None) -> list[float]:
        """Seconds per call, after a warm-up: the samples of one round."""
        settings = settings or self._settings
        if self._estimate < SLOW_CALL:
            self._sample(settings.warmup_ms, 1)
        samples = self._sample(settings.rep_ms, MIN_SAMPLES)
        self._release()
        return samples

    def sample_rounds(self) -> list[float]:
        """The samples of all rounds, where nothing is to be interleaved."""
        return [sample for _ in range(self._settings.rounds) for sample in self.sample_round()]


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Makes torch raise RuntimeError where an op waits for the GPU: inside a capture the same would spoil the allocator."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def interleave(
    timers: dict[str, CallTimer], rounds: int, at_round: Callable[[], None], settings: Settings | None = None
) -> dict[str, list[float]]:
    """Samples per provider, every provider once in each round, so that drift of the machine meets all alike.

    Args:
        timers: by provider.
        rounds: how often each comes round.
        at_round: called before each round.
        settings: durations instead of the timers' own.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    for index in range(rounds):
        at_round()
        for name in order if index % 2 == 0 else reversed(order):
            samples[name] += timers[name].sample_round(settings)
    return samples


def buffer_count(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of inputs and outputs it takes that a call finds nothing in the last-level cache."""
    wanted = -(-3 * machine.last_level_cache(device) // max(1, bytes_per_call))
    affordable = machine.free_bytes(device) // 4 // max(1, bytes_per_call)
    return max(2, min(wanted, affordable, MAX_BUFFERS))


def count_launches(function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call launches on a GPU; None on a CPU, which launches nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        function(*args)
        torch.cuda.synchronize(device)
    events = seen.profiler.kineto_results.events() if seen.profiler is not None else []
    on_device = [event for event in events if event.device_type() == DeviceType.CUDA]
    if on_device and hasattr(on_device[0], "activity_type"):
        return sum(event.activity_type() in DEVICE_ACTIVITIES for event in on_device)
    return sum(not event.is_user_annotation() for event in on_device)


def peak_extra(call: Call, function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> int:
    """Bytes that one call holds at its peak beyond its outputs."""
    peak, returned = _cuda_peak(function, args, device) if device.type == "cuda" else _cpu_peak(function, args)
    inputs = {tensor.data_ptr() for tensor in tensors_of(args)}
    fresh = [output for output in result_of(call, args, returned) if output.data_ptr() not in inputs]
    return max(0, peak - count_bytes(fresh))


def _cuda_peak(function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> tuple[int, Any]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = function(*args)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, returned


def _cpu_peak(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[int, Any]:
    """From the profiler's log of allocations; what torch's allocator does not see is not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        returned = function(*args)
    events = seen.profiler.kineto_results.events() if seen.profiler is not None else []
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, returned


def copy_roof(device: torch.device, settings: Settings) -> float:
    """Bytes per second of a device copy, reads and writes counted, best of one round's samples."""
    source = torch.empty(COPY_BYTES[device.type] // 2, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    timer = CallTimer(lambda a, b: b.copy_(a), [(source, target)], device, settings)
    return COPY_BYTES[device.type] / min(timer.sample_round())


def gemm_roof(device: torch.device, dtype: torch.dtype, settings: Settings) -> float:
    """FLOP per second of a square matrix product on random data, median of its samples (a matrix product throttles)."""
    size = GEMM_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    timer = CallTimer(torch.mm, [(a, b)], device, settings)
    samples = sorted(timer.sample_rounds())
    return 2 * size**3 / samples[len(samples) // 2]
