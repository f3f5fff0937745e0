"""Two simulated streams with a log: what ran when, and who waited for whom."""

from dataclasses import dataclass, field

from tests.pipeline.memory.stream_races import SideStream

BYTES_PER_TIME = 4000.0  # of the copies


@dataclass
class Entry:
    stream: str
    label: str
    start: float
    end: float


@dataclass
class SimulatedClock(SideStream):
    """Two streams, each in order; an operation takes the time of its bytes. The host waits for nothing."""

    log: list[Entry] = field(default_factory=list)
    waits: list[tuple[str, float, float]] = field(default_factory=list)
    busy_until: dict[str, float] = field(default_factory=lambda: {"compute": 0.0, "side": 0.0})
    host_waits: int = 0

    def mark(self):
        return self.busy_until[self.stream]

    def wait(self, event):
        self.waits.append((self.stream, self.busy_until[self.stream], event))
        self.busy_until[self.stream] = max(self.busy_until[self.stream], event)

    def hand_over(self, value):
        pass

    def note(self, label, nbytes=0):
        self.run(label, nbytes / BYTES_PER_TIME)

    def run(self, label, duration):
        start = self.busy_until[self.stream]
        self.busy_until[self.stream] = start + duration
        self.log.append(Entry(self.stream, label, start, start + duration))

    def synchronise(self):
        self.host_waits += 1

    def first(self, label):
        return next(entry for entry in self.log if entry.label == label)
