"""Shows a sweep in MLflow: a view of the store that one thread of the driver keeps up to date and that can always be rebuilt."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.manifest import SCORE, Checkpoint, Entry, Manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0  # between attempts while MLflow is away; each pause is twice the one before
_SQLITE = "sqlite:///"
_DEFAULT_PORT = 5000
_PARENT, _KIND, _LOGGED = "mlflow.parentRunId", "rrn.kind", "rrn.logged_epoch"
_LONGEST_PARAM, _LONGEST_TAG = 6000, 5000  # characters; MLflow takes 6000 and 8000
_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000  # what MLflow takes
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # the UI opens it in its training mode, not in the one for language models
    "mlflow.experiment.primaryMetric.name": SCORE,
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
}


@dataclass(frozen=True)
class RunView:
    """What the MLflow run of a trial, or of the whole sweep, has to show."""

    name: str
    status: str
    tags: Mapping[str, str]
    start_ms: int | None = None
    end_ms: int | None = None
    """None while it runs, or where MLflow's clock shall tell; so is `start_ms`."""
    params: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Entry, ...] = ()


def run_view(manifest: Manifest, *, store: str, live: bool) -> RunView:
    """What MLflow has to show of a trial; an unfinished one is RUNNING while a driver is `live`, else KILLED."""
    unfinished = "RUNNING" if live else "KILLED"
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(manifest.status, unfinished)
    return RunView(
        name=manifest.label,
        status=status,
        tags=_trial_tags(manifest, store),
        start_ms=manifest.created_ms,
        end_ms=None if status == "RUNNING" else manifest.updated_ms,
        params={name: _text(value)[:_LONGEST_PARAM] for name, value in manifest.config.items()},
        points=manifest.history,
    )


def ui_command(uri: str, *, port: int = _DEFAULT_PORT) -> str:
    """The shell command that serves the UI of a SQLite database; the address of a server that is already there."""
    if not uri.startswith(_SQLITE):
        return without_password(uri)
    # By default MLflow starts a job runner and four workers, which take 2.6 GB.
    command = f"{shlex.quote(sys.executable)} -m mlflow server"
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {command} --backend-store-uri {shlex.quote(uri)} --workers 1 --port {port}"


