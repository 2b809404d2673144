"""Trials side by side: cells of equal settings in groups, each against its group's baseline, and what must be said of the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from orchestration.compare import paired
from orchestration.compare.metrics import axis_title, higher_is_better, measured_on, scale
from orchestration.compare.paired import Difference as Difference
from orchestration.compare.results import SEED, common_epoch, once
from orchestration.compare.results import At as At
from orchestration.compare.results import TrialResult as TrialResult
from orchestration.errors import SweepError
from orchestration.formatting import label
from orchestration.plan.sweep_file import build_config
from orchestration.plan.validation_text import quoted, suggestion
from orchestration.record.manifest import SCORE
from rrn_core.methods import all_settings

_NAMED = 5
"""So many cells are named in a note; more are counted."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Cell:
    """Trials that differ in nothing but the seed."""

    label: str
    """What distinguishes it within its group: `eps=0.6`."""
    settings: Mapping[str, Any]
    results: tuple[TrialResult, ...]
    values: Mapping[int, float]
    """The metric by seed, in percent where it is a share."""
    epochs: Mapping[int, int]
    """Epoch at which each value was read, by seed."""
    difference: Difference | None
    """None for the baseline itself, and where no seed is shared with it."""


@dataclass(frozen=True)
class ComparisonGroup:
    """Cells that agree in the settings named by `by`."""

    label: str
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]
    baseline: str
    """Label of the cell that the others are compared with; empty where the group has no such cell."""


@dataclass(frozen=True)
class Comparison:
    """All that a table or a page shows."""

    sweeps: tuple[str, ...]
    metric: str
    at: At
    by: tuple[str, ...]
    groups: tuple[ComparisonGroup, ...]
    left_out: tuple[TrialResult, ...]
    """Trials without a value under the rule: unfinished, failed, or without the metric."""
    notes: tuple[str, ...]
    """What must stand below every table: checkpoint rule, seeds, splits, and what the number of seeds can and cannot show."""

    @property
    def results(self) -> tuple[TrialResult, ...]:
        """Every trial, with a value or without."""
        return tuple(result for group in self.groups for cell in group.cells for result in cell.results)

    @property
    def used(self) -> tuple[TrialResult, ...]:
        """Every trial with a value."""
        return tuple(result for group in self.groups for cell in group.cells for result in cell.results if result.seed in cell.values)

    @property
    def differences(self) -> tuple[Difference, ...]:
        return tuple(cell.difference for group in self.groups for cell in group.cells if cell.difference)

    @property
    def title(self) -> str:
        """What every number is: `mIoU (%) after the last epoch`."""
        return f"{axis_title(self.metric)} {self.rule}"

    @property
    def rule(self) -> str:
        """The checkpoint rule in words."""
        if self.at == "common":
            return f"after epoch {common_epoch(self.results)}, the last that every trial has completed"
        return "after the last epoch" if self.at == "last" else f"at each trial's epoch with the best {SCORE}"


def compare(
    results: Sequence[TrialResult], *, by: Sequence[str] = ("partition",), metric: str = SCORE, at: At = "last", baseline: str | None = None
) -> Comparison:
    """A group for every combination of the settings named by `by`, in it a cell for all trials that differ in nothing but the seed.

    Args:
        baseline: label of the cell that the others of its group are compared with; unset, the group's first one in the file.

    Raises:
        SweepError: an unknown setting, metric or baseline.
    """
    trials = once(results)
    _check_names(by, trials)
    _check_metric(metric, trials)
    groups = _grouped(trials, by, _Reading(metric, at, common_epoch(trials)))
    _check_baseline(baseline, groups)
    groups = _with_differences([_with_baseline(group, baseline) for group in groups], higher=higher_is_better(metric))
    left_out = tuple(result for group in groups for cell in group.cells for result in cell.results if result.seed not in cell.values)
    sweeps = tuple(dict.fromkeys(result.sweep for result in results))
    found = Comparison(sweeps, metric, at, tuple(by), tuple(groups), left_out, ())
    return replace(found, notes=(*_notes(found), *_repeated(results, trials)))


class _Read(NamedTuple):
    """A value, as it is shown, and the epoch that it is of."""

    epoch: int
    value: float


