"""A GPU of two clocks, the host's and the device's, behind the names of torch.cuda that the timer uses."""

import contextlib
from types import SimpleNamespace

import torch

REPLAY = 5e-6


class FakeGPU:
    """Calls take host time at once and device time in stream order; a capture takes host time and gathers device time."""

    def __init__(self):
        self.host = self.device = 0.0
        self.captured = None
        self.syncs_are_errors = False
        self.stream = "main"
        self.captures = self.replays = 0

    def clock(self):
        return self.host

    def launch(self, host, device):
        """One launch of an op under test."""
        self.host += host
        if self.captured is not None:
            self.captured.append(device)
        else:
            self.device = max(self.device, self.host) + device

    def wait(self):
        """What `.item()` does."""
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.syncs_are_errors:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.synchronize()

    def synchronize(self, device=None):
        assert self.captured is None, "synchronised during a capture"
        self.host = max(self.host, self.device)

    def install(self, monkeypatch):
        """Replace the parts of torch.cuda."""
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.device, gpu.host)

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Stream:
            def __init__(self, device):
                self.name = "side"

            def wait_stream(self, other):
                pass

        class Graph:
            def replay(self):
                gpu.replays += 1
                gpu.host += REPLAY
                gpu.device = max(gpu.device, gpu.host) + sum(self.work)

        @contextlib.contextmanager
        def graph(target, capture_error_mode):
            gpu.captures += 1
            gpu.captured, gpu.stream = [], "capture"
            try:
                yield
            except RuntimeError:
                # As torch: the capture ends in an error of its own and its stream stays current.
                gpu.captured = None
                raise
            target.work, gpu.captured, gpu.stream = gpu.captured, None, "main"

        @contextlib.contextmanager
        def stream(other):
            before, gpu.stream = gpu.stream, other.name
            yield
            gpu.stream = before

        current = SimpleNamespace(name="main", wait_stream=lambda other: None)
        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "stream": stream,
            "current_stream": lambda device: current,
            "set_stream": lambda to: setattr(gpu, "stream", to.name),
            "synchronize": gpu.synchronize,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "syncs_are_errors", mode == "error"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return self
