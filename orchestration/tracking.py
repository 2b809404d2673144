"""Shows a sweep in MLflow: a view of the store that one thread of the driver keeps up to date and that can always be rebuilt."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.experiment import SQLITE, Abandoned, Away, Experiment, Gone, find_experiment, one_line, open_experiment, translated
from orchestration.manifest import SCORE, Manifest, read_manifests
from orchestration.runview import KIND, run_view, sweep_status
from orchestration.store import Store

log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0  # between attempts while MLflow is away; each pause is twice the one before
_DEFAULT_PORT = 5000


@dataclass(frozen=True)
class Synced:
    """What `sync` found and did."""

    runs: int
    """Runs looked at, with the sweep's own."""
    created: int
    closed: int
    """Runs that a dead driver had left running."""
    points: int
    """Metric values that MLflow lacked."""

    def __str__(self) -> str:
        return f"MLflow: {self.runs} runs looked at, {self.created} created, {self.closed} closed, {self.points} points added"


def sync(uri: str, sweep: str, store: Store, *, trial_ids: Collection[str] | None = None) -> Synced:
    """Make MLflow equal to the store, for every trial of the sweep; no driver may be at work on it.

    Args:
        trial_ids: those by which the sweep's own run is judged: all that the file asks for; unset, all that have ever started.

    Raises:
        TrackingError: MLflow is away, or refuses a trial; whatever it took stays.
        StoreError: the store is away, or holds a manifest that cannot be read.
    """
    manifests = read_manifests(store, sweep)
    try:
        return _synced(_checked(uri), sweep, store.uri, manifests, trial_ids=manifests if trial_ids is None else trial_ids)
    except Away as error:
        raise TrackingError(f"MLflow at {without_password(uri)} is away: {error}; nothing is lost, sync again when it is back") from error


def ui_command(uri: str, *, port: int = _DEFAULT_PORT) -> str:
    """The shell command that serves the UI of a SQLite database; the address of a server that is already there."""
    if not uri.startswith(SQLITE):
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
        self._uri, self._sweep, self._store, self._read = _checked(uri), sweep, store, read
        self._tags, self._description = dict(tags), description
        self._experiment: Experiment | None = None
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
        """Show how every trial and the sweep ended. Returns the trials of which MLflow lacks something after `timeout_s`.

        Of an abandoned tracker nothing more is told or awaited: all its trials may lack something.
        """
        if self._abandoned.is_set() and not self._ended:
            return list(self._known)
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

    def abandon(self, *, timeout_s: float = 5.0) -> None:
        """Stop at once and write nothing more: another driver is MLflow's writer now. Waits at most so long for a call under way."""
        self._abandoned.set()
        with self._change:
            self._closing.set()  # wakes a pause
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def comparison_url(self) -> str | None:
        """The page with the charts of all trials, in the UI that `ui_command` names; None until MLflow has answered.

        Sorted by a metric the UI lists the trials flat; otherwise it folds them away below the sweep's own run.
        """
        base = f"http://127.0.0.1:{_DEFAULT_PORT}" if self._uri.startswith(SQLITE) else without_password(self._uri).rstrip("/")
        query = {
            "workflowType": "machine_learning",
            "compareRunsMode": "CHART",
            "searchFilter": f"tags.`{KIND}` = 'trial'",
            "orderByKey": f"metrics.`{SCORE}`",
            "orderByAsc": "false",
        }
        return self.experiment_id and f"{base}/#/experiments/{self.experiment_id}/runs?{urlencode(query, quote_via=quote)}"

    def _work(self) -> None:
        """The thread. It catches everything: neither an outage nor a bug of MLflow may end a sweep."""
        try:
            self._keep_up()
        except Abandoned:
            log.debug("tracking was abandoned")
        except TrackingError as error:
            log.warning("%s; MLflow is not told any more, the sweep goes on", error)
        except Exception as error:
            log.warning("tracking gave up, the sweep goes on: %s: %s", type(error).__name__, one_line(error))
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
            except (Away, Gone) as error:
                self._lose(error)
                self._pause(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _show_pending(self) -> None:
        """Show whatever is pending, and how the sweep ended once it is closed."""
        self._connected()
        while (trial_id := self._take()) is not None:
            self._show_again(trial_id)
        if self._closing.is_set() and not self._pending and not self._abandoned.is_set():
            with self._change:
                statuses = {self._settled.get(trial_id) for trial_id in self._known}
            with translated():
                self._connected().end(sweep_status(statuses))
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
        except Gone:
            self._experiment = None
            try:
                self._show(trial_id)
            except Gone as error:
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
        with translated():
            experiment.show(trial_id, view)
        if not live or (view and view.status == "FINISHED"):
            with self._change:
                self._settled[trial_id] = view.status if view else ""

    def _connected(self) -> Experiment:
        """The experiment; when it had to be looked up, every trial is pending, and so are those that a dead driver left RUNNING."""
        if self._experiment is None:
            experiment = open_experiment(self._uri, self._sweep, tags=self._tags, description=self._description, abandoned=self._abandoned)
            with translated():
                experiment.begin()
            with self._change:
                self._pending |= self._known | dict.fromkeys(experiment.running())
                self._settled.clear()
            self._experiment = experiment
            self.experiment_id, self.parent_run_id = experiment.id, experiment.parent_id
        return self._experiment

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


def make_experiment(uri: str, sweep: str) -> None:
    """Find or make the sweep's experiment, as its first run would: proves that MLflow is there and may be written to.

    Raises:
        TrackingError: it is not, whatever the reason.
    """
    try:
        find_experiment(uri, sweep)
    except (Away, Gone) as error:
        raise TrackingError(f"{error}; is it up, and the address right?") from error


def _checked(uri: str) -> str:
    if not re.match(r"sqlite:////.|https?://[^/]", uri):
        raise TrackingError(f"tracking: must be sqlite:////absolute/path.db or http(s)://host..., got {without_password(uri)!r}")
    return uri


def _synced(uri: str, sweep: str, store: str, manifests: Mapping[str, Manifest], *, trial_ids: Collection[str]) -> Synced:
    """Raises TrackingError, Away."""
    views = {trial_id: run_view(manifest, store=store, live=False) for trial_id, manifest in manifests.items()}
    began_ms = min((manifest.created_ms for manifest in manifests.values()), default=None)
    experiment = open_experiment(uri, sweep, tags={}, start_ms=began_ms)
    refused = []
    for trial_id in sorted({*views, *experiment.trial_ids}):
        try:
            with translated():
                experiment.show(trial_id, views.get(trial_id), thorough=True)
        except Gone as error:
            refused.append(f"{trial_id}: {error}")
    judged = [manifests[trial_id] for trial_id in trial_ids if trial_id in manifests]
    ended_ms = max((manifest.updated_ms for manifest in judged), default=None)
    with translated():
        experiment.end(sweep_status({views[trial_id].status if trial_id in views else None for trial_id in trial_ids}), end_ms=ended_ms)
    if refused:
        raise TrackingError(f"MLflow at {without_password(uri)} refused {len(refused)} trials: {'; '.join(refused)}")
    return Synced(len(experiment.trial_ids) + 1, experiment.created, experiment.left_running, experiment.points)
