"""MLflow's client: find or create a sweep's experiment, write to its runs, sort errors by what helps against them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from orchestration.errors import TrackingError
from orchestration.plan.tracking_address import database_of
from orchestration.record.manifest import SCORE
from orchestration.tracking.artifacts import ArtifactsUnavailable, try_storing
from orchestration.tracking.dataset_inputs import UsedData
from orchestration.tracking.mlflow_private import (
    DATA_CONTEXT,
    PARAMS_PER_BATCH,
    error_text,
    experiment_tags,
    relocate,
    schema_age,
)
from orchestration.tracking.ui_links import views

if TYPE_CHECKING:
    from mlflow import MlflowClient

    Client = MlflowClient


class MlflowUnavailable(Exception):  # noqa: N818
    """MLflow does not answer, or answers with an error that may pass."""


class RunGone(Exception):  # noqa: N818
    """MLflow has no such run, or refuses what is written to it."""


class TrackingAbandoned(Exception):  # noqa: N818
    """Another driver is MLflow's writer now: nothing may be written."""


def find_experiment(uri: str, sweep: str) -> tuple[str, Client]:
    """The sweep's experiment; created if absent, restored if deleted. Raises TrackingError, MlflowUnavailable, RunGone."""
    client = _client(uri)
    with translated():
        experiment = client.get_experiment_by_name(sweep)
        if experiment is None:
            # a server has its own place for files; with a bare database MLflow would take the current folder
            database = database_of(uri)
            place = _files_of(database, sweep).as_uri() if database else None
            return str(client.create_experiment(sweep, artifact_location=place, tags=experiment_tags(SCORE) | views(()))), client
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id), client


def known_experiment(uri: str, sweep: str) -> str | None:
    """The ID of the sweep's experiment; None before its first run. Creates none. Raises TrackingError, MlflowUnavailable, RunGone."""
    client = _client(uri)
    with translated():
        experiment = client.get_experiment_by_name(sweep)
        return str(experiment.experiment_id) if experiment else None


def make_experiment(uri: str, sweep: str) -> str:
    """Find or create the sweep's experiment, as its first run would, and store a file there. Returns a file that could not be deleted.

    Raises:
        TrackingError: MLflow does not answer or refuses, for any reason.
    """
    try:
        experiment_id, client = find_experiment(uri, sweep)
        with translated():
            place = client.get_experiment(experiment_id).artifact_location
    except (MlflowUnavailable, RunGone) as error:
        raise TrackingError(f"{error}; check that MLflow is running and that the address is right") from error
    try:
        return try_storing(uri, place)
    except ArtifactsUnavailable as error:
        raise TrackingError(f"files cannot be stored in {place}: {error}") from error


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


def write_data(client: Client, run_id: str, data: Sequence[UsedData]) -> None:
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
            raise TrackingError(f"MLflow refused: {error_text(error)}") from error
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST"):
            raise RunGone(error_text(error)) from error
        raise MlflowUnavailable(error_text(error)) from error


def _client(uri: str) -> Client:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they print to stderr on their own; errors are reported here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    database = database_of(uri)
    return _opened(uri, database) if database else MlflowClient(tracking_uri=uri)


def _opened(uri: str, database: Path) -> Client:
    from mlflow import MlflowClient
    from sqlalchemy.exc import OperationalError

    where = f"the MLflow database {uri}"
    try:
        if age := schema_age(uri):
            remedy = {
                "older": f"an older release of MLflow wrote it; back it up, then run: mlflow db upgrade {shlex.quote(uri)}",
                "newer": "a newer release of MLflow wrote it; install that release or a later one",
            }
            raise TrackingError(f"cannot use {where}: {remedy[age]}")
        with translated():
            client = MlflowClient(tracking_uri=uri)
            relocate(client, lambda location, name: _moved(location, _files_of(database, name)))
            return client
    except (TrackingError, MlflowUnavailable):
        raise
    except OperationalError as error:  # locked, no space, no permission: all may pass
        raise MlflowUnavailable(f"{where}: {error_text(error)}") from error
    except Exception as error:  # of SQLAlchemy, Alembic or MLflow; waiting would not help
        raise TrackingError(f"cannot use {where}: {error_text(error)}") from error


def _files_of(database: Path, sweep: str) -> Path:
    """The folder of a sweep's files, beside the database."""
    return database.parent / "artifacts" / sweep


def _moved(location: str, ours: Path) -> str | None:
    """Where an experiment's files are now, if the folder of the database was moved since."""
    parts = urlsplit(location)
    before = Path(unquote(parts.path)) if parts.scheme == "file" else None
    if before is None or before == ours or before.parts[-2:] != ours.parts[-2:] or (before.exists() and not ours.exists()):
        return None
    return ours.as_uri()
