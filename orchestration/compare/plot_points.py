"""The cells of a comparison as points in the space of the settings that vary, and the words that figures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from orchestration.compare.comparison import Cell, Comparison, named, parted, seeds_named
from orchestration.compare.metrics import axis_title
from orchestration.compare.results import TrialResult, setting_keys, value_key
from rrn_core.config import PUBLISHED_TRAIN_IMAGES

_LOG_FROM = 10
"""An axis of positive numbers is logarithmic from this ratio of the largest to the smallest."""


@dataclass(frozen=True)
class CellPoint:
    """A cell that has a value, with every setting that the comparison varies."""

    label: str
    """By all that varies: `1/8 eps=0.6`."""
    group: str
    settings: Mapping[str, Any]
    """A setting that the cell's method does not have is absent."""
    cell: Cell

    @property
    def mean(self) -> float:
        return mean(self.cell.values.values())

    @property
    def config(self) -> Mapping[str, Any]:
        return self.cell.results[0].config


@dataclass(frozen=True)
class PlotLine:
    """Points that differ in one setting only, in its order."""

    label: str
    group: str
    settings: Mapping[str, Any]
    """What the points have in common, of all that varies."""
    points: tuple[CellPoint, ...]


def cell_points(comparison: Comparison) -> list[CellPoint]:
    """Every cell with a value, in the comparison's order."""
    found = [(cell, {**group.settings, **cell.settings}) for group in comparison.groups for cell in group.cells if cell.values]
    names = free([settings for _, settings in found])
    return [CellPoint(named(settings, names), cell.group, settings, cell) for cell, settings in found]


def free(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the settings that have several values, the partition first.

    Settings that follow from another are left out, as epochs may follow from the partition.
    """
    names = sorted(dict.fromkeys(name for each in settings for name in each), key=lambda name: name != "partition")
    kept: list[str] = []
    for name in names:
        having = [each for each in settings if name in each]
        if len({value_key(each[name]) for each in having}) > 1 and not any(_follows(having, name, other) for other in kept):
            kept.append(name)
    return tuple(kept)


def lines(points: Iterable[CellPoint], x: str, names: Iterable[str]) -> list[PlotLine]:
    """The points, which all have the setting `x`, by all that varies except `x`; within a line in the order of `x`."""
    others = [name for name in names if name != x]
    made = []
    for members in parted(points, lambda point: setting_keys(point.settings, others)):
        common = {name: members[0].settings[name] for name in others if name in members[0].settings}
        ordered = sorted(members, key=lambda point: position(point.settings[x], point.config))
        made.append(PlotLine(named(common, others), members[0].group, common, tuple(ordered)))
    return made


def values_of(points: Sequence[CellPoint], name: str) -> list[Any]:
    """The different values of a setting in the order of an axis."""
    found = {value_key(point.settings[name]): (point.settings[name], point.config) for point in points if name in point.settings}
    if numeric(points, name) or name == "partition":
        return [value for value, _ in sorted(found.values(), key=lambda pair: position(*pair))]
    return [value for value, _ in found.values()]


def numeric(points: Iterable[CellPoint], name: str) -> bool:
    """Whether the setting is a number in every cell that has it."""
    values = [point.settings[name] for point in points if name in point.settings]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def logarithmic(values: Sequence[float]) -> bool:
    """Whether the numbers belong on a logarithmic axis."""
    return min(values) > 0 and max(values) >= _LOG_FROM * min(values)


def position(value: Any, config: Mapping[str, Any]) -> float:
    """Place of a value on its axis: a number itself, the share of a partition; 0 for values without an order."""
    if isinstance(value, str):
        return share(value, config) or 0.0
    return float(value) if isinstance(value, int | float) else 0.0


def share(partition: str, config: Mapping[str, Any]) -> float | None:
    """Labelled share of the training images, in 0..1; None for no partition, or for an unknown number of images."""
    if partition == "full":
        return 1.0
    kind, _, number = partition.partition("/" if "/" in partition else ":")
    if not number.isdigit() or kind not in ("1", "n"):
        return None
    if kind == "1":
        return 1 / int(number)
    images = _train_images(config)
    return int(number) / images if images else None


def measured(comparison: Comparison) -> str:
    """`mIoU (%) on the validation list of voc after the last epoch`."""
    return f"{axis_title(comparison.metric)} on the {validation_list(comparison.used)} {comparison.rule}"


def validation_list(results: Iterable[TrialResult]) -> str:
    """`validation list of voc`."""
    return f"validation list of {', '.join(dict.fromkeys(str(result.config['dataset']) for result in results))}"


def averaged(comparison: Comparison) -> str:
    """The seeds that means and standard deviations are over."""
    over = seeds_named(result.seed for result in comparison.used)
    several = any(cell.sd is not None for cell in comparison.cells)
    return f"mean and sample standard deviation over {over}" if several else f"{over}; one run each, so no spread"


def _follows(settings: Sequence[Mapping[str, Any]], name: str, other: str) -> bool:
    """Whether the value of `other` determines that of `name`, and some value of `other` occurs more than once."""
    if not all(other in each for each in settings):
        return False
    pairs = {(value_key(each[other]), value_key(each[name])) for each in settings}
    values = {first for first, _ in pairs}
    return len(pairs) == len(values) and (other == "partition" or len(values) < len(settings))


def _train_images(config: Mapping[str, Any]) -> int | None:
    if found := config.get("split"):
        return int(found["labeled"]) + int(found["unlabeled"])
    return config.get("train_images") if config.get("dataset") == "digits" else PUBLISHED_TRAIN_IMAGES.get(str(config.get("dataset")))
