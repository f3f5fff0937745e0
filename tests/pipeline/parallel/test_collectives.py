"""Collectives of one rank: shapes and what counts as traffic; several ranks run in test_by_branch and test_by_token."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ltxkern.pipeline.parallel.collectives import Collectives, Traffic, checksum
from ltxkern.pipeline.parallel.ranks import RankError


@pytest.mark.usefixtures("alone")
def test_one_rank_gets_its_own_back_and_nothing_travels() -> None:
    own, group = torch.arange(6.0), Collectives()
    assert (group.rank, group.size) == (0, 1)
    assert torch.equal(group.gather(own), own[None])
    (piece,) = group.exchange(own, [6], [6])
    assert torch.equal(piece, own)
    assert group.traffic == Traffic(collectives=2, sent=own.nbytes)


@pytest.mark.usefixtures("alone")
def test_a_broken_collective_is_explained_by_the_ranks() -> None:
    own = torch.ones(3)
    with pytest.raises(RankError, match="the ranks lost each other in a collective: "):
        Collectives().exchange(own, [2], [3])
    ranks: Any = SimpleNamespace(explain=lambda error: "rank 1 is gone")
    with pytest.raises(RankError, match=r"^rank 1 is gone$"):
        Collectives(ranks=ranks).exchange(own, [2], [3])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_sees_a_bit_and_no_order(dtype: torch.dtype) -> None:
    first, second = torch.arange(12).to(dtype).view(3, 4), torch.ones(2, dtype=dtype)
    total = checksum([first, second])
    assert total.dtype == torch.int64
    assert torch.equal(checksum([second, first.t()]), total)
    changed = first.clone()
    changed.view(torch.uint8)[0, 0] ^= 1
    assert not torch.equal(checksum([changed, second]), total)