@dataclass(frozen=True)
class _Reading:
    """How a value is read from a trial."""

    metric: str
    at: At
    common: int

    def __call__(self, result: TrialResult) -> _Read | None:
        entry = result.entry(self.at, common=self.common)
        if entry is None or self.metric not in entry.metrics:
            return None
        return _Read(entry.epoch, scale(self.metric)[0] * entry.metrics[self.metric])


def _check_names(by: Sequence[str], results: Sequence[TrialResult]) -> None:
    varied = list(results[0].settings) if results else []
    known = [name for name in dict.fromkeys([*varied, *all_settings()]) if name != SEED]
    for name in by:
        if name == SEED:
            raise SweepError("--by seed: trials are paired by seed, so it cannot part them; leave it out")
        if name not in known:
            here = f", of which {', '.join(varied)} vary here" if varied else ""
            raise SweepError(f"--by {name}: must be a setting{here}{suggestion(name, known)}")


def _check_metric(metric: str, results: Sequence[TrialResult]) -> None:
    known = list(dict.fromkeys(name for result in results for entry in result.history for name in entry.metrics))
    if known and metric not in known:
        shown = dict.fromkeys(_without_class(name) for name in known)
        raise SweepError(f"--metric {metric}: must be one of {', '.join(shown)}{suggestion(metric, known)}")


def _without_class(metric: str) -> str:
    """Metrics of a class are listed as one."""
    return f"{metric.partition('/')[0]}/{metric.split('/')[1]}/CLASS" if metric.count("/") > 1 else metric


def _check_baseline(baseline: str | None, groups: Sequence[ComparisonGroup]) -> None:
    known = list(dict.fromkeys(cell.label for group in groups for cell in group.cells))
    if baseline is not None and baseline not in known:
        raise SweepError(f"--baseline {quoted(baseline)}: must be one of {', '.join(map(quoted, known))}{suggestion(baseline, known)}")


def _grouped(results: Sequence[TrialResult], by: Sequence[str], read: _Reading) -> list[ComparisonGroup]:
    """The groups with their values, without baselines."""
    groups = [_parted(members, _but_seed) for members in _parted(results, lambda result: [result.config.get(name) for name in by])]
    names = _label_names([[cell[0].settings for cell in cells] for cells in groups], by)
    return [_group({name: cells[0][0].config.get(name) for name in by}, cells, names, read) for cells in groups]


def _label_names(groups: Sequence[Sequence[Mapping[str, Any]]], by: Sequence[str]) -> list[str]:
    """Names of the settings that differ within some group; of all that vary where there is a single cell in each."""
    names = [name for name in dict.fromkeys(name for cells in groups for cell in cells for name in cell) if name not in by]
    differing = [name for name in names if any(len({_key(cell.get(name)) for cell in cells}) > 1 for cells in groups)]
    return differing or names


def _group(settings: Mapping[str, Any], cells: Iterable[Sequence[TrialResult]], names: Sequence[str], read: _Reading) -> ComparisonGroup:
    found = tuple(_cell(members, settings, names, read) for members in cells)
    return ComparisonGroup(label(settings) if settings else "all trials", settings, found, "")


def _cell(results: Sequence[TrialResult], group: Mapping[str, Any], names: Sequence[str], read: _Reading) -> Cell:
    settings = {name: value for name, value in results[0].settings.items() if name not in group}
    read_by_seed = {result.seed: found for result in results if (found := read(result))}
    values = {seed: read_by_seed[seed].value for seed in sorted(read_by_seed)}
    epochs = {seed: read_by_seed[seed].epoch for seed in values}
    return Cell(label({name: settings[name] for name in names if name in settings}), settings, tuple(results), values, epochs, None)


def _with_baseline(group: ComparisonGroup, baseline: str | None) -> ComparisonGroup:
    labels = [cell.label for cell in group.cells]
    chosen = labels[0] if baseline is None else baseline if baseline in labels else ""
    return replace(group, baseline=chosen)


def _with_differences(groups: Sequence[ComparisonGroup], *, higher: bool) -> list[ComparisonGroup]:
    """Every cell against its group's baseline, corrected over the whole table."""
    found = iter(paired.corrected([_difference(cell, group, higher=higher) for group in groups for cell in group.cells]))
    return [replace(group, cells=tuple(replace(cell, difference=next(found)) for cell in group.cells)) for group in groups]


def _difference(cell: Cell, group: ComparisonGroup, *, higher: bool) -> Difference | None:
    baseline = next((other for other in group.cells if other.label == group.baseline), None)
    return paired.compare(cell.values, baseline.values, higher=higher) if baseline and cell is not baseline else None


