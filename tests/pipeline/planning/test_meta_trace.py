"""The trace of allocations: storages count once, from their making to their end."""

import torch
from torch import nn

from ltxkern.pipeline.planning.meta_trace import AllocationTrace, peak_bytes, unfolded_bytes
from tests.pipeline.planning.measured import measured_peak


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


def test_unfolded_convolutions_match_what_torch_allocates():
    x, weight = torch.randn(1, 5, 4, 9, 7), torch.randn(6, 5, 3, 3, 3)
    settings = ([1, 1, 1], [1, 1, 1], [1, 1, 1], False, [0, 0, 0], 1)
    output = torch.convolution(x, weight, None, *settings)
    peak = measured_peak(lambda: torch.convolution(x, weight, None, *settings))
    unfolded = unfolded_bytes(output, x, weight, None, *settings)
    assert unfolded in (0, 5 * 27 * 4 * 9 * 7 * 4)
    assert output.nbytes + unfolded <= peak * 1.02


def test_attention_is_counted_without_its_scores():
    q = torch.empty(1, 2, 4096, 8, device="meta")
    peak = peak_bytes(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert peak == q.nbytes + 2 * 4096 * 4
