"""A sweep's experiment in MLflow, found or made; what is written in MLflow's own words, and its errors by what helps against them."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.errors import TrackingError, without_password
from orchestration.record.manifest import SCORE
from orchestration.tracking.dataset_inputs import DatasetInput
from orchestration.tracking.ui_links import SQLITE, views

if TYPE_CHECKING:
    from mlflow import MlflowClient

    Client = MlflowClient

LONGEST_BATCH = 1000
"""Metric values that MLflow takes at once."""
_PARAMS_PER_BATCH = 100  # what MLflow takes
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # the UI opens it in its training mode, not in the one for language models
    "mlflow.experiment.primaryMetric.name": SCORE,
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}


class MlflowUnavailable(Exception):  # noqa: N818
    """MLflow gave no answer, or one that may be better next time."""


class RunGone(Exception):  # noqa: N818
    """MLflow knows no such run any more, or takes exception to what is written to it."""


class TrackingAbandoned(Exception):  # noqa: N818
    """Nothing may be written any more."""


def find_experiment(uri: str, sweep: str) -> tuple[str, Client]:
    """The sweep's experiment, restored or made where it is not there. Raises TrackingError, Away, Gone."""
    client = _client(uri)
    with translated():
        experiment = client.get_experiment_by_name(sweep)
        if experiment is None:
            # A server picks the place for files; a bare database would take the current folder.
            place = (Path(uri.removeprefix(SQLITE)).parent / "artifacts" / sweep).as_uri() if uri.startswith(SQLITE) else None
            return str(client.create_experiment(sweep, artifact_location=place, tags=_EXPERIMENT_TAGS | views(()))), client
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
    """Raises MLflow's own errors, as all that follows does: call it within `translated`."""
    from mlflow.entities import Param

    entities = [Param(name, value) for name, value in params.items()]
    for i in range(0, len(entities), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entities[i : i + _PARAMS_PER_BATCH], synchronous=True)


def write_tags(client: Client, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)


def write_values(client: Client, run_id: str, values: Sequence[MetricValue]) -> None:
    """At most LONGEST_BATCH."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(v.key, v.value, v.time_ms, v.step) for v in values], synchronous=True)


def write_data(client: Client, run_id: str, data: Sequence[DatasetInput]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(
        run_id,
        [
            DatasetInput(
                Dataset(found.name, found.digest, "rrn-sweep", found.source, profile=found.profile),
                [InputTag("mlflow.data.context", found.context)],
            )
            for found in data
        ],
    )


@contextmanager
def translated() -> Iterator[None]:
    """MLflow's errors as Away, Gone or TrackingError."""
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
    """The error's text, fit for a log."""
    return without_password(" ".join(str(error).split()))[:400]


def _client(uri: str) -> Client:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # importing MLflow gives them handlers of their own; what goes wrong is reported here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri)
    try:
        _check_database(Path(uri.removeprefix(SQLITE)))
        return MlflowClient(tracking_uri=uri)
    except Exception as error:  # of SQLAlchemy, Alembic or MLflow: a database that does not open now never will
        raise TrackingError(f"cannot use the MLflow database {uri}: {one_line(error)}") from error


def _check_database(path: Path) -> None:
    """Raise OSError or sqlite3.Error at once where MLflow would try for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()
