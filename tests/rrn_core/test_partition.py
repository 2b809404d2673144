"""Which images are labelled."""

import random
from itertools import pairwise
from statistics import mean

import pytest

from rrn_core.config import labeled_count
from rrn_core.errors import ConfigError
from rrn_core.partition import labeled_indices, unlabeled_indices

SIZES = ("1/16", "1/8", "1/4", "1/2", "full", "n:92")


def class_sets(images: int, seed: int) -> list[frozenset[int]]:
    """Class 0 everywhere; classes 1..9 ever rarer."""
    generator = random.Random(seed)
    return [frozenset({0} | {c for c in range(1, 10) if generator.random() < 0.6 / c}) for _ in range(images)]


def occurrences(indices, sets) -> list[int]:
    return [sum(c in sets[i] for i in indices) for c in range(1, 10)]


@pytest.mark.parametrize("by", ["every_kth", "seeded", "balanced"])
@pytest.mark.parametrize("partition", SIZES)
def test_labeled_and_unlabeled_images_split_the_list(by, partition):
    labeled = labeled_indices(partition, 367, by=by, seed=3, class_sets=class_sets(367, 1))
    unlabeled = unlabeled_indices(labeled, 367)
    assert len(labeled) == labeled_count(partition, 367)
    assert labeled == sorted(set(labeled))
    if partition == "full":
        assert labeled == unlabeled == list(range(367))
    else:
        assert sorted(labeled + unlabeled) == list(range(367))


def test_every_kth_is_the_published_slice_of_the_list():
    assert labeled_indices("1/16", 10582, by="every_kth", seed=0) == list(range(10582))[::16]
    assert len(labeled_indices("1/16", 10582, by="every_kth", seed=0)) == 662


def test_a_count_is_spread_evenly_over_the_list():
    chosen = labeled_indices("n:92", 367, by="every_kth", seed=0)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert chosen[0] == 0
    assert gaps == {3, 4}


def test_a_draw_depends_on_its_seed_and_on_nothing_else():
    state = random.getstate()
    first = labeled_indices("1/8", 64, by="seeded", seed=7)
    assert first == labeled_indices("1/8", 64, by="seeded", seed=7) == [3, 6, 8, 10, 21, 33, 34, 56]
    assert first != labeled_indices("1/8", 64, by="seeded", seed=8)
    assert random.getstate() == state


@pytest.mark.parametrize("by", ["seeded", "balanced"])
def test_a_larger_draw_contains_the_smaller_one(by):
    draws = [set(labeled_indices(p, 512, by=by, seed=5, class_sets=class_sets(512, 2))) for p in ("1/16", "1/8", "1/4", "1/2")]
    assert draws[0] < draws[1] < draws[2] < draws[3]


@pytest.mark.parametrize("seed", range(5))
def test_a_balanced_draw_gives_rare_classes_more_images_than_chance_does(seed):
    sets = class_sets(512, seed)
    balanced = occurrences(labeled_indices("1/16", 512, by="balanced", seed=seed, class_sets=sets), sets)
    drawn = [occurrences(labeled_indices("1/16", 512, by="seeded", seed=s, class_sets=sets), sets) for s in range(20)]
    assert min(balanced) >= 2 * mean(min(counts) for counts in drawn)
    assert max(balanced) - min(balanced) < mean(max(counts) - min(counts) for counts in drawn)


def test_a_balanced_draw_takes_images_without_any_class_last():
    sets = [frozenset[int](), frozenset({1}), frozenset[int](), frozenset({2})]
    assert labeled_indices("1/2", 4, by="balanced", seed=0, class_sets=sets) == [1, 3]
    assert len(labeled_indices("n:3", 4, by="balanced", seed=0, class_sets=sets)) == 3


def test_balancing_without_the_classes_of_every_image_is_refused():
    with pytest.raises(ValueError, match="classes of each of the 8 training images, got none"):
        labeled_indices("1/4", 8, by="balanced", seed=0)
    with pytest.raises(ValueError, match="got 1"):
        labeled_indices("1/4", 8, by="balanced", seed=0, class_sets=[frozenset({1})])


def test_more_labels_than_images_are_refused():
    with pytest.raises(ConfigError, match="asks for 92 labelled images; the training list has 64"):
        labeled_indices("n:92", 64, by="seeded", seed=0)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match='got "alphabetical"'):
        labeled_indices("1/4", 8, by="alphabetical", seed=0)


def test_all_images_are_unlabeled_too_where_a_count_labels_all():
    assert unlabeled_indices(labeled_indices("n:8", 8, by="seeded", seed=0), 8) == list(range(8))
