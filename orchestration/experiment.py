"""A sweep's experiment in MLflow: writes only what differs from what is to be shown, so that a replay adds nothing."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.errors import TrackingError, without_password
from orchestration.manifest import SCORE
from orchestration.runview import KIND, LONGEST_TAG, Point, RunView

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

SQLITE = "sqlite:///"
_PARENT = "mlflow.parentRunId"
_PASSING_TAGS = ("failure", "reason")  # deleted when they no longer hold
_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000  # what MLflow takes
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # the UI opens it in its training mode, not in the one for language models
    "mlflow.experiment.primaryMetric.name": SCORE,
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}


class Away(Exception):  # noqa: N818
    """MLflow gave no answer, or one that may be better next time."""


class Gone(Exception):  # noqa: N818
    """MLflow knows no such run any more, or takes exception to what is written to it."""


class Abandoned(Exception):  # noqa: N818
    """Nothing may be written any more."""


@dataclass(frozen=True)
class _Run:
    """A run as MLflow has it."""

    run_id: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]


class Experiment:
    """The sweep's experiment in MLflow, as one search found it and as changed since; it writes only what differs.

    Every method may raise Abandoned once `abandoned` is set, and MLflow's own errors: call them within `translated`.
    """

    def __init__(
        self, client: MlflowClient, experiment_id: str, *, sweep: RunView, tags: Mapping[str, str], abandoned: threading.Event
    ) -> None:
        self.id, self._reader, self._sweep, self._tags, self._abandoned = experiment_id, client, sweep, tags, abandoned
        self.created = self.points = 0
        """Runs created and points added so far."""
        runs = sorted(self._search(), key=lambda run: (run.start_ms, run.run_id))
        parents = [run for run in runs if run.tags.get(KIND) == "sweep"]
        self._trials: dict[str, list[_Run]] = {}
        for run in runs:
            if run.tags.get(KIND) == "trial":
                self._trials.setdefault(run.tags.get("trial_id", ""), []).append(run)
        self.left_running = sum(run.status == "RUNNING" for run in (*parents, *(run for found in self._trials.values() for run in found)))
        """Runs that MLflow believed to be running when the experiment was opened."""
        for run in parents[1:]:
            self._supersede(run)
        self._parent = self._tag(parents[0] if parents else self._create(sweep, sweep.tags), sweep.tags)

    @property
    def parent_id(self) -> str:
        return self._parent.run_id

    @property
    def trial_ids(self) -> list[str]:
        """Trials of which MLflow has a run."""
        return list(self._trials)

    def running(self) -> list[str]:
        """Trials that MLflow believes to be running."""
        return [trial_id for trial_id, runs in self._trials.items() if any(run.status == "RUNNING" for run in runs)]

    def begin(self) -> None:
        """A driver works on the sweep."""
        self._parent = self._set_status(self._parent, "RUNNING", None)

    def show(self, trial_id: str, view: RunView | None, *, thorough: bool = False) -> None:
        """Make the trial's one run equal to `view`; None: the store knows no such trial.

        Args:
            thorough: look at every point that MLflow holds, instead of trusting the tag that says up to where they are there.
        """
        found = self._trials.get(trial_id, [])
        if view is None:
            self._trials[trial_id] = [self._set_status(run, "KILLED", None) if run.status == "RUNNING" else run for run in found]
            return
        same = [run for run in found if run.start_ms == view.start_ms]
        for run in found:
            if run not in same[:1]:
                self._supersede(run)
        tags = {**view.tags, _PARENT: self.parent_id}
        run = same[0] if same else self._create(view, {**self._tags, **tags})
        if run.tags.get("attempt") != tags["attempt"]:
            tags = {**self._tags, **tags}
        self._trials[trial_id] = [self._update(run, view, tags, thorough=thorough)]

    def end(self, status: str, *, end_ms: int | None = None) -> None:
        """Close the sweep's own run, unless it is closed so."""
        if self._parent.status != status:
            self._parent = self._set_status(self._parent, status, end_ms)

    @property
    def _writer(self) -> MlflowClient:
        if self._abandoned.is_set():
            raise Abandoned
        return self._reader

    def _search(self) -> Iterator[_Run]:
        token: str | None = None
        while token != "":
            page = self._reader.search_runs([self.id], max_results=1000, page_token=token)
            yield from map(_known_run, page)
            token = page.token or ""

    def _create(self, view: RunView, tags: Mapping[str, str]) -> _Run:
        run = _known_run(self._writer.create_run(self.id, start_time=view.start_ms, tags=dict(tags), run_name=view.name))
        self.created += 1
        return run

    def _supersede(self, run: _Run) -> None:
        """A run that a lost reply left twice, or whose trial was started afresh in the store; it stays, under another kind."""
        if run.status == "RUNNING":
            self._set_status(run, "KILLED", None)
        self._tag(run, {KIND: "superseded"})

    def _update(self, run: _Run, view: RunView, tags: Mapping[str, str], *, thorough: bool) -> _Run:
        self._log_params(run, view.params)
        for tag, points in view.series.items():
            self._log_points(run, points, after=None if thorough else _logged(run, tag))
        # Its own call, afterwards: were it sent along, MLflow might keep the tag of a batch of which it lost a part.
        run = self._tag(run, {**tags, **{tag: str(points[-1].step) for tag, points in view.series.items() if points}})
        for name in _PASSING_TAGS:
            if name in run.tags and name not in tags:
                self._writer.delete_tag(run.run_id, name)
                run = replace(run, tags={tag: value for tag, value in run.tags.items() if tag != name})
        return self._set_status(run, view.status, view.end_ms)

    def _log_params(self, run: _Run, params: Mapping[str, str]) -> None:
        """Log those that the run lacks: MLflow refuses to change one, and a driver may die between run and parameters."""
        from mlflow.entities import Param

        missing = [Param(name, value) for name, value in params.items() if name not in run.params]
        for i in range(0, len(missing), _PARAMS_PER_BATCH):
            self._writer.log_batch(run.run_id, params=missing[i : i + _PARAMS_PER_BATCH], synchronous=True)

    def _log_points(self, run: _Run, points: Sequence[Point], *, after: int | None) -> None:
        """Log the points after that step; None: those that MLflow lacks."""
        metrics = _metrics(point for point in points if after is None or point.step > after)
        if after is None:
            there = {(m.key, m.step, m.timestamp) for name in {m.key for m in metrics} for m in self._history(run, name)}
            metrics = [m for m in metrics if (m.key, m.step, m.timestamp) not in there]
        for i in range(0, len(metrics), _METRICS_PER_BATCH):
            self._writer.log_batch(run.run_id, metrics=metrics[i : i + _METRICS_PER_BATCH], synchronous=True)
        self.points += len(metrics)

    def _history(self, run: _Run, name: str) -> list[Metric]:
        return list(self._reader.get_metric_history(run.run_id, name))

    def _tag(self, run: _Run, tags: Mapping[str, str]) -> _Run:
        from mlflow.entities import RunTag

        changed = {name: value for name, value in tags.items() if run.tags.get(name) != value}
        if changed:
            self._writer.log_batch(run.run_id, tags=[RunTag(name, value) for name, value in changed.items()], synchronous=True)
        return replace(run, tags={**run.tags, **changed})

    def _set_status(self, run: _Run, status: str, end_ms: int | None) -> _Run:
        if run.status == status and end_ms in (None, run.end_ms):
            return run
        if status == "RUNNING":
            self._writer.update_run(run.run_id, status=status)
        else:
            self._writer.set_terminated(run.run_id, status=status, end_time=end_ms)
        return replace(run, status=status, end_ms=end_ms)


