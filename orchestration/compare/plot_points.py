"""The cells of a comparison as points in the space of the settings that vary, and the words that stand at every figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from orchestration.compare.comparison import Cell, Comparison, seeds_named
from orchestration.compare.metrics import axis_title
from orchestration.compare.results import TrialResult
from orchestration.formatting import label
from rrn_core.config import PUBLISHED_TRAIN_IMAGES

_LOG_FROM = 10
"""Positive numbers whose largest is so many times the smallest are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class CellPoint:
    """A cell that has a value, with every setting that the comparison varies."""

    label: str
    """By all that varies: `1/8 eps=0.6`."""
    group: str
    settings: Mapping[str, Any]
    cell: Cell

    @property
    def mean(self) -> float:
        return mean(self.cell.values.values())

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return stdev(self.cell.values.values()) if len(self.cell.values) > 1 else None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.cell.results[0].config


@dataclass(frozen=True)
class Line:
    """Spots that differ in nothing but one setting, in its order."""

    label: str
    group: str
    settings: Mapping[str, Any]
    """What they agree in, of all that varies."""
    spots: tuple[CellPoint, ...]


def spots(comparison: Comparison) -> list[CellPoint]:
    """Every cell with a value, in the comparison's order."""
    found = [(group, cell, {**group.settings, **cell.settings}) for group in comparison.groups for cell in group.cells if cell.values]
    names = free([settings for *_, settings in found])
    return [CellPoint(named(settings, names), group.label, settings, cell) for group, cell, settings in found]


def free(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the settings that vary, the partition first, without those that follow from another, as epochs may from the partition."""
    names = sorted(dict.fromkeys(name for each in settings for name in each), key=lambda name: name != "partition")
    kept: list[str] = []
    for name in names:
        if len({key(each.get(name)) for each in settings}) > 1 and not any(_follows(settings, name, other) for other in kept):
            kept.append(name)
    return tuple(kept)


def lines(spots: Sequence[CellPoint], x: str, names: Iterable[str]) -> list[Line]:
    """The spots by all that varies except `x`; within a line by `x`."""
    others = [name for name in names if name != x]
    found: dict[tuple[str, ...], list[CellPoint]] = {}
    for spot in spots:
        found.setdefault(tuple(key(spot.settings.get(name)) for name in others), []).append(spot)
    made = []
    for members in found.values():
        common = {name: members[0].settings.get(name) for name in others}
        ordered = sorted(members, key=lambda spot: position(spot.settings[x], spot.config))
        made.append(Line(named(common, others), members[0].group, common, tuple(ordered)))
    return made


def named(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    """The label of some of the settings; empty for none."""
    chosen = {name: settings[name] for name in names if name in settings}
    return label(chosen) if chosen else ""


def key(value: object) -> str:
    """A value of a setting, so that equal ones are equal and lists can be counted."""
    return json.dumps(value, sort_keys=True, default=str)


def values_of(spots: Sequence[CellPoint], name: str) -> list[Any]:
    """The different values of a setting in the order of an axis."""
    found = {key(spot.settings.get(name)): (spot.settings.get(name), spot.config) for spot in spots}
    if numeric(spots, name) or name == "partition":
        return [value for value, _ in sorted(found.values(), key=lambda pair: position(*pair))]
    return [value for value, _ in found.values()]


def numeric(spots: Iterable[CellPoint], name: str) -> bool:
    """Whether the setting is a number in every cell."""
    return all(isinstance(spot.settings.get(name), int | float) and not isinstance(spot.settings.get(name), bool) for spot in spots)


def logarithmic(values: Sequence[float]) -> bool:
    """Whether the numbers belong on a logarithmic axis."""
    return min(values) > 0 and max(values) >= _LOG_FROM * min(values)


def position(value: Any, config: Mapping[str, Any]) -> float:
    """Where a value stands on its axis: numbers as they are, partitions by their share; 0 for all that has no order."""
    if isinstance(value, str):
        return share(value, config) or 0.0
    return float(value) if isinstance(value, int | float) else 0.0


def share(partition: str, config: Mapping[str, Any]) -> float | None:
    """Labelled share of the training images, in 0..1; None where it is no partition, or of an unknown number of images."""
    if partition == "full":
        return 1.0
    kind, _, number = partition.partition("/" if "/" in partition else ":")
    if not number.isdigit() or kind not in ("1", "n"):
        return None
    if kind == "1":
        return 1 / int(number)
    images = _train_images(config)
    return int(number) / images if images else None


def seeds(results: Iterable[TrialResult]) -> str:
    """`seeds 0, 1, 2`."""
    return seeds_named(sorted({result.seed for result in results}))


def measured(comparison: Comparison) -> str:
    """`mIoU (%) on the validation list of voc after the last epoch`."""
    return f"{axis_title(comparison.metric)} on the {validation_list(comparison.used)} {comparison.rule}"


def validation_list(results: Iterable[TrialResult]) -> str:
    """`validation list of voc`."""
    return f"validation list of {', '.join(dict.fromkeys(str(result.config['dataset']) for result in results))}"


def averaged(comparison: Comparison) -> str:
    """Over which seeds means and spreads are."""
    over = seeds(comparison.used)
    several = any(spot.spread is not None for spot in spots(comparison))
    return f"mean and sample standard deviation over {over}" if several else f"{over}; one run each, so no spread"


def _follows(settings: Sequence[Mapping[str, Any]], name: str, other: str) -> bool:
    """Whether each value of `other` comes with one value of `name`, and not only because it stands but once."""
    pairs = {(key(each.get(other)), key(each.get(name))) for each in settings}
    values = {first for first, _ in pairs}
    return len(pairs) == len(values) and (other == "partition" or len(values) < len(settings))


def _train_images(config: Mapping[str, Any]) -> int | None:
    if found := config.get("split"):
        return int(found["labeled"]) + int(found["unlabeled"])
    return config.get("train_images") if config.get("dataset") == "digits" else PUBLISHED_TRAIN_IMAGES.get(str(config.get("dataset")))
