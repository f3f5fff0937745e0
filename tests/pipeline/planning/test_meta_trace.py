"""The trace of allocations: storages count once, from their making to their end."""

import torch

from ltxkern.pipeline.planning.meta_trace import AllocationTrace


def test_the_trace_counts_live_storages_once():
    with AllocationTrace() as trace:
        first = torch.zeros(100)
        view = first[10:]
        assert trace.live == 400
        second = torch.ones(50) + 1
        assert trace.live == 600
        del first
        assert trace.live == 600
        del view, second
        assert trace.live == 0
    assert trace.peak >= 600
