"""The columns of a comparison, each defined once: its name, help, value and text. Every format renders its tables from these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from orchestration.compare.comparison import Cell, Comparison, TrialOfCell, seeds_named
from orchestration.compare.metrics import NONE, PLUS_MINUS, higher_is_better, mean_and_sd, number, scale, shown_value, signed
from orchestration.compare.paired import EXACT_UP_TO, FEWEST, Difference
from orchestration.formatting import shown
from orchestration.record.manifest import SCORE
from rrn_core.methods import all_settings

MEAN_AND_SD = f"mean {PLUS_MINUS} sd"
_DIFFERENCE = ("difference", "95 % interval", "p", "p (Holm)", "P(better)")
CELLS_IN_TERMINAL = ("cell", "seeds", "mean", "sd", *_DIFFERENCE)
CELLS_IN_DOCUMENTS = ("cell", "seeds", MEAN_AND_SD, *_DIFFERENCE)
CELLS_ON_PAGE = ("cell", "mean", "sd", "difference", "95 % interval", "p (Holm)", "P(better)", "by seed")
TRIALS_ON_PAGE = ("seed", "state", "completed", "last", "best", "at epoch")
TRIALS_IN_FILES = ("sweep", "trial_id", "state", "group", "cell", "seed", "checkpoint", "epoch", "metric", "value", "unit")
"""Which columns each table shows, by name: for the terminal, for Markdown, LaTeX and MLflow, on the page, and in CSV and Parquet files."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class TableColumn(Generic[_Item]):
    """One column of a table that has a row for each item."""

    name: str
    help: str
    """What its values are."""
    value: Callable[[_Item], Any]
    """A number, text, boolean or None. Files for other programs hold it, and the page sorts by it."""
    as_text: Callable[[_Item], str] | None = None
    """How a person reads it; unset, the value as it is written everywhere."""

    def text(self, item: _Item) -> str:
        if self.as_text:
            return self.as_text(item)
        value = self.value(item)
        return NONE if value is None else shown(value)


CellColumn = TableColumn[Cell]
TrialColumn = TableColumn[TrialOfCell]

GROUP = CellColumn("group", "settings that the trials of a group share", lambda cell: cell.group)
CELL = CellColumn("cell", "settings that distinguish these trials within their group", lambda cell: cell.label)


def texts(columns: Sequence[TableColumn[_Item]], items: Iterable[_Item]) -> list[list[str]]:
    """A row of texts for each item."""
    return [[column.text(item) for column in columns] for item in items]


def cell_columns(comparison: Comparison) -> dict[str, CellColumn]:
    """The columns of a table with a row for each cell, by name."""
    metric, over = comparison.metric, f"over {seeds_named(result.seed for result in comparison.used)}"
    sd = "sample standard deviation, which shows how much training varies on these images"
    columns = [
        GROUP,
        CELL,
        CellColumn("seeds", "number of seeds with a value", lambda cell: len(cell.values)),
        _number_column("mean", over, lambda cell: cell.mean, metric),
        _number_column("sd", sd, lambda cell: cell.sd, metric),
        CellColumn(MEAN_AND_SD, over, lambda cell: cell.mean, lambda cell: mean_and_sd(list(cell.values.values()), metric)),
        *_difference_columns(comparison),
        CellColumn("by seed", "the value of each seed", lambda cell: ", ".join(number(v, metric) for v in cell.values.values()) or None),
    ]
    return {column.name: column for column in columns}


