"""Positions by axis: tokens on a grid, further ones behind them, parts; each has the positions that were asked for."""

import torch

from ltxkern.pipeline.sampling.coordinates import Coordinates


def drawn(*counts: int, seed: int = 0) -> Coordinates:
    generator = torch.Generator().manual_seed(seed)
    return Coordinates.on_grid(*(torch.rand(count, 2, generator=generator) for count in counts))


def test_a_grid_has_every_combination_the_last_axis_fastest() -> None:
    whole = drawn(2, 3, 4)
    positions = whole.positions(2)
    assert positions.shape == (2, 3, 24, 2)
    assert whole.rows.dtype == torch.int32
    for token in range(24):
        place = (token // 12, token // 4 % 3, token % 4)
        wanted = torch.stack([bounds[at] for bounds, at in zip(whole.bounds, place, strict=True)])
        assert torch.equal(positions[1, :, token], wanted)


def test_joined_tokens_stand_behind_with_their_own_positions() -> None:
    first, second, third = drawn(2, 3, 4), drawn(1, 3, 4, seed=1), drawn(1, 2, 1, seed=2)
    joined = first.joined(second).joined(third)
    assert torch.equal(joined.positions(1), torch.cat([part.positions(1) for part in (first, second, third)], dim=2))
    assert [len(bounds) for bounds in joined.bounds] == [4, 8, 9]
    # Rows of an axis are among those of its values.
    ends = torch.tensor([4, 12, 21])[:, None]
    assert bool(((joined.rows[0] < ends) & (joined.rows[0] >= torch.tensor([0, 4, 12])[:, None])).all())


def test_parts_and_the_first_axis() -> None:
    whole = drawn(2, 3, 4).joined(drawn(1, 3, 4, seed=1))
    own = slice(5, 30)
    assert torch.equal(whole.part(own).positions(3), whole.positions(3)[:, :, own])
    assert torch.equal(whole.first_axis().positions(1), whole.positions(1)[:, :1])
