"""The pages of MLflow's UI that show a sweep, and the charts on them."""

from __future__ import annotations

from collections.abc import Sequence

from orchestration.errors import without_password
from orchestration.record.manifest import SCORE
from orchestration.tracking.mlflow_private import (
    Card,
    Section,
    bar_card,
    charts_url,
    compare_url,
    image_card,
    line_card,
    metric_column,
    parallel_card,
    param_column,
    scatter_card,
    shared_view,
)
from orchestration.tracking.run_content import BEST_SCORE, KIND

MOST_COMPARED = 40
"""Runs in one address: descriptions hold the address, and MLflow bounds their length."""

_GROUPED, _SINGLE = "rrn-partitions", "rrn-trials"  # keys of the two shared views


def ui_base(uri: str) -> str | None:
    """The address of a server's UI, without credentials; None for a database, which `rrn-sweep ui` serves."""
    return without_password(uri).rstrip("/") if uri.startswith("http") else None


def comparison_url(base: str, experiment_id: str) -> str:
    """Charts of all trials, grouped by `grouped_by`, in the UI at `base`; `base` is empty for a link within the UI, as below."""
    return charts_url(base, experiment_id, _GROUPED)


def trials_url(base: str, experiment_id: str) -> str:
    """Charts with a line for every trial, parallel coordinates and predictions."""
    return charts_url(base, experiment_id, _SINGLE)


def runs_url(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The first MOST_COMPARED of these runs side by side."""
    return compare_url(base, experiment_id, run_ids[:MOST_COMPARED])


def views(varied: Sequence[str], *, drawn: int = 0) -> dict[str, str]:
    """The experiment's tags with the charts of `comparison_url` and `trials_url`.

    Args:
        drawn: the epoch whose predictions are shown first; 0 while there are none.
    """
    names = [name for name in varied if name != "seed"]
    return _view(_GROUPED, names, group=grouped_by(varied), drawn=0) | _view(_SINGLE, names, group=None, drawn=drawn)


def grouped_by(varied: Sequence[str]) -> str:
    """The setting whose values the charts compare: the partition where it varies, else the first one; never the seed."""
    names = [name for name in varied if name != "seed"]
    return "partition" if "partition" in names or not names else names[0]


def _view(key: str, names: Sequence[str], *, group: str | None, drawn: int) -> dict[str, str]:
    cards = [line_card(SCORE), bar_card(BEST_SCORE), *(_single_cards(names) if group is None else ())]
    predictions = [image_card("predictions", step=drawn)] if drawn and group is None else []
    return shared_view(
        key,
        only=(KIND, "trial"),
        group=group,
        shown=[*map(param_column, (*names, "seed")), metric_column(SCORE), metric_column(BEST_SCORE)],
        sort=metric_column(SCORE),
        sections=[
            Section("rrn-comparison", "Comparison", cards, columns=2),
            Section("rrn-predictions", "Predictions", predictions, columns=1),
        ],
    )


def _single_cards(names: Sequence[str]) -> list[Card]:
    """Only for single trials: groups average the values that a scatter plot separates."""
    return [parallel_card(names, SCORE), *(scatter_card(name, SCORE) for name in names if name != "partition")] if names else []
