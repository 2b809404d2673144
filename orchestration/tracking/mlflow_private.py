"""What MLflow 3.17 does not promise: limits, tags, file names, addresses and charts of its UI, and how it opens a database.

All were read from the source of that release. pyproject.toml bounds MLflow to it; check every one of them before you raise the bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

from orchestration.errors import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from sqlalchemy import Engine

LONGEST_BATCH = 1000
"""Metric values in one call, at most."""
PARAMS_PER_BATCH = 100
LONGEST_PARAM = 6000
"""Characters, as in all limits below."""
LONGEST_TAG = 5000
"""MLflow 3.17 takes 8000, older servers 5000."""
LONGEST_DIGEST = 36
"""Of a data set."""

LATEST_MS = 8_640_000_000_000_000
"""The last time that JavaScript has."""

NOTE = "mlflow.note.content"
"""The tag that the UI shows as a description, in Markdown."""
PARENT_RUN = "mlflow.parentRunId"
DATA_CONTEXT = "mlflow.data.context"
_SHARED_VIEW = "mlflow.sharedViewState."
_IMAGES = "images"

SERVER_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # by default MLflow starts a job runner and four workers, which take 2.6 GB
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment of an `mlflow server` on this machine."""

CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # telemetry edits os.environ from a thread
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the tracker has its own back-off
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment of a process that uses MLflow's client."""

_MODE = "workflowType=machine_learning"  # else the UI opens in its mode for language models


def storable_ms(ms: int) -> int:
    """The time within what MLflow and a browser take: a node's clock may be wrong by any amount. For 0 MLflow takes its own clock."""
    return min(max(ms, 1), LATEST_MS)


def experiment_tags(metric: str) -> dict[str, str]:
    """Of a new experiment: the UI opens it in its mode for training, with `metric` first; higher is better."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": metric,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    }


def file_tags(names: Iterable[str], *, tables: Sequence[str]) -> dict[str, str]:
    """Of a run with files of these names: without them the UI shows no tables and no picture charts."""
    listed = [{"path": name, "type": "table"} for name in tables]
    pictures = any(name.startswith(f"{_IMAGES}/") for name in names)
    return ({"mlflow.loggedArtifacts": json.dumps(listed)} if listed else {}) | ({"mlflow.loggedImages": "True"} if pictures else {})


def image_names(key: str, *, step: int, time_ms: int, unique: str) -> tuple[str, str]:
    """The PNG and its WebP preview, as `log_image` names them; `unique` stands where it puts a random UUID."""
    stem = f"{_IMAGES}/{key}+step+{step}+timestamp+{time_ms}+{unique}"
    return f"{stem}.png", f"{stem}+compressed.webp"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A table as `log_table` writes it and the UI shows it."""
    return json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}).encode()


def is_table(body: bytes) -> bool:
    """Whether a JSON file has the layout of `table`."""
    try:
        content = json.loads(body)
    except ValueError:
        return False
    return isinstance(content, dict) and {"columns", "data"} <= content.keys()


def charts_url(base: str, experiment_id: str, view: str) -> str:
    """The experiment's charts, laid out as its shared view `view` says; `base` is empty for a link within the UI, as below."""
    query = {"compareRunsMode": "CHART", "viewStateShareKey": view}
    return f"{_root(base)}#/experiments/{experiment_id}/runs?{_MODE}&{urlencode(query)}"


