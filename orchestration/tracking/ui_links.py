"""Addresses in MLflow's UI, how it is started on a database, and the charts that it opens with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from orchestration.errors import TrackingError, without_password
from orchestration.record.manifest import SCORE
from orchestration.tracking.run_content import BEST_SCORE, KIND

SQLITE = "sqlite:///"
DEFAULT_PORT = 5000
UI_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # by default MLflow starts a job runner and four workers, which take 2.6 GB
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""The environment of a server that shows a SQLite database."""

MOST_COMPARED = 40
"""Runs in one address: descriptions hold the address, and MLflow bounds their length."""

_MODE = "workflowType=machine_learning"  # else the UI opens in its mode for language models
_GROUPED, _SINGLE = "rrn-partitions", "rrn-trials"
_SHARED_VIEW = "mlflow.sharedViewState."
_COMPARISON, _PREDICTIONS = "rrn-comparison", "rrn-predictions"  # sections of the page


def checked(uri: str) -> str:
    """`uri` itself. Raises TrackingError where MLflow's books are not kept in such a place."""
    if not re.match(r"sqlite:////.|https?://[^/]", uri):
        raise TrackingError(f"tracking: must be sqlite:////absolute/path.db or http(s)://host..., got {without_password(uri)!r}")
    return uri


def ui_arguments(uri: str, *, port: int) -> list[str]:
    """What to start, with `UI_SETTINGS`, to serve the UI of a SQLite database to this machine alone."""
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    return [*server, "--host", "127.0.0.1", "--workers", "1", "--port", str(port)]


def ui_base(uri: str) -> str | None:
    """Where the UI of a server answers; None of a database, which `rrn-sweep ui` serves."""
    return None if uri.startswith(SQLITE) else without_password(uri).rstrip("/")


def comparison_url(base: str, experiment_id: str) -> str:
    """The page with the charts of all trials, grouped as `views` says, in the UI at `base`; `base` may be empty, for links within it."""
    return _charts(base, experiment_id, _GROUPED)


def trials_url(base: str, experiment_id: str) -> str:
    """The same charts with a line for every trial, and parallel coordinates."""
    return _charts(base, experiment_id, _SINGLE)


def runs_url(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The page that sets the first `MOST_COMPARED` of these runs side by side, with parallel coordinates."""
    chosen = {"runs": list(run_ids[:MOST_COMPARED]), "experiments": [experiment_id]}
    query = urlencode({name: json.dumps(ids, separators=(",", ":")) for name, ids in chosen.items()}, quote_via=quote)
    return f"{_root(base)}#/compare-runs?{query}&{_MODE}"  # in this order: the UI looks for its runs at the very beginning


def file_url(base: str, experiment_id: str, run_id: str, name: str) -> str:
    """The page that shows a run's file."""
    return f"{_root(base)}#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(name)}?{_MODE}"


def views(varied: Sequence[str], *, drawn: int = 0) -> dict[str, str]:
    """The tags of an experiment that `comparison_url` and `trials_url` lead to: MLflow's shared views, as its UI of 3.17 saves them.

    Args:
        drawn: the epoch whose pictures are shown first.
    """
    names = [name for name in varied if name != "seed"]
    shared = {_GROUPED: _view(names, group=grouped_by(varied), drawn=0), _SINGLE: _view(names, group=None, drawn=drawn)}
    return {f"{_SHARED_VIEW}{key}": json.dumps(view, separators=(",", ":")) for key, view in shared.items()}


def grouped_by(varied: Sequence[str]) -> str:
    """The setting whose values the charts compare: the partition where it varies, else the first one; never the seed."""
    names = [name for name in varied if name != "seed"]
    return "partition" if "partition" in names or not names else names[0]


def _charts(base: str, experiment_id: str, key: str) -> str:
    query = {"compareRunsMode": "CHART", "viewStateShareKey": key}
    return f"{_root(base)}#/experiments/{experiment_id}/runs?{_MODE}&{urlencode(query)}"


def _root(base: str) -> str:
    return f"{base.rstrip('/')}/" if base else ""


def _view(names: Sequence[str], *, group: str | None, drawn: int) -> dict[str, Any]:
    """Sorted by a metric the UI lists the trials flat; otherwise it folds them away below the sweep's own run."""
    columns = [*(f"params.`{name}`" for name in (*names, "seed")), f"metrics.`{SCORE}`", f"metrics.`{BEST_SCORE}`"]
    cards = _cards(names, grouped=group is not None, drawn=drawn)
    used = {card["metricSectionId"] for card in cards}  # an empty section is shown with words about its emptiness
    sections = [_section(_COMPARISON, "Comparison", columns=2), _section(_PREDICTIONS, "Predictions", columns=1)]
    return {
        "searchFilter": f"tags.`{KIND}` = 'trial'",
        "orderByKey": f"metrics.`{SCORE}`",
        "orderByAsc": False,
        "groupBy": group and f"param.average.{group}",
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": columns,
        "compareRunCharts": cards,
        "compareRunSections": [section for section in sections if section["uuid"] in used],
        "isAccordionReordered": True,  # else the section stands where the alphabet puts it
    }


def _section(key: str, name: str, *, columns: int) -> dict[str, Any]:
    shape = {"columns": columns, "cardHeight": 360 if columns > 1 else 640}
    return {"uuid": key, "name": name, "display": True, "isReordered": True, "isGenerated": False, **shape}


def _cards(names: Sequence[str], *, grouped: bool, drawn: int) -> list[dict[str, Any]]:
    """Of groups MLflow draws no parallel coordinates and no pictures, and averages what a scatter shall tell apart."""
    cards: list[dict[str, Any]] = [
        {"type": "LINE", "metricKey": SCORE, "selectedMetricKeys": [SCORE], "lineSmoothness": 0, "useGlobalLineSmoothing": False},
        {"type": "BAR", "metricKey": BEST_SCORE, "runsCountToCompare": 100},
    ]
    if not grouped and names:
        cards.append({"type": "PARALLEL", "selectedParams": list(names), "selectedMetrics": [SCORE], "showAllRuns": True})
        cards += [_scatter(name) for name in names if name != "partition"]
    pictures = {"type": "IMAGE", "imageKeys": ["predictions"], "step": drawn, "showRunParams": False, "metricSectionId": _PREDICTIONS}
    cards += [pictures] if drawn and not grouped else []
    return [{"uuid": f"rrn-{i}", "metricSectionId": _COMPARISON, "isGenerated": False, **card} for i, card in enumerate(cards)]


def _scatter(name: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": name, "type": "PARAM"}, "yaxis": {"key": SCORE, "type": "METRIC"}}
    return {"type": "SCATTER", **axes, "runsCountToCompare": 100}
