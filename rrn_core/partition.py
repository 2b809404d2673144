"""Chooses the labelled training images: every k-th, a seeded draw, or a seeded draw balanced over the classes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rrn_core.config import labeled_count
from rrn_core.errors import ConfigError

ClassSets = Sequence[frozenset[int]]
"""The classes that occur in each training image."""


def labeled_indices(partition: str, images: int, *, by: str, seed: int, class_sets: ClassSets | None = None) -> list[int]:
    """Indices of the labelled images in the ordered training list, ascending.

    Args:
        partition: "1/16" .. "1/2", "full", or "n:92" for a count.
        images: length of the training list.
        by: `every_kth` takes images 0, k, 2k, ..., as CPS's published partitions do; for a count, evenly spaced images. `seeded` and
            `balanced` draw at random.
        class_sets: the classes that occur in each image; required for `balanced`.

    Draws are nested: with the same seed, 1/8 contains the images of 1/16.

    Raises:
        ConfigError: a count larger than the list, or an unknown `by`.
        ValueError: `balanced` without exactly one class set for each image, which is the caller's mistake.
    """
    count = labeled_count(partition, images)
    if count == images:
        return list(range(images))
    match by:
        case "every_kth":
            return _every_kth(partition, count, images)
        case "seeded":
            return sorted(_shuffled(images, seed)[:count])
        case "balanced":
            return sorted(_balanced(count, _shuffled(images, seed), _one_for_each(class_sets, images)))
    raise ConfigError(f'partition_by: expected "every_kth", "seeded" or "balanced", got "{by}"')


def unlabeled_indices(labeled: Sequence[int], images: int) -> list[int]:
    """Indices of the other images, ascending. If every image is labelled, all of them: a `full` run still trains on unlabelled batches."""
    chosen = set(labeled)
    return [i for i in range(images) if i not in chosen] or list(range(images))


def _every_kth(partition: str, count: int, images: int) -> list[int]:
    if partition.startswith("n:"):
        return [i * images // count for i in range(count)]
    return list(range(0, images, int(partition.removeprefix("1/"))))


def _shuffled(images: int, seed: int) -> list[int]:
    # Python guarantees the sequence of Random.random() only; those of shuffle() and sample() may change.
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(images)]
    return sorted(range(images), key=keys.__getitem__)


def _one_for_each(class_sets: ClassSets | None, images: int) -> ClassSets:
    if class_sets is None or len(class_sets) != images:
        got = "none" if class_sets is None else str(len(class_sets))
        raise ValueError(f"partition_by balanced: expected the classes of each of the {images} training images, got {got}")
    return class_sets


def _balanced(count: int, order: Sequence[int], class_sets: ClassSets) -> list[int]:
    """Greedy: repeatedly takes the class in the fewest chosen images, and of its images the one whose classes are in the fewest on average.

    `order` breaks ties.
    """
    remaining = dict.fromkeys(order)  # a set that keeps the order
    supply = Counter(c for i in order for c in class_sets[i])
    seen = Counter(dict.fromkeys(supply, 0))
    chosen: list[int] = []
    while len(chosen) < count:
        image = _next_balanced(remaining, class_sets, seen, supply)
        chosen.append(image)
        del remaining[image]
        seen.update(class_sets[image])
        supply.subtract(class_sets[image])
    return chosen


def _next_balanced(remaining: dict[int, None], class_sets: ClassSets, seen: Counter[int], supply: Counter[int]) -> int:
    left = [c for c in sorted(supply) if supply[c] > 0]
    if not left:
        return next(iter(remaining))
    rarest = min(left, key=seen.__getitem__)
    candidates = [i for i in remaining if rarest in class_sets[i]]
    return min(candidates, key=lambda i: sum(seen[c] for c in class_sets[i]) / len(class_sets[i]))
