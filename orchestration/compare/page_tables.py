"""The tables of the page: rows of texts that know by what they sort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from orchestration.compare.comparison import Cell, Comparison, ComparisonGroup
from orchestration.compare.metrics import axis_title, metric_name, number, scale
from orchestration.compare.plot_points import measured, seeds, validation_list
from orchestration.compare.published import Reproduction
from orchestration.compare.results import TrialResult
from orchestration.compare.text_tables import better_shown, interval_shown, p_shown, signed
from orchestration.formatting import shown
from orchestration.record.manifest import SCORE, EpochMetrics


@dataclass(frozen=True)
class PageCell:
    """One field of a table; with `order` it sorts as that number, else as its text, and after every number."""

    text: str
    order: float | None = None


NOTHING = PageCell("–")


@dataclass(frozen=True)
class PageTable:
    """A table as the page shows it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[PageCell, ...], ...]
    note: str
    """What its numbers are."""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, and are set flush right."""
        return tuple(any(field.order is not None for field in column) for column in zip(*self.rows, strict=True))


def comparison_table(comparison: Comparison, group: ComparisonGroup) -> PageTable:
    """The cells of a group: mean and spread, and the difference from its baseline."""
    head = ("settings", axis_title(comparison.metric), "± sd", "difference", "95 % interval", "p (Holm)", "P(better)", "by seed")
    used = [result for cell in group.cells for result in cell.results if result.seed in cell.values]
    against = f"; differences from {group.baseline}" if len(group.cells) > 1 and group.baseline else ""
    note = f"{measured(comparison)}; mean and sample standard deviation over {seeds(used)}{against}" if used else ""
    return PageTable(group.label, head, tuple(_cell_row(cell, group, comparison.metric) for cell in group.cells), note)


def published_table(source: str, found: Sequence[Reproduction]) -> PageTable:
    """The published numbers beside the mean of ours."""
    head = ("row", "metric", "published", "ours, last", "difference", "ours, highest", "difference", "seeds")
    ours = (
        "Ours: percent, mean ± sample standard deviation over the seeds of finished trials; last: after the last epoch; highest: at the"
        " epoch where the row's own metric is highest, chosen on the very images that it is measured on"
    )
    return PageTable("Published numbers and ours", head, tuple(map(_published_row, found)), f"Published: {source}. {ours}")


def trials_table(comparison: Comparison, results: Sequence[TrialResult]) -> PageTable:
    """Every trial, finished or not."""
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    several = ["sweep"] if len(comparison.sweeps) > 1 else []
    head = ("trial", *several, *names, "seed", "state", "epoch", "last", "best", "at epoch")
    note = (
        f"{axis_title(comparison.metric)} on the {validation_list(results)}; last: after the newest epoch; best: at the epoch with the best"
        f" {SCORE}, chosen on these very images"
    )
    return PageTable("Every trial", head, tuple(_trial_row(result, comparison.metric, names, several) for result in results), note)


def minus(number: str) -> str:
    """A number with a minus sign as wide as a plus."""
    return number.replace("-", "−")


def _cell_row(cell: Cell, group: ComparisonGroup, metric: str) -> tuple[PageCell, ...]:
    values = list(cell.values.values())
    centre = mean(values) if values else None
    spread = stdev(values) if len(values) > 1 else None
    by_seed = PageCell(", ".join(number(value, metric) for value in values)) if values else NOTHING
    return (PageCell(cell.label), _number(centre, metric), _number(spread, metric), *_difference_fields(cell, group, metric), by_seed)


def _difference_fields(cell: Cell, group: ComparisonGroup, metric: str) -> tuple[PageCell, ...]:
    found = cell.difference
    if found is None:
        return PageCell("baseline") if cell.label == group.baseline else NOTHING, NOTHING, NOTHING, NOTHING
    interval = PageCell("too few seeds") if found.low is None else PageCell(minus(interval_shown(found, metric)), found.low)
    better = PageCell(better_shown(found), found.better)
    return PageCell(minus(signed(found.mean, metric)), found.mean), interval, PageCell(p_shown(found.p_holm), found.p_holm), better


def _published_row(found: Reproduction) -> tuple[PageCell, ...]:
    ours = [field for values in (found.last, found.highest) for field in _ours(values, found)]
    count = PageCell(str(len(found.seeds)), len(found.seeds)) if found.seeds else NOTHING
    return (PageCell(found.name), PageCell(metric_name(found.metric)), _number(found.value, found.metric), *ours, count)


def _ours(values: Sequence[float], found: Reproduction) -> tuple[PageCell, PageCell]:
    if not values:
        return NOTHING, NOTHING
    spread = f" ± {number(stdev(values), found.metric)}" if len(values) > 1 else ""
    difference = None if found.value is None else mean(values) - found.value
    ours = PageCell(f"{number(mean(values), found.metric)}{spread}", mean(values))
    return ours, NOTHING if difference is None else PageCell(minus(signed(difference, found.metric)), difference)


def _trial_row(result: TrialResult, metric: str, names: Sequence[str], several: Sequence[str]) -> tuple[PageCell, ...]:
    best = max(result.history, key=lambda entry: entry.metrics[SCORE], default=None)
    last = result.history[-1] if result.history else None
    settings = [_setting(result.settings.get(name)) for name in names]
    reached = PageCell(f"{result.epochs}/{result.config['epochs']}", result.epochs)
    seed = PageCell(str(result.seed), result.seed)
    at = PageCell(str(best.epoch), best.epoch) if best else NOTHING
    known = [PageCell(result.trial_id), *[PageCell(result.sweep)] * len(several), *settings, seed, PageCell(result.state), reached]
    return (*known, _value(last, metric), _value(best, metric), at)


def _value(entry: EpochMetrics | None, metric: str) -> PageCell:
    return _number(scale(metric)[0] * entry.metrics[metric] if entry and metric in entry.metrics else None, metric)


def _number(value: float | None, metric: str) -> PageCell:
    return NOTHING if value is None else PageCell(number(value, metric), value)


def _setting(value: Any) -> PageCell:
    if value is None:
        return NOTHING
    return PageCell(shown(value), float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None)
