"""Dropout that belongs to a row, or to an item."""

from __future__ import annotations

import torch

from torchrec_pt.models.dropout import ItemDropout, RowDropout
from torchrec_pt.rng import RowNoise

NOISE = RowNoise(0, 3, torch.arange(4))
ITEMS = torch.tensor([7, 2, 7, 9, 2])
ONES = torch.ones(5, 64)


def test_an_item_has_one_mask_wherever_it_stands() -> None:
    dropped = ItemDropout(0.5, NOISE, "site", ITEMS)(ONES)
    assert torch.equal(dropped[0], dropped[2])
    assert torch.equal(dropped[1], dropped[4])
    assert len(dropped.unique(dim=0)) == 3
    # Another rank has other rows of the step, and in another order.
    elsewhere = ItemDropout(0.5, RowNoise(0, 3, torch.arange(9, 11)), "site", ITEMS.flip(0))
    assert torch.equal(elsewhere(ONES), dropped.flip(0))


def test_the_next_step_and_the_next_call_have_other_masks() -> None:
    drop = ItemDropout(0.5, NOISE, "site", ITEMS)
    first = drop(ONES)
    assert not torch.equal(first, drop(ONES))
    next_step = ItemDropout(0.5, RowNoise(0, 4, NOISE.rows), "site", ITEMS)
    assert not torch.equal(first, next_step(ONES))


def test_what_is_left_keeps_its_mean() -> None:
    items = torch.arange(4000)
    for p in (0.1, 0.5):
        dropped = ItemDropout(p, NOISE, "site", items)(torch.ones(4000, 16))
        assert abs(float(dropped.mean()) - 1) < 0.02
        assert abs(float((dropped == 0).float().mean()) - p) < 0.01


def test_nothing_is_dropped_without_noise() -> None:
    assert torch.equal(ItemDropout(0.5, None, "site", ITEMS)(ONES), ONES)
    assert torch.equal(RowDropout(0.5, None, "site", ITEMS, ITEMS)(ONES), ONES)
