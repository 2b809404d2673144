"""The HTML tables of the page, with sort keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from orchestration.compare import published
from orchestration.compare.columns import CELLS_ON_PAGE, TRIALS_ON_PAGE, TableColumn, cell_columns, setting_column, trial_columns
from orchestration.compare.comparison import Comparison, ComparisonGroup, seeds_named
from orchestration.compare.metrics import NONE, axis_title
from orchestration.compare.plot_points import measured, validation_list
from orchestration.compare.text_tables import sentences, typographic
from orchestration.plan.spec import Published

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class PageCell:
    """One text of a table. With `order` it sorts as that number, else as its text, and after every number."""

    text: str
    order: float | None = None


@dataclass(frozen=True)
class PageTable:
    """A table as the page shows it."""

    title: str
    columns: tuple[TableColumn[Any], ...]
    rows: tuple[tuple[PageCell, ...], ...]
    note: str
    """What its numbers are."""

    @cached_property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, and are set flush right."""
        return tuple(any(cell.order is not None for cell in column) for column in zip(*self.rows, strict=True))


def comparison_tables(comparison: Comparison) -> list[PageTable]:
    """For each group with values its cells: mean and spread, and the difference from its baseline."""
    defined, what = cell_columns(comparison), measured(comparison)
    columns = [defined[name] for name in CELLS_ON_PAGE]
    return [
        _page_table(group.label, columns, group.cells, f"{what}; {_group_note(group)}")
        for group in comparison.groups
        if any(cell.values for cell in group.cells)
    ]


def published_page_table(numbers: Published, found: Sequence[published.Reproduction]) -> PageTable:
    """The published numbers beside the mean of ours."""
    return _page_table("Published numbers and ours", published.COLUMNS, found, typographic(sentences(published.notes(numbers, found))))


def trials_table(comparison: Comparison) -> PageTable:
    """Every trial, finished or not."""
    defined, varied = trial_columns(comparison), dict.fromkeys(name for result in comparison.results for name in result.settings)
    several = ["sweep"] if len(comparison.sweeps) > 1 else []
    columns = [
        *(defined[name] for name in ("trial_id", *several)),
        *map(setting_column, varied),
        *(defined[name] for name in TRIALS_ON_PAGE),
    ]
    helps = "; ".join(f"{name}: {defined[name].help}" for name in ("last", "best"))
    note = f"{axis_title(comparison.metric)} on the {validation_list(comparison.results)}; {helps}"
    return _page_table("Every trial", columns, comparison.trials, note)


def _group_note(group: ComparisonGroup) -> str:
    over = seeds_named(seed for cell in group.cells for seed in cell.values)
    against = f"; differences from {group.baseline.label}" if len(group.cells) > 1 and group.baseline else ""
    return f"mean and sample standard deviation over {over}{against}"


def _page_table(title: str, columns: Sequence[TableColumn[_Item]], items: Iterable[_Item], note: str) -> PageTable:
    rows = tuple(tuple(_page_cell(column, item) for column in columns) for item in items)
    return PageTable(title, tuple(columns), rows, note)


def _page_cell(column: TableColumn[_Item], item: _Item) -> PageCell:
    text, value = column.text(item), column.value(item)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return PageCell("–" if text == NONE else typographic(text), value if number else None)