class Tracker:
    """Keeps the MLflow experiment of a sweep equal to the store, in its own thread: the sweep never waits for it and never fails by it.

    Args:
        uri: `sqlite:////absolute/path.db`, or the address of an MLflow server.
        store: the store's URI, for the tags that say where checkpoints lie.
        read: a trial's manifest, None where it never started; may raise SweepError.
        tags: who runs which code; set anew on a trial that has started another attempt.
        description: a text for the sweep's own run.

    Raises:
        TrackingError: `uri` is neither of the two.
    """

    def __init__(
        self, uri: str, *, sweep: str, store: str, read: Callable[[str], Manifest | None], tags: Mapping[str, str], description: str = ""
    ) -> None:
        if not re.match(r"sqlite:////.|https?://[^/]", uri):
            raise TrackingError(f"tracking: must be sqlite:////absolute/path.db or http(s)://host..., got {without_password(uri)!r}")
        self._uri, self._sweep, self._store, self._read = uri, sweep, store, read
        self._tags, self._description = dict(tags), description
        self._experiment: _Experiment | None = None
        self._away = self._ended = False
        self._refused: set[str] = set()
        self._known: dict[str, None] = {}  # dicts serve as ordered sets; `_change` guards the three
        self._pending: dict[str, None] = {}
        self._settled: dict[str, str] = {}  # trials of which MLflow holds the last word, and which status that is
        self._change = threading.Condition()
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self.experiment_id: str | None = None
        self.parent_run_id: str | None = None
        """Like `experiment_id`, None until MLflow has answered."""

    def start(self, trial_ids: Sequence[str]) -> None:
        """Start the thread; it first brings MLflow up to date with these trials."""
        with self._change:
            self._known |= dict.fromkeys(trial_ids)
            self._pending |= self._known
        self._thread.start()

    def notify(self, trial_id: str) -> None:
        """Something of this trial was committed. Any thread may say so; this never blocks and never raises."""
        with self._change:
            self._known[trial_id] = self._pending[trial_id] = None
            self._change.notify()

    def close(self, *, timeout_s: float) -> list[str]:
        """Show how every trial and the sweep ended. Returns the trials of which MLflow lacks something after `timeout_s`."""
        with self._change:
            self._pending |= {trial_id: None for trial_id in self._known if trial_id not in self._settled}
            self._closing.set()
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._abandoned.set()
        with self._change:
            behind = [trial_id for trial_id in self._known if trial_id not in self._settled] or ([] if self._ended else list(self._known))
        if behind:
            log.warning("MLflow lacks something of %d of %d trials; the next run of this sweep adds it", len(behind), len(self._known))
        return behind

    @property
    def comparison_url(self) -> str | None:
        """The page with the charts of all trials, in the UI that `ui_command` names; None until MLflow has answered.

        Sorted by a metric the UI lists the trials flat; otherwise it folds them away below the sweep's own run.
        """
        base = f"http://127.0.0.1:{_DEFAULT_PORT}" if self._uri.startswith(_SQLITE) else without_password(self._uri).rstrip("/")
        query = {
            "workflowType": "machine_learning",
            "compareRunsMode": "CHART",
            "searchFilter": f"tags.`{_KIND}` = 'trial'",
            "orderByKey": f"metrics.`{SCORE}`",
            "orderByAsc": "false",
        }
        return self.experiment_id and f"{base}/#/experiments/{self.experiment_id}/runs?{urlencode(query, quote_via=quote)}"

    def _work(self) -> None:
        """The thread. It catches everything: neither an outage nor a bug of MLflow may end a sweep."""
        try:
            self._keep_up()
        except TrackingError as error:
            log.warning("%s; MLflow is not told any more, the sweep goes on", error)
        except Exception as error:
            log.warning("tracking gave up, the sweep goes on: %s: %s", type(error).__name__, _line(error))
            log.debug("tracking gave up", exc_info=True)

    def _keep_up(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._abandoned.is_set():
            try:
                self._show_pending()
                if self._ended:
                    return
                wait_s = _FIRST_WAIT_S
                with self._change:
                    self._change.wait_for(lambda: self._pending or self._closing.is_set())
            except (_Away, _Gone) as error:
                self._lose(error)
                self._pause(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _show_pending(self) -> None:
        """Show whatever is pending, and how the sweep ended once it is closed."""
        self._connected()
        while (trial_id := self._take()) is not None:
            self._show_again(trial_id)
        if self._closing.is_set() and not self._pending and not self._abandoned.is_set():
            with _translated():
                self._connected().end(self._outcome())
            self._ended = True
        if self._away:
            log.warning("MLflow answers again and is up to date")
            self._away = False

    def _take(self) -> str | None:
        with self._change:
            trial_id = None if self._abandoned.is_set() else next(iter(self._pending), None)
            if trial_id is not None:
                del self._pending[trial_id]
            return trial_id

    def _show_again(self, trial_id: str) -> None:
        """Show a trial; if its run was deleted meanwhile, look at the experiment afresh and make a new one."""
        if trial_id in self._refused:
            return
        try:
            self._show(trial_id)
        except _Gone:
            self._experiment = None
            try:
                self._show(trial_id)
            except _Gone as error:
                self._refused.add(trial_id)
                log.warning("trial %s cannot be shown in MLflow: %s", trial_id, error)

    def _show(self, trial_id: str) -> None:
        experiment = self._connected()
        live = trial_id in self._known and not self._closing.is_set()  # before reading: what is closed later is shown again
        try:
            manifest = self._read(trial_id)
        except SweepError as error:
            log.warning("trial %s cannot be shown in MLflow for now: %s", trial_id, error)
            return
        view = run_view(manifest, store=self._store, live=live) if manifest else None
        with _translated():
            experiment.show(trial_id, view)
        if not live or (view and view.status == "FINISHED"):
            with self._change:
                self._settled[trial_id] = view.status if view else ""

    def _connected(self) -> _Experiment:
        """The experiment; when it had to be looked up, every trial is pending, and so are those that a dead driver left RUNNING."""
        if self._experiment is None:
            experiment = _open_experiment(self._uri, self._sweep, tags=self._tags, description=self._description)
            with self._change:
                self._pending |= self._known | dict.fromkeys(experiment.running())
                self._settled.clear()
            self._experiment = experiment
            self.experiment_id, self.parent_run_id = experiment.id, experiment.parent_id
        return self._experiment

    def _outcome(self) -> str:
        with self._change:
            statuses = {self._settled.get(trial_id) for trial_id in self._known}
        return "FAILED" if "FAILED" in statuses else "FINISHED" if statuses == {"FINISHED"} else "KILLED"

    def _lose(self, error: Exception) -> None:
        """Forget what was found: after an outage runs may be missing, or exist although the reply was lost."""
        self._experiment = None
        if not self._away:
            log.warning("MLflow at %s is away, the sweep goes on and tracking catches up later: %s", without_password(self._uri), error)
        self._away = True

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._abandoned.wait(_FIRST_WAIT_S)
        else:
            self._closing.wait(seconds)


@dataclass(frozen=True)
class _Run:
    """A run as MLflow has it."""

    run_id: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]


class _Experiment:
    """The sweep's experiment in MLflow, as one search found it and as changed since; it writes only what differs."""

    def __init__(self, client: MlflowClient, experiment_id: str, *, sweep: RunView, tags: Mapping[str, str]) -> None:
        self.id, self._client, self._sweep, self._tags = experiment_id, client, sweep, tags
        runs = sorted(self._search(), key=lambda run: (run.start_ms, run.run_id))
        self._trials: dict[str, list[_Run]] = {}
        for run in runs:
            if run.tags.get(_KIND) == "trial":
                self._trials.setdefault(run.tags.get("trial_id", ""), []).append(run)
        parent = next((run for run in runs if run.tags.get(_KIND) == "sweep"), None)
        self._parent = self._update(parent or self._create(sweep, sweep.tags), sweep, sweep.tags)

    @property
    def parent_id(self) -> str:
        return self._parent.run_id

    def running(self) -> list[str]:
        """Trials that MLflow believes to be running."""
        return [trial_id for trial_id, runs in self._trials.items() if any(run.status == "RUNNING" for run in runs)]

    def show(self, trial_id: str, view: RunView | None) -> None:
        """Make the trial's one run equal to `view`; None: the store knows no such trial."""
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
        self._trials[trial_id] = [self._update(run, view, tags)]

    def end(self, status: str) -> None:
        """Close the sweep's own run."""
        self._parent = self._update(self._parent, replace(self._sweep, status=status), self._sweep.tags)

    def _search(self) -> Iterator[_Run]:
        token: str | None = None
        while token != "":
            page = self._client.search_runs([self.id], max_results=1000, page_token=token)
            yield from map(_known_run, page)
            token = page.token or ""

    def _create(self, view: RunView, tags: Mapping[str, str]) -> _Run:
        return _known_run(self._client.create_run(self.id, start_time=view.start_ms, tags=dict(tags), run_name=view.name))

    def _supersede(self, run: _Run) -> None:
        """A run that a lost reply left twice, or whose trial was started afresh in the store; it stays, under another kind."""
        self._set_status(run, "KILLED", None) if run.status == "RUNNING" else None
        self._tag(run, {_KIND: "superseded"})

    def _update(self, run: _Run, view: RunView, tags: Mapping[str, str]) -> _Run:
        self._log_params(run, view.params)
        for epoch, metrics in _batches(view.points, after=_logged_epoch(run)):
            self._client.log_batch(run.run_id, metrics=metrics, synchronous=True)
            # Its own call: were it sent along, MLflow might keep the tag of a batch of which it lost a part.
            run = self._tag(run, {**tags, _LOGGED: str(epoch)})
        run = self._tag(run, tags)
        if "reason" in run.tags and "reason" not in tags:
            self._client.delete_tag(run.run_id, "reason")
            run = replace(run, tags={name: value for name, value in run.tags.items() if name != "reason"})
        return self._set_status(run, view.status, view.end_ms)

    def _log_params(self, run: _Run, params: Mapping[str, str]) -> None:
        """Log those that the run lacks: MLflow refuses to change one, and a driver may die between run and parameters."""
        from mlflow.entities import Param

        missing = [Param(name, value) for name, value in params.items() if name not in run.params]
        for i in range(0, len(missing), _PARAMS_PER_BATCH):
            self._client.log_batch(run.run_id, params=missing[i : i + _PARAMS_PER_BATCH], synchronous=True)

    def _tag(self, run: _Run, tags: Mapping[str, str]) -> _Run:
        from mlflow.entities import RunTag

        changed = {name: value for name, value in tags.items() if run.tags.get(name) != value}
        if changed:
            self._client.log_batch(run.run_id, tags=[RunTag(name, value) for name, value in changed.items()], synchronous=True)
        return replace(run, tags={**run.tags, **changed})

    def _set_status(self, run: _Run, status: str, end_ms: int | None) -> _Run:
        if run.status == status and end_ms in (None, run.end_ms):
            return run
        if status == "RUNNING":
            self._client.update_run(run.run_id, status=status)
        else:
            self._client.set_terminated(run.run_id, status=status, end_time=end_ms)
        return replace(run, status=status, end_ms=end_ms)


def _open_experiment(uri: str, sweep: str, *, tags: Mapping[str, str], description: str) -> _Experiment:
    """Find or make the experiment and the sweep's run in it. Raises TrackingError where waiting would not help, _Away where it may."""
    tags = {name: value[:_LONGEST_TAG] for name, value in tags.items() if value}
    note = {"mlflow.note.content": description[:_LONGEST_TAG]} if description else {}
    parent = RunView(name=sweep, status="RUNNING", tags={**tags, **note, _KIND: "sweep", "sweep": sweep})
    client = _client(uri)
    try:
        with _translated():
            return _Experiment(client, _experiment_id(client, uri, sweep), sweep=parent, tags=tags)
    except _Gone as error:
        raise TrackingError(f"MLflow at {without_password(uri)} refused the experiment {sweep}: {error}") from error


def make_experiment(uri: str, sweep: str) -> None:
    """Find or make the sweep's experiment, as its first run would: proves that MLflow is there and may be written to.

    Raises:
        TrackingError: it is not, whatever the reason.
    """
    try:
        with _translated():
            _experiment_id(_client(uri), uri, sweep)
    except (_Away, _Gone) as error:
        raise TrackingError(f"{error}; is it up, and the address right?") from error


def _client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # importing MLflow gives them handlers of their own; what goes wrong is reported here
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not uri.startswith(_SQLITE):
        return MlflowClient(tracking_uri=uri)
    try:
        _check_database(Path(uri.removeprefix(_SQLITE)))
        return MlflowClient(tracking_uri=uri)
    except Exception as error:  # of SQLAlchemy, Alembic or MLflow: a database that does not open now never will
        raise TrackingError(f"cannot use the MLflow database {uri}: {_line(error)}") from error


def _check_database(path: Path) -> None:
    """Raise OSError or sqlite3.Error at once where MLflow would try for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=20)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()


def _experiment_id(client: MlflowClient, uri: str, sweep: str) -> str:
    experiment = client.get_experiment_by_name(sweep)
    if experiment is None:
        # A server picks the place for artifacts; a bare database would take the current folder. The project stores none.
        place = (Path(uri.removeprefix(_SQLITE)).parent / "artifacts" / sweep).as_uri() if uri.startswith(_SQLITE) else None
        return str(client.create_experiment(sweep, artifact_location=place, tags=dict(_EXPERIMENT_TAGS)))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _known_run(run: MlflowRun) -> _Run:
    info, data = run.info, run.data
    return _Run(info.run_id, info.status, info.start_time, info.end_time, dict(data.tags), dict(data.params))


def _batches(points: Sequence[Entry], *, after: int) -> Iterator[tuple[int, list[Metric]]]:
    """The metrics of the epochs after `after`, in batches that MLflow takes; with each the epoch up to which all is logged then."""
    from mlflow.entities import Metric

    rows = [(point, name) for point in points if point.epoch > after for name in sorted(point.metrics)]
    for i in range(0, len(rows), _METRICS_PER_BATCH):
        batch = rows[i : i + _METRICS_PER_BATCH]
        last = batch[-1][0].epoch
        complete = last if i + _METRICS_PER_BATCH >= len(rows) else last - 1
        yield complete, [Metric(name, point.metrics[name], point.time_ms, point.epoch) for point, name in batch]


def _logged_epoch(run: _Run) -> int:
    text = run.tags.get(_LOGGED, "0")
    return int(text) if text.isdecimal() else 0


def _trial_tags(manifest: Manifest, store: str) -> dict[str, str]:
    tags: dict[str, Any] = {"sweep": manifest.sweep, "trial_id": manifest.trial_id, _KIND: "trial", "attempt": manifest.attempt}
    tags |= {name: manifest.config[name] for name in ("partition", "seed", "method", "dataset") if name in manifest.config}
    tags |= {"proposal": manifest.proposal} if manifest.proposal is not None else {}
    tags |= {"reason": manifest.reason} if manifest.reason else {}
    if manifest.checkpoints:
        tags["checkpoint_last"] = _folder(max(manifest.checkpoints, key=lambda c: c.step), store)
    if manifest.best_checkpoint:
        tags["checkpoint_best"] = _folder(manifest.best_checkpoint, store)
    return {name: _text(value)[:_LONGEST_TAG] for name, value in tags.items()}


def _folder(checkpoint: Checkpoint, store: str) -> str:
    key = min(ref.key for ref in checkpoint.objects.values())
    return f"{store.rstrip('/')}/{key.rpartition('/')[0]}"


def _text(value: Any) -> str:
    """A setting as it stands in YAML: texts bare, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


class _Away(Exception):  # noqa: N818
    """MLflow gave no answer, or one that may be better next time."""


class _Gone(Exception):  # noqa: N818
    """MLflow knows no such run any more, or takes exception to what is written to it."""


@contextmanager
def _translated() -> Iterator[None]:
    """MLflow's errors as _Away, _Gone or TrackingError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND"):
            raise TrackingError(f"MLflow refused: {_line(error)}") from error
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST"):
            raise _Gone(_line(error)) from error
        raise _Away(_line(error)) from error


def _line(error: Exception) -> str:
    return without_password(" ".join(str(error).split()))[:400]