def _notes(comparison: Comparison) -> Iterator[str]:
    yield f"checkpoint: {comparison.metric} {comparison.rule}{_flattery(comparison)}{_held_back(comparison)}"
    if seeds := sorted({result.seed for result in comparison.used}):
        yield f"mean, sd: over {seeds_named(seeds)}; the sample standard deviation tells how much training varies on these very images"
    if found := comparison.differences:
        yield from _test_notes(comparison, found)
    yield from (f"split: {line}" for line in measured_on(result.config for result in comparison.used or comparison.results))
    yield from _unpaired(comparison)
    by_reason = _parted(comparison.left_out, _reason)
    yield from (f"left out, {_reason(results[0])}: {_trials(results)}" for results in by_reason)


def _flattery(comparison: Comparison) -> str:
    """What a chosen epoch does to a number."""
    if comparison.at != "best":
        return " of each finished trial" if comparison.at == "last" else ""
    measured = "the very images that it is measured on" if comparison.metric.startswith("val/") else "the validation list"
    return f", chosen on {measured}"


def _held_back(comparison: Comparison) -> str:
    """Of the common epoch: whose it is, and that it is not the end."""
    started = [result for result in comparison.results if result.epochs]
    if comparison.at != "common" or not started:
        return ""
    least = min(started, key=lambda result: result.epochs)
    whose = f" (the least advanced: {least.label}, {least.state})" if any(result.epochs > least.epochs for result in started) else ""
    longer = any(result.config["epochs"] > least.epochs for result in started)
    return whose + ("; where trials go on from there, what differs there need not differ at the end" if longer else "")


def _test_notes(comparison: Comparison, found: Sequence[Difference]) -> Iterator[str]:
    points = "points" if scale(comparison.metric)[1] else "its own unit"
    better = "higher" if higher_is_better(comparison.metric) else "lower"
    yield (
        f"difference: to the baseline, in {points}, paired by seed; P(better): share of the seeds in which it is {better};"
        f" 95 % interval of the mean difference: BCa bootstrap, widened for few seeds; none from fewer than {paired.FEWEST}"
    )
    table = f"the {len(found)} comparison{'s' if len(found) > 1 else ''} of the table"
    yield f"p: two-sided sign-flip test, exact up to {paired.EXACT_UP_TO} seeds; p (Holm): corrected over {table}"
    yield from paired.can_show([len(difference.seeds) for difference in found])


def _unpaired(comparison: Comparison) -> Iterator[str]:
    for group in comparison.groups:
        where = f"{group.label}: " if comparison.by else ""
        if not group.baseline:
            yield f"{where}no such baseline, so no differences"
            continue
        baseline = next(cell for cell in group.cells if cell.label == group.baseline)
        for cell in group.cells:
            if alone := sorted(cell.values.keys() ^ baseline.values.keys()):
                yield f"{where}{cell.label} and {group.baseline} do not share {seeds_named(alone)}, left out of their difference"


def _reason(result: TrialResult) -> str:
    return "finished without this metric" if result.finished else result.state


def _repeated(given: Iterable[TrialResult], counted: Sequence[TrialResult]) -> Iterator[str]:
    sweeps = {result.trial_id: result.sweep for result in counted}
    if twice := [result for result in given if result.sweep != sweeps[result.trial_id]]:
        yield f"in several of the sweeps, counted once: {_trials(twice)}"


def seeds_named(seeds: Sequence[int]) -> str:
    """`seeds 0, 1, 2`, `seeds 0 to 9`."""
    if len(seeds) > 4 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _trials(results: Iterable[TrialResult]) -> str:
    """`1/8 eps=0.4 seeds 0, 1; 1/8 eps=0.6 seed 0 and 3 more`."""
    cells = _parted(results, lambda result: result.settings)
    names = [f"{label(cell[0].settings)} {seeds_named(sorted({result.seed for result in cell}))}" for cell in cells]
    more = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _but_seed(result: TrialResult) -> dict[str, Any]:
    return build_config(dict(result.config)).identity() | {SEED: None}


def _parted(items: Iterable[_T], by: Callable[[_T], object]) -> list[list[_T]]:
    """Items of an equal key together, in the order in which each first comes."""
    parts: dict[str, list[_T]] = {}
    for item in items:
        parts.setdefault(_key(by(item)), []).append(item)
    return list(parts.values())


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)
