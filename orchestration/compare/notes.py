"""The notes below every table: checkpoint rule, seeds, tests, splits, and what the number of seeds can show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orchestration.compare.columns import cell_columns
from orchestration.compare.comparison import Comparison, parted, seeds_named
from orchestration.compare.metrics import measured_on
from orchestration.compare.paired import can_show
from orchestration.compare.results import TrialResult
from orchestration.formatting import label

_NAMED = 5
"""Cells named in one note; more are counted."""


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know of a comparison's numbers, one note a line."""
    found = [f"checkpoint: {comparison.metric} {comparison.rule}{_choice(comparison)}{_least_advanced(comparison)}"]
    if comparison.used:
        found.append(_helps(comparison, "mean", "sd"))
    if comparison.differences:
        found += [_helps(comparison, "difference", "95 % interval", "P(better)"), _helps(comparison, "p", "p (Holm)")]
        found += can_show([len(difference.seeds) for difference in comparison.differences])
    found += [f"split: {line}" for line in measured_on(result.config for result in comparison.used or comparison.results)]
    by_reason = parted(comparison.left_out, _reason)
    found += [*_unpaired(comparison), *(f"left out, {_reason(results[0])}: {_trials(results)}" for results in by_reason)]
    return found + ([f"in several of the sweeps, counted once: {_trials(comparison.repeated)}"] if comparison.repeated else [])


def _helps(comparison: Comparison, *names: str) -> str:
    """What the values of these columns are."""
    columns = cell_columns(comparison)
    return "; ".join(f"{name}: {columns[name].help}" for name in names)


def _choice(comparison: Comparison) -> str:
    """Of which trials the epoch is, and on which images a best one was chosen."""
    if comparison.at != "best":
        return " of each finished trial" if comparison.at == "last" else ""
    measured = "the very images that it is measured on" if comparison.metric.startswith("val/") else "the validation list"
    return f", chosen on {measured}"


def _least_advanced(comparison: Comparison) -> str:
    """Which trial sets the common epoch, and that training goes on after it."""
    started = [result for result in comparison.results if result.epochs]
    if comparison.at != "common" or not started:
        return ""
    least = min(started, key=lambda result: result.epochs)
    which = f" (the least advanced: {least.label}, {least.state_text})" if any(result.epochs > least.epochs for result in started) else ""
    longer = any(result.config["epochs"] > least.epochs for result in started)
    return which + ("; training goes on after it, so differences may still change" if longer else "")


def _unpaired(comparison: Comparison) -> Iterator[str]:
    for group in comparison.groups:
        where, baseline = f"{group.label}: " if comparison.by else "", group.baseline
        if not baseline:
            yield f"{where}no such baseline, so no differences"
            continue
        for cell in group.cells:
            if alone := cell.values.keys() ^ baseline.values.keys():
                yield f"{where}{cell.label} and {baseline.label} do not share {seeds_named(alone)}, left out of their difference"


def _reason(result: TrialResult) -> str:
    return "finished without this metric" if result.finished else result.state_text


def _trials(results: Iterable[TrialResult]) -> str:
    """`1/8 eps=0.4 seeds 0, 1; 1/8 eps=0.6 seed 0 and 3 more`."""
    cells = parted(results, lambda result: result.settings)
    names = [f"{label(cell[0].settings)} {seeds_named(result.seed for result in cell)}" for cell in cells]
    more = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
