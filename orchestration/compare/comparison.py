"""Trials side by side: cells of equal settings in groups, each cell compared with its group's baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, stdev
from typing import Any, NamedTuple, TypeVar

from orchestration.compare import paired
from orchestration.compare.metrics import axis_title, higher_is_better, shown_value
from orchestration.compare.paired import Difference as Difference
from orchestration.compare.results import SEED, common_epoch, once, value_key
from orchestration.compare.results import At as At
from orchestration.compare.results import TrialResult as TrialResult
from orchestration.errors import SweepError
from orchestration.formatting import label
from orchestration.plan.sweep_file import build_config
from orchestration.plan.validation_text import quoted, suggestion
from orchestration.record.manifest import MIOUS, SCORE
from rrn_core.methods import all_settings

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Cell:
    """Trials that differ only in the seed."""

    label: str
    """What distinguishes it within its group: `eps=0.6`."""
    group: str
    """Label of its group."""
    settings: Mapping[str, Any]
    """Without those of its group; a setting that its method does not have is absent."""
    results: tuple[TrialResult, ...]
    values: Mapping[int, float]
    """The metric by seed, in percent where it is a share."""
    epochs: Mapping[int, int]
    """Epoch at which each value was read, by seed."""
    is_baseline: bool = False
    difference: Difference | None = None
    """None for the baseline itself, and where no seed is shared with it."""

    @property
    def mean(self) -> float | None:
        return mean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the seeds; None below two."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


class TrialOfCell(NamedTuple):
    """A trial and its cell."""

    cell: Cell
    result: TrialResult


@dataclass(frozen=True)
class ComparisonGroup:
    """Cells that agree in the settings named by `by`."""

    label: str
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]

    @property
    def baseline(self) -> Cell | None:
        """The cell that the others are compared with; None where the group has no such cell."""
        return next((cell for cell in self.cells if cell.is_baseline), None)


@dataclass(frozen=True)
class Comparison:
    """All that a table or a page shows."""

    sweeps: tuple[str, ...]
    metric: str
    at: At
    by: tuple[str, ...]
    groups: tuple[ComparisonGroup, ...]
    repeated: tuple[TrialResult, ...] = ()
    """Trials that were counted in another of the sweeps."""

    @property
    def cells(self) -> list[Cell]:
        return [cell for group in self.groups for cell in group.cells]

    @property
    def trials(self) -> list[TrialOfCell]:
        return [TrialOfCell(cell, result) for cell in self.cells for result in cell.results]

    @property
    def results(self) -> list[TrialResult]:
        """Every trial, with a value or without."""
        return [result for _, result in self.trials]

    @property
    def used(self) -> list[TrialResult]:
        """Every trial with a value."""
        return [result for cell, result in self.trials if result.seed in cell.values]

    @property
    def left_out(self) -> list[TrialResult]:
        """Trials without a value under the rule: unfinished, failed, or without the metric."""
        return [result for cell, result in self.trials if result.seed not in cell.values]

    @property
    def differences(self) -> list[Difference]:
        return [cell.difference for cell in self.cells if cell.difference]

    @property
    def title(self) -> str:
        """What every number is: `mIoU (%) after the last epoch`."""
        return f"{axis_title(self.metric)} {self.rule}"

    @cached_property
    def rule(self) -> str:
        """The checkpoint rule in words."""
        if self.at == "common":
            return f"after epoch {common_epoch(self.results)}, the last that every trial has completed"
        return "after the last epoch" if self.at == "last" else f"at each trial's epoch with the best {SCORE}"


def compare(
    results: Sequence[TrialResult], *, by: Sequence[str] = ("partition",), metric: str = SCORE, at: At = "last", baseline: str | None = None
) -> Comparison:
    """A group for every combination of the settings named by `by`, in it a cell for all trials that differ only in the seed.

    Args:
        baseline: label of the cell that the others of its group are compared with; unset, the group's first one in the file.

    Raises:
        SweepError: an unknown setting, metric or baseline.
    """
    trials = once(results)
    _check_names(by, trials)
    _check_metric(metric, trials)
    common = common_epoch(trials)

    def read(result: TrialResult) -> tuple[int, float] | None:
        entry = result.entry(at, common=common)
        value = shown_value(entry, metric)
        return None if entry is None or value is None else (entry.epoch, value)

    groups = _grouped(trials, by, read)
    _check_baseline(baseline, groups)
    groups = _with_differences([_with_baseline(group, baseline) for group in groups], higher=higher_is_better(metric))
    counted_in = {result.trial_id: result.sweep for result in trials}
    repeated = tuple(result for result in results if result.sweep != counted_in[result.trial_id])
    return Comparison(tuple(dict.fromkeys(result.sweep for result in results)), metric, at, tuple(by), tuple(groups), repeated)


def named(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    """The label of some of the settings: `1/8 eps=0.6`; `eps=-` where none of them exists, empty without names."""
    listed = list(names)
    return label(_chosen(settings, listed) or dict.fromkeys(listed, "-")) if listed else ""


def seeds_named(seeds: Iterable[int]) -> str:
    """`seeds 0, 1, 2`, `seeds 0 to 9`."""
    found = sorted(set(seeds))
    if len(found) > 4 and found[-1] - found[0] == len(found) - 1:
        return f"seeds {found[0]} to {found[-1]}"
    return f"{'seed' if len(found) == 1 else 'seeds'} {', '.join(map(str, found))}"


def parted(items: Iterable[_Item], by: Callable[[_Item], object]) -> list[list[_Item]]:
    """Items of an equal key together, in the order in which each first comes."""
    parts: dict[str, list[_Item]] = {}
    for item in items:
        parts.setdefault(value_key(by(item)), []).append(item)
    return list(parts.values())


_Read = Callable[[TrialResult], tuple[int, float] | None]
"""The epoch and the value of a trial under the checkpoint rule."""


def _check_names(by: Sequence[str], results: Sequence[TrialResult]) -> None:
    varied = list(dict.fromkeys(name for result in results for name in result.settings))
    known = [name for name in dict.fromkeys([*varied, *all_settings()]) if name != SEED]
    for name in by:
        if name == SEED:
            raise SweepError("--by seed: not possible, because trials are paired by seed; leave it out")
        if name not in known:
            here = f"; settings that vary in this sweep: {', '.join(varied)}" if varied else ""
            raise SweepError(f"--by: unknown setting {quoted(name)}{here}{suggestion(name, known)}")


def _check_metric(metric: str, results: Sequence[TrialResult]) -> None:
    known = list(dict.fromkeys(name for result in results for entry in result.history for name in entry.metrics))
    undefined = metric in MIOUS  # no validation pixel has a label: the table has no values
    if known and metric not in known and not undefined:
        shown = dict.fromkeys(_without_class(name) for name in known)
        raise SweepError(f"--metric {metric}: must be one of {', '.join(shown)}{suggestion(metric, known)}")


def _without_class(metric: str) -> str:
    """Metrics of a class are listed as one."""
    return f"{metric.partition('/')[0]}/{metric.split('/')[1]}/CLASS" if metric.count("/") > 1 else metric


def _check_baseline(baseline: str | None, groups: Sequence[ComparisonGroup]) -> None:
    known = list(dict.fromkeys(cell.label for group in groups for cell in group.cells))
    if baseline is not None and baseline not in known:
        raise SweepError(f"--baseline {quoted(baseline)}: must be one of {', '.join(map(quoted, known))}{suggestion(baseline, known)}")


def _grouped(results: Sequence[TrialResult], by: Sequence[str], read: _Read) -> list[ComparisonGroup]:
    """The groups with their values, without baselines."""
    groups = [parted(members, _but_seed) for members in parted(results, lambda result: _chosen(result.config, by))]
    names = _label_names([[cell[0].settings for cell in cells] for cells in groups], by)
    return [_group(_chosen(cells[0][0].config, by), cells, by, names, read) for cells in groups]


def _chosen(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def _but_seed(result: TrialResult) -> dict[str, Any]:
    return build_config(dict(result.config)).identity() | {SEED: None}


def _label_names(groups: Sequence[Sequence[Mapping[str, Any]]], by: Sequence[str]) -> list[str]:
    """Names of the settings that have several values within some group; of all that vary where there is a single cell in each."""
    names = [name for name in dict.fromkeys(name for cells in groups for cell in cells for name in cell) if name not in by]
    differing = [name for name in names if any(len({value_key(cell[name]) for cell in cells if name in cell}) > 1 for cells in groups)]
    return differing or names


def _group(
    settings: Mapping[str, Any], cells: Iterable[Sequence[TrialResult]], by: Sequence[str], names: Sequence[str], read: _Read
) -> ComparisonGroup:
    group = named(settings, by) or "all trials"
    return ComparisonGroup(group, settings, tuple(_cell(members, group, by, names, read) for members in cells))


def _cell(results: Sequence[TrialResult], group: str, by: Sequence[str], names: Sequence[str], read: _Read) -> Cell:
    settings = {name: value for name, value in results[0].settings.items() if name not in by}
    found = sorted((result.seed, *value) for result in results if (value := read(result)))
    values, epochs = {seed: value for seed, _, value in found}, {seed: epoch for seed, epoch, _ in found}
    return Cell(named(settings, names) or "base", group, settings, tuple(results), values, epochs)


def _with_baseline(group: ComparisonGroup, baseline: str | None) -> ComparisonGroup:
    chosen = group.cells[0].label if baseline is None else baseline
    return replace(group, cells=tuple(replace(cell, is_baseline=cell.label == chosen) for cell in group.cells))


def _with_differences(groups: Sequence[ComparisonGroup], *, higher: bool) -> list[ComparisonGroup]:
    """Every cell against its group's baseline, corrected over the whole table."""
    found = iter(paired.corrected([difference for group in groups for difference in _differences(group, higher=higher)]))
    return [replace(group, cells=tuple(replace(cell, difference=next(found)) for cell in group.cells)) for group in groups]


def _differences(group: ComparisonGroup, *, higher: bool) -> list[Difference | None]:
    baseline = group.baseline.values if group.baseline else {}
    return [None if cell.is_baseline else paired.compare(cell.values, baseline, higher=higher) for cell in group.cells]