def trial_columns(comparison: Comparison) -> dict[str, TrialColumn]:
    """The columns of a table with a row for each trial, by name, without its settings and metrics."""
    metric, at_best = comparison.metric, f"at the epoch with the best {SCORE}, chosen on these very images"
    columns = [
        TrialColumn("sweep", "name of the sweep", lambda at: at.result.sweep),
        TrialColumn("trial_id", "identity of the trial", lambda at: at.result.trial_id),
        TrialColumn("state", "state of the trial", lambda at: at.result.state_text),
        TrialColumn(GROUP.name, GROUP.help, lambda at: GROUP.value(at.cell)),
        TrialColumn(CELL.name, CELL.help, lambda at: CELL.value(at.cell)),
        TrialColumn("seed", "seed of the trial", lambda at: at.result.seed),
        TrialColumn("checkpoint", "rule by which the value was read: last, best or common", lambda at: comparison.at),
        TrialColumn("epoch", "epoch at which the value was read", lambda at: at.cell.epochs.get(at.result.seed)),
        TrialColumn("metric", "what the value measures", lambda at: metric),
        TrialColumn("value", "the metric, in its unit", lambda at: at.cell.values.get(at.result.seed)),
        TrialColumn("unit", "unit of the value", lambda at: scale(metric)[1]),
        _split_column("labeled", "number of labelled training images"),
        _split_column("unlabeled", "number of unlabelled training images"),
        _split_column("val", "number of validation images"),
        _split_column("sha256", "SHA-256 of the names of these images and of the classes"),
        TrialColumn("completed", "epochs completed, of those planned", lambda at: at.result.epochs, _completed),
        _number_column("last", "after the newest epoch", lambda at: shown_value(at.result.last, metric), metric),
        _number_column("best", at_best, lambda at: shown_value(at.result.best, metric), metric),
        TrialColumn("at epoch", f"epoch with the best {SCORE}", lambda at: at.result.best.epoch if at.result.best else None),
    ]
    return {column.name: column for column in columns}


def setting_column(name: str) -> TrialColumn:
    """A setting of each trial; none where its method does not have the setting."""
    return TrialColumn(
        name,
        " ".join((all_settings()[name].description or "").split()),
        lambda at: _plain(at.result.config.get(name)),
        lambda at: shown(at.result.config[name]) if name in at.result.config else NONE,
    )


def metric_column(name: str, metrics: Mapping[str, Mapping[str, float]]) -> TrialColumn:
    """A metric of each trial as it is stored. `metrics`: those of the epoch that the checkpoint rule reads, by trial_id."""
    help = "the metric as it is stored, at the epoch that the checkpoint rule reads"
    return TrialColumn(name, help, lambda at: metrics[at.result.trial_id].get(name))


def _number_column(name: str, help: str, value: Callable[[_Item], float | None], metric: str) -> TableColumn[_Item]:
    return TableColumn(name, help, value, lambda item: number(value(item), metric))


def _completed(at: TrialOfCell) -> str:
    return f"{at.result.epochs}/{at.result.config['epochs']}"


def _split_column(part: str, help: str) -> TrialColumn:
    return TrialColumn(f"split_{part}", help, lambda at: (at.result.config.get("split") or {}).get(part))


def _difference_columns(comparison: Comparison) -> list[CellColumn]:
    metric, count = comparison.metric, len(comparison.differences)
    against = f"to the baseline, in {'points' if scale(metric)[1] else 'its own unit'}, paired by seed"
    interval = f"of the mean difference, BCa bootstrap, widened for few seeds, none below {FEWEST} seeds"
    test = f"two-sided sign-flip test, exact up to {EXACT_UP_TO} seeds"
    corrected = f"corrected over the {count} comparison{'s' if count > 1 else ''} of the table"
    better = f"share of the seeds in which it is {'higher' if higher_is_better(metric) else 'lower'}"
    difference = _difference_column("difference", against, lambda it: it.mean, lambda it: signed(it.mean, metric))
    return [
        replace(difference, as_text=lambda cell: "baseline" if cell.is_baseline else difference.text(cell)),
        _difference_column("95 % interval", interval, lambda it: it.low, lambda it: _interval(it, metric)),
        _difference_column("p", test, lambda it: it.p, lambda it: _p(it.p)),
        _difference_column("p (Holm)", corrected, lambda it: it.p_holm, lambda it: _p(it.p_holm)),
        _difference_column("P(better)", better, lambda it: it.better, lambda it: f"{100 * it.better:.0f} % of {len(it.seeds)}"),
    ]


def _difference_column(name: str, help: str, value: Callable[[Difference], float | None], text: Callable[[Difference], str]) -> CellColumn:
    """A column of a cell's difference; empty where it has none."""
    return CellColumn(
        name,
        help,
        lambda cell: value(cell.difference) if cell.difference else None,
        lambda cell: text(cell.difference) if cell.difference else NONE,
    )


def _interval(difference: Difference, metric: str) -> str:
    """`[+0.10, +0.90]`."""
    if difference.low is None or difference.high is None:
        return NONE
    return f"[{signed(difference.low, metric)}, {signed(difference.high, metric)}]"


def _p(p: float) -> str:
    """`0.031`, `<0.001`."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _plain(value: object) -> object:
    """A value that a cell of a file can hold: lists as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value
