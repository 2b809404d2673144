"""Which training images are labelled: every k-th, a seeded draw, or a seeded draw balanced over the classes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rrn_core.config import labeled_count

ClassSets = Sequence[frozenset[int]]


def labeled_indices(partition: str, images: int, *, by: str, seed: int, class_sets: ClassSets | None = None) -> list[int]:
    """Indices of the labelled images in the ordered training list, ascending.

    Args:
        partition: "1/16" .. "1/2", "full", or "n:92" for a count.
        images: length of the training list.
        by: `every_kth` takes images 0, k, 2k, ... (METHOD.md 0.6), evenly spaced ones for a count; `seeded` and `balanced` draw.
        class_sets: for `balanced`, the classes that occur in each image.

    Draws are nested: what 1/16 takes under a seed, 1/8 takes too.

    Raises:
        ValueError: a count larger than the list, `balanced` without one class set an image, or an unknown `by`.
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
            return sorted(_balanced(count, _shuffled(images, seed), _one_each(class_sets, images)))
    raise ValueError(f'partition_by: expected "every_kth", "seeded" or "balanced", got "{by}"')


def unlabeled_indices(labeled: Sequence[int], images: int) -> list[int]:
    """The other images, ascending; all of them where every image is labelled (a `full` run still mixes and self-trains)."""
    taken = set(labeled)
    return [i for i in range(images) if i not in taken] or list(range(images))


def _every_kth(partition: str, count: int, images: int) -> list[int]:
    if partition.startswith("n:"):
        return [i * images // count for i in range(count)]
    return list(range(0, images, int(partition.removeprefix("1/"))))


def _shuffled(images: int, seed: int) -> list[int]:
    # Random.random() is the one draw whose sequence Python promises to keep; shuffle() and sample() may change.
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(images)]
    return sorted(range(images), key=keys.__getitem__)


def _one_each(class_sets: ClassSets | None, images: int) -> ClassSets:
    if class_sets is None or len(class_sets) != images:
        got = "none" if class_sets is None else str(len(class_sets))
        raise ValueError(f"partition_by balanced: expected the classes of each of the {images} training images, got {got}")
    return class_sets


def _balanced(count: int, order: Sequence[int], class_sets: ClassSets) -> list[int]:
    """Greedy: again and again, the image of the rarest class whose classes are the least seen so far; `order` breaks ties."""
    remaining = dict.fromkeys(order)  # a set that keeps the order
    supply = Counter(c for i in order for c in class_sets[i])
    seen = Counter(dict.fromkeys(supply, 0))
    taken: list[int] = []
    while len(taken) < count:
        image = _next_balanced(remaining, class_sets, seen, supply)
        taken.append(image)
        del remaining[image]
        seen.update(class_sets[image])
        supply.subtract(class_sets[image])
    return taken


def _next_balanced(remaining: dict[int, None], class_sets: ClassSets, seen: Counter[int], supply: Counter[int]) -> int:
    left = [c for c in sorted(supply) if supply[c] > 0]
    if not left:
        return next(iter(remaining))
    rarest = min(left, key=seen.__getitem__)
    candidates = [i for i in remaining if rarest in class_sets[i]]
    return min(candidates, key=lambda i: sum(seen[c] for c in class_sets[i]) / len(class_sets[i]))
