"""A comparison for other programs: a row for each trial with its settings, its value, the rule by which it was read, and its metrics."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from orchestration.compare.columns import TRIALS_IN_FILES, TrialColumn, metric_column, setting_column, trial_columns
from orchestration.compare.comparison import Comparison
from orchestration.compare.notes import notes
from orchestration.compare.results import SEED, common_epoch

_SPLIT = "split"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def long_table(comparison: Comparison) -> dict[str, tuple[TrialColumn, list[Any]]]:
    """Every column with its values by name: facts of the trials, all settings, all metrics of the epoch that the rule reads.

    A trial that was left out has no epoch and no value. A setting that a trial's method does not have is None.
    """
    trials = comparison.trials
    common = common_epoch(comparison.results)
    entries = {result.trial_id: result.entry(comparison.at, common=common) for result in comparison.results}
    metrics = {trial_id: entry.metrics if entry else {} for trial_id, entry in entries.items()}
    settings = [name for name in _names(trial.result.config for trial in trials) if name not in (SEED, _SPLIT)]
    defined = trial_columns(comparison)
    facts = [defined[name] for name in (*TRIALS_IN_FILES, *(name for name in defined if name.startswith(_SPLIT)))]
    columns = [*facts, *map(setting_column, settings), *(metric_column(name, metrics) for name in _names(metrics.values()))]
    return {column.name: (column, [column.value(trial) for trial in trials]) for column in columns} if trials else {}


def as_csv(comparison: Comparison) -> str:
    """With a head; nothing where there is no value. The notes do not fit into it: `checkpoint` names the rule in every row."""
    found = long_table(comparison)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, found))
    writer.writerows(zip(*(map(_cell, values) for _, values in found.values()), strict=True))
    return text.getvalue()


def as_parquet(comparison: Comparison) -> bytes:
    """The same columns with their types and descriptions; the notes are the file's metadata `notes`. Mixed types are written as text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = long_table(comparison)
    arrays = [pa.array(_of_one_type(values)) for _, values in found.values()]
    described = [(column.name, {"description": column.help}) for column, _ in found.values()]
    fields = [pa.field(name, array.type, metadata=help) for (name, help), array in zip(described, arrays, strict=True)]
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields, {"notes": "\n".join(notes(comparison))})), stream)
    return stream.getvalue()


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _spelt(value: object) -> str:
    """Booleans as `True`: where a viewer of tables takes `true` for a boolean, its cell stays empty."""
    return "" if value is None else str(value)


def _cell(value: object) -> str:
    """A text that a spreadsheet would run as a formula gets an apostrophe; a number stays one."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else _spelt(value)


def _of_one_type(values: list[Any]) -> list[Any]:
    kinds = {
        float if isinstance(value, int | float) and not isinstance(value, bool) else type(value) for value in values if value is not None
    }
    return values if len(kinds) < 2 else [None if value is None else _spelt(value) for value in values]