def compare_url(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The page that sets these runs side by side."""
    chosen = {"runs": list(run_ids), "experiments": [experiment_id]}
    query = urlencode({name: json.dumps(ids, separators=(",", ":")) for name, ids in chosen.items()}, quote_via=quote)
    return f"{_root(base)}#/compare-runs?{query}&{_MODE}"  # in this order: the UI expects the runs at the very beginning


def artifact_url(base: str, experiment_id: str, run_id: str, name: str) -> str:
    """The page that shows a run's file."""
    return f"{_root(base)}#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(name)}?{_MODE}"


def _root(base: str) -> str:
    return f"{base.rstrip('/')}/" if base else ""


Card = dict[str, Any]
"""A chart."""


@dataclass(frozen=True)
class Section:
    """A headed group of charts."""

    key: str
    title: str
    cards: Sequence[Card]
    columns: int
    """Charts in a row."""


def shared_view(
    key: str, *, only: tuple[str, str], group: str | None, shown: Sequence[str], sort: str, sections: Sequence[Section]
) -> dict[str, str]:
    """The tag of an experiment that holds the shared view `key`, which `charts_url` opens.

    Args:
        only: tag and value of the runs that are shown.
        group: the parameter whose values are averaged and compared; None: every run by itself.
        shown: columns of the list of runs, from `param_column` and `metric_column`.
        sort: the column to sort by, highest first. It must be a metric: by others the UI folds the trials below the sweep's own run.
        sections: those without charts are left out, since the UI would show a text in their place.
    """
    cards = [(section.key, card) for section in sections for card in section.cards]
    view = {
        "searchFilter": f"tags.`{only[0]}` = '{only[1]}'",
        "orderByKey": sort,
        "orderByAsc": False,
        "groupBy": group and f"param.average.{group}",
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": list(shown),
        "compareRunCharts": [
            {"uuid": f"rrn-{i}", "metricSectionId": place, "isGenerated": False, **card} for i, (place, card) in enumerate(cards)
        ],
        "compareRunSections": [_section(section) for section in sections if section.cards],
        "isAccordionReordered": True,  # else the UI sorts the sections by name
    }
    return {f"{_SHARED_VIEW}{key}": json.dumps(view, separators=(",", ":"))}


def _section(section: Section) -> dict[str, Any]:
    shape = {"columns": section.columns, "cardHeight": 360 if section.columns > 1 else 640}
    return {"uuid": section.key, "name": section.title, "display": True, "isReordered": True, "isGenerated": False, **shape}


def param_column(name: str) -> str:
    return f"params.`{name}`"


def metric_column(name: str) -> str:
    return f"metrics.`{name}`"


def line_card(metric: str) -> Card:
    return {"type": "LINE", "metricKey": metric, "selectedMetricKeys": [metric], "lineSmoothness": 0, "useGlobalLineSmoothing": False}


def bar_card(metric: str) -> Card:
    return {"type": "BAR", "metricKey": metric, "runsCountToCompare": 100}


def parallel_card(params: Sequence[str], metric: str) -> Card:
    """Parallel coordinates; the UI draws none of groups."""
    return {"type": "PARALLEL", "selectedParams": list(params), "selectedMetrics": [metric], "showAllRuns": True}


def scatter_card(param: str, metric: str) -> Card:
    axes: Mapping[str, Any] = {"xaxis": {"key": param, "type": "PARAM"}, "yaxis": {"key": metric, "type": "METRIC"}}
    return {"type": "SCATTER", **axes, "runsCountToCompare": 100}


def image_card(key: str, *, step: int) -> Card:
    """The pictures that `image_names` names by `key`, beginning with those of `step`; the UI draws none of groups."""
    return {"type": "IMAGE", "imageKeys": [key], "step": step, "showRunParams": False}


def schema_age(uri: str) -> Literal["older", "newer"] | None:
    """Whether another release of MLflow wrote the database; None for one of this release or without experiments, which MLflow completes.

    MLflow itself upgrades some older databases without asking, and calls a newer one out of date. Raises SQLAlchemy's errors.
    """
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db import utils
    from sqlalchemy import inspect, text

    engine = _engine(uri)
    scripts = ScriptDirectory.from_config(utils._get_alembic_config(""))
    version = utils._get_schema_version(engine)
    if version in scripts.get_heads() or not inspect(engine).has_table("experiments"):
        return None
    try:
        scripts.get_revision(version)
    except CommandError:
        return "newer"
    with engine.connect() as connection:  # not SqlExperiment, whose columns an older database lacks
        return "older" if connection.execute(text("SELECT 1 FROM experiments LIMIT 1")).first() else None


def error_text(error: Exception) -> str:
    """An error of MLflow or SQLAlchemy for a log: one line, bounded, without credentials."""
    text = " ".join(str(error).split()).partition(" [SQL: ")[0].partition(" (Background on this error")[0]
    return without_password(text)[:400]


def _engine(uri: str) -> Engine:
    """Of an SQLite database; the one that MLflow's client will use. By default MLflow would try for minutes to open it."""
    from mlflow.store.db import utils
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    utils.MAX_RETRY_COUNT = 1
    return SqlAlchemyStore._get_or_create_engine(uri)


def relocate(client: MlflowClient, moved: Callable[[str, str], str | None]) -> None:
    """Correct where a database says that the files of its experiments are. `moved`: of a location and a name, the new location or None."""
    from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun

    sessions = client._tracking_client.store.ManagedSessionMaker
    with sessions() as session:
        known = [(found.experiment_id, found.artifact_location or "", found.name) for found in session.query(SqlExperiment)]
    places = {number: (old, new) for number, old, name in known if (new := moved(old, name))}
    if not places:
        return
    with sessions(read_only=False) as session:
        for experiment in session.query(SqlExperiment).filter(SqlExperiment.experiment_id.in_(places)):
            experiment.artifact_location = places[experiment.experiment_id][1]
        for run in session.query(SqlRun).filter(SqlRun.experiment_id.in_(places)):
            old, new = places[run.experiment_id]
            if run.artifact_uri.startswith(f"{old}/"):
                run.artifact_uri = f"{new}{run.artifact_uri.removeprefix(old)}"