def open_experiment(
    uri: str,
    sweep: str,
    *,
    tags: Mapping[str, str],
    description: str = "",
    start_ms: int | None = None,
    abandoned: threading.Event | None = None,
) -> Experiment:
    """Find or make the experiment and the sweep's run in it. Raises TrackingError where waiting would not help, Away where it may."""
    tags = {name: value[:LONGEST_TAG] for name, value in tags.items() if value}
    note = {"mlflow.note.content": description[:LONGEST_TAG]} if description else {}
    parent = RunView(name=sweep, status="RUNNING", tags={**tags, **note, KIND: "sweep", "sweep": sweep}, start_ms=start_ms)
    try:
        experiment_id, client = find_experiment(uri, sweep)
        with translated():
            return Experiment(client, experiment_id, sweep=parent, tags=tags, abandoned=abandoned or threading.Event())
    except Gone as error:
        raise TrackingError(f"MLflow at {without_password(uri)} refused the experiment {sweep}: {error}") from error


def find_experiment(uri: str, sweep: str) -> tuple[str, MlflowClient]:
    """The sweep's experiment, restored or made where it is not there. Raises TrackingError, Away, Gone."""
    client = _client(uri)
    with translated():
        experiment = client.get_experiment_by_name(sweep)
        if experiment is None:
            # A server picks the place for artifacts; a bare database would take the current folder. The project stores none.
            place = (Path(uri.removeprefix(SQLITE)).parent / "artifacts" / sweep).as_uri() if uri.startswith(SQLITE) else None
            return str(client.create_experiment(sweep, artifact_location=place, tags=dict(_EXPERIMENT_TAGS))), client
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id), client


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
            raise Gone(one_line(error)) from error
        raise Away(one_line(error)) from error


def one_line(error: Exception) -> str:
    """The error's text, fit for a log."""
    return without_password(" ".join(str(error).split()))[:400]


def _client(uri: str) -> MlflowClient:
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


def _known_run(run: MlflowRun) -> _Run:
    info, data = run.info, run.data
    return _Run(info.run_id, info.status, info.start_time, info.end_time, dict(data.tags), dict(data.params))


def _metrics(points: Iterator[Point]) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(name, value, point.time_ms, point.step) for point in points for name, value in sorted(point.metrics.items())]


def _logged(run: _Run, tag: str) -> int:
    text = run.tags.get(tag, "0")
    return int(text) if text.isdecimal() else 0
