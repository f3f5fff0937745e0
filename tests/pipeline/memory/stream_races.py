"""Two simulated streams that notice what a GPU would get wrong: accesses without an event between them, memory given away early."""

import contextlib
import weakref
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

STREAMS = ("compute", "side")
# They look at shapes only.
SHAPE_ONLY = ("aten::empty_like", "aten::empty", "aten::new_empty")


@dataclass
class Uses:
    """Of one storage: the stream it was allocated on, its last write and last reads as (stream, number of the operation)."""

    home: str
    write: tuple[str, int] | None = None
    reads: dict[str, int] = field(default_factory=dict)


class SideStream:
    """What simulated clocks share: the name of the current stream, and the block that runs on the side stream."""

    stream = "compute"

    @contextlib.contextmanager
    def side(self):
        before, self.stream = self.stream, "side"
        try:
            yield
        finally:
            self.stream = before


class RaceClock(SideStream, TorchDispatchMode):
    """A `StreamClock` over vector clocks: everything runs at once on the CPU, and `races` tells what was not ordered.

    An operation on a stream is ordered after another stream's only through `mark` there and `wait` here. Storages made
    within the block belong to the allocator of the stream that was current; freeing one gives it to that stream at once.
    Storages in `host` are host memory, which blocking copies fill.
    """

    def __init__(self):
        super().__init__()
        self.time = {stream: dict.fromkeys(STREAMS, 0) for stream in STREAMS}
        self.races = []
        self.host = set()
        self.host_waits = 0
        self._uses = {}

    def mark(self):
        return dict(self.time[self.stream])

    def wait(self, event):
        for stream, number in event.items():
            self.time[self.stream][stream] = max(self.time[self.stream][stream], number)

    def hand_over(self, value):
        for tensor in tree_iter(value):
            if isinstance(tensor, Tensor):
                self._of(tensor.untyped_storage()).home = self.stream

    def note(self, label, nbytes=0):
        pass

    def synchronise(self):
        self.host_waits += 1
        done = self.time["side"]["side"]
        self.time["compute"]["side"] = done

    def _ordered(self, use, stream):
        return use is None or self.time[stream][use[0]] >= use[1]

    def _of(self, storage):
        key = id(storage)
        if key not in self._uses:
            uses = Uses(self.stream)

            def freed(_):
                self._uses.pop(key)
                last = [uses.write, *uses.reads.items()]
                if key not in self.host and not all(self._ordered(use, uses.home) for use in last):
                    self.races.append(f"memory of {uses.home} is given away while it is in use: {uses}")

            uses.reference = weakref.ref(storage, freed)
            self._uses[key] = uses
        return self._uses[key]

    def _access(self, func, tensor, writes):
        storage = tensor.untyped_storage()
        uses = self._of(storage)
        if id(storage) in self.host:
            return
        last = [uses.write, *uses.reads.items()] if writes else [uses.write]
        if not all(self._ordered(use, self.stream) for use in last):
            self.races.append(f"{func} on {self.stream} {'writes' if writes else 'reads'} too early: {uses}")
        number = self.time[self.stream][self.stream]
        if writes:
            uses.write, uses.reads = (self.stream, number), {}
        else:
            uses.reads[self.stream] = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        values = list(zip(schema.arguments, args, strict=False))
        values += [(argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs]
        result = func(*args, **kwargs)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        self.time[self.stream][self.stream] += 1
        known = set()
        for argument, value in values:
            for tensor in tree_iter(value):
                if isinstance(tensor, Tensor):
                    known.add(id(tensor.untyped_storage()))
                    if not is_view and func._schema.name not in SHAPE_ONLY:
                        writes = argument.alias_info is not None and argument.alias_info.is_write
                        self._access(func, tensor, writes)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known:
                self._access(func, tensor, True)
        return result
