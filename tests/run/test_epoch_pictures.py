"""epoch_pictures.py: the choice of epochs to draw."""

from __future__ import annotations

import pytest

from orchestration.plan.spec import PictureRule
from orchestration.run.epoch_pictures import is_due


def due(epochs: int, **rule) -> list[int]:
    return [epoch for epoch in range(1, epochs + 1) if is_due(epoch, epochs, PictureRule(**rule))]


@pytest.mark.parametrize(
    ("epochs", "drawn"),
    [(1, [1]), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (8, [2, 4, 6, 8]), (32, [7, 14, 21, 28, 32]), (100, [20, 40, 60, 80, 100])],
)
def test_a_run_is_drawn_about_five_times_and_always_at_its_end(epochs, drawn):
    assert due(epochs) == drawn


def test_a_rule_with_an_interval_draws_that_often_and_at_the_end():
    assert due(10, every=4) == [4, 8, 10]
    assert due(10, every=99) == [10]
    assert due(3, every=1) == [1, 2, 3]


def test_no_images_are_no_pictures():
    assert due(10, images=0, every=1) == []
