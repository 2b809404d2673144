"""A comparison for other programs: a row a trial with its settings, the value that was compared and the rule by which it was read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from orchestration.compare.comparison import Cell, Comparison, ComparisonGroup
from orchestration.compare.metrics import scale
from orchestration.compare.results import SEED, TrialResult, common_epoch

Row = dict[str, Any]
_SPLIT = "split"


def rows(comparison: Comparison) -> list[Row]:
    """Every trial, those that were left out too, whose epoch, value and metrics are None.

    `value` is in `unit`; what follows it: all settings by their names, then all metrics of that epoch by theirs and as they are stored.
    """
    settings = _names(result.config for result in comparison.results)
    common = common_epoch(comparison.results)
    entries = {result.trial_id: result.entry(comparison.at, common=common) for result in comparison.results}
    metrics = _names(entry.metrics for entry in entries.values() if entry)
    found = []
    for group in comparison.groups:
        for cell in group.cells:
            for result in cell.results:
                entry = entries[result.trial_id]
                measured = {name: entry.metrics.get(name) if entry else None for name in metrics}
                own = {name: _plain(result.config.get(name)) for name in settings if name not in (SEED, _SPLIT)}
                found.append(_facts(result, cell, group, comparison) | own | measured)
    return found


def as_csv(comparison: Comparison) -> str:
    """With a head; nothing where there is no value. The notes do not fit into it: `checkpoint` names the rule in every row."""
    found = rows(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(found[0]) if found else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _spelt(value) for name, value in row.items()} for row in found)
    return text.getvalue()


def as_parquet(comparison: Comparison) -> bytes:
    """The same columns with their types, and the notes as the file's metadata under `notes`. A setting of several types is a text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = rows(comparison)
    columns = {name: _column([row[name] for row in found]) for name in (found[0] if found else ())}
    made = pa.table({name: pa.array(values) for name, values in columns.items()})
    stream = io.BytesIO()
    pq.write_table(made.replace_schema_metadata({"notes": "\n".join(comparison.notes)}), stream)
    return stream.getvalue()


def _facts(result: TrialResult, cell: Cell, group: ComparisonGroup, comparison: Comparison) -> Row:
    split = result.config.get(_SPLIT) or {}
    return {
        "sweep": result.sweep,
        "trial_id": result.trial_id,
        "state": result.state,
        "group": group.label,
        "cell": cell.label,
        "seed": result.seed,
        "checkpoint": comparison.at,
        "epoch": cell.epochs.get(result.seed),
        "metric": comparison.metric,
        "value": cell.values.get(result.seed),
        "unit": scale(comparison.metric)[1],
        "split_labeled": split.get("labeled"),
        "split_unlabeled": split.get("unlabeled"),
        "split_val": split.get("val"),
        "split_sha256": split.get("sha256"),
    }


def _names(mappings: Iterator[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _plain(value: object) -> object:
    """A value that a cell of a table can hold: lists as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _spelt(value: object) -> str:
    """Booleans as `True`: where a viewer of tables takes `true` for a boolean, its cell stays empty."""
    return "" if value is None else str(value)


def _column(values: list[Any]) -> list[Any]:
    """Values of one type."""
    kinds = {
        float if isinstance(value, int | float) and not isinstance(value, bool) else type(value) for value in values if value is not None
    }
    return values if len(kinds) < 2 else [None if value is None else _spelt(value) for value in values]
