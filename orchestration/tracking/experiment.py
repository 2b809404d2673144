"""MLflow's client: find or create a sweep's experiment, write to its runs, sort errors by what helps against them."""

from __future__ import annotations

import logging
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.errors import TrackingError, without_password
from orchestration.record.manifest import SCORE
from orchestration.tracking.dataset_inputs import DatasetInput
from orchestration.tracking.mlflow_private import DATA_CONTEXT, PARAMS_PER_BATCH, experiment_tags
from orchestration.tracking.ui_links import views

if TYPE_CHECKING:
    from mlflow import MlflowClient

    Client = MlflowClient

SQLITE = "sqlite:///"


class MlflowUnavailable(Exception):  # noqa: N818
    """MLflow does not answer, or answers with an error that may pass."""


class RunGone(Exception):  # noqa: N818
    """MLflow has no such run, or refuses what is written to it."""


class TrackingAbandoned(Exception):  # noqa: N818
    """Another driver is MLflow's writer now: nothing may be written."""


def checked_uri(uri: str) -> str:
    """`uri` itself. Raises TrackingError unless it names a SQLite database or a server."""
    if not re.match(r"sqlite:////.|https?://[^/]", uri):
        raise TrackingError(f"tracking: must be sqlite:////absolute/path.db or http(s)://host..., got {without_password(uri)!r}")
    return uri


def find_experiment(uri: str, sweep: str) -> tuple[str, Client]:
    """The sweep's experiment; created if absent, restored if deleted. Raises TrackingError, MlflowUnavailable, RunGone."""
    client = _client(uri)
    with translated():
        experiment = client.get_experiment_by_name(sweep)
        if experiment is None:
            # a server has its own place for files; with a bare database MLflow would take the current folder
            place = (Path(uri.removeprefix(SQLITE)).parent / "artifacts" / sweep).as_uri() if uri.startswith(SQLITE) else None
            return str(client.create_experiment(sweep, artifact_location=place, tags=experiment_tags(SCORE) | views(()))), client
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id), client


@dataclass(frozen=True)
class MetricValue:
    """One value of a metric."""

    key: str
    step: int
    time_ms: int
    value: float


def write_params(client: Client, run_id: str, params: Mapping[str, str]) -> None:
    """Raises MLflow's own errors, as the functions below: call it within `translated`."""
    from mlflow.entities import Param

    entities = [Param(name, value) for name, value in params.items()]
    for i in range(0, len(entities), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entities[i : i + PARAMS_PER_BATCH], synchronous=True)


def write_tags(client: Client, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)


def write_values(client: Client, run_id: str, values: Sequence[MetricValue]) -> None:
    """At most LONGEST_BATCH of them."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(v.key, v.value, v.time_ms, v.step) for v in values], synchronous=True)


def write_data(client: Client, run_id: str, data: Sequence[DatasetInput]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(
        run_id,
        [
            DatasetInput(
                Dataset(item.name, item.digest, "rrn-sweep", item.source, profile=item.profile),
                [InputTag(DATA_CONTEXT, item.context)],
            )
            for item in data
        ],
    )


@contextmanager
def translated() -> Iterator[None]:
    """MLflow's errors as MlflowUnavailable, RunGone or TrackingError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND"):
            raise TrackingError(f"MLflow refused: {one_line(error)}") from error
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST"):
            raise RunGone(one_line(error)) from error
        raise MlflowUnavailable(one_line(error)) from error


def one_line(error: Exception) -> str:
    """The error's text for a log: one line, bounded, without credentials."""
    return without_password(" ".join(str(error).split()))[:400]


def _client(uri: str) -> Client:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they print to stderr on their own; errors are reported here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri)
    try:
        _check_database(Path(uri.removeprefix(SQLITE)))
        return MlflowClient(tracking_uri=uri)
    except Exception as error:  # of SQLAlchemy, Alembic or MLflow; waiting would not help
        raise TrackingError(f"cannot use the MLflow database {uri}: {one_line(error)}") from error


def _check_database(path: Path) -> None:
    """Raise OSError or sqlite3.Error at once; MLflow would retry for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()
