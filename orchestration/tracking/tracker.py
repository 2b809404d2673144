"""Keeps MLflow up to date with the store, in a thread of the driver. MLflow is a view that `sync` can always rebuild."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.plan.tracking_address import checked_address
from orchestration.record.manifest import Manifest
from orchestration.record.trial_state import TrialState
from orchestration.tracking.artifact_queue import ArtifactQueue
from orchestration.tracking.descriptions import SweepFacts, summary_of
from orchestration.tracking.experiment import (
    MlflowUnavailable,
    RunGone,
    TrackingAbandoned,
    translated,
)
from orchestration.tracking.mlflow_private import LONGEST_TAG, error_text
from orchestration.tracking.run_content import RunContent, run_content, sweep_state
from orchestration.tracking.run_files import CodeOrigin, Fetch, trial_files
from orchestration.tracking.runs import Runs, open_runs
from orchestration.tracking.sweep_run import Overview, SweepRun
from orchestration.tracking.ui_links import comparison_url, ui_base

log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0  # between attempts while MLflow does not answer; each pause is twice the one before
_PACKAGES = ("rrn-sweep", "ray", "mlflow", "torch", "numpy", "optuna")


class Tracker:
    """Keeps a sweep's MLflow experiment equal to the store, in its own thread. The sweep never waits for it or fails because of it.

    Args:
        uri: `sqlite:////absolute/path.db`, or the URL of an MLflow server.
        store: the store's URI, for the tags with the folders of checkpoints.
        read: returns a trial's manifest, None if it never started; may raise SweepError.
        fetch: reads an object of the store; from `run_files.stored`.
        driver: token of the driver. `tags` and `code` belong to the attempts that it started.
        tags: user, commit and the like.
        code: files by name, such as a `git.diff`; become files of each trial.
        facts: for the description of the sweep.
        overview: returns the files of the sweep's own run; called in the thread, every `sweep_run.EVERY_S` at most and at the end.

    Raises:
        TrackingError: `uri` is neither of the two.
    """

    def __init__(
        self,
        uri: str,
        *,
        sweep: str,
        store: str,
        read: Callable[[str], Manifest | None],
        fetch: Fetch,
        driver: int,
        tags: Mapping[str, str],
        code: Mapping[str, bytes] | None = None,
        facts: SweepFacts | None = None,
        overview: Overview | None = None,
    ) -> None:
        self._uri, self._sweep, self._store, self._read, self._fetch = checked_address(uri), sweep, store, read, fetch
        self._tags = {name: value[:LONGEST_TAG] for name, value in tags.items() if value}
        self._origin = CodeOrigin(driver, {**versions(), **tags}, code or {})
        self._sweep_run = SweepRun(sweep, facts or SweepFacts(), overview)
        self._files = ArtifactQueue()
        self._runs: Runs | None = None
        self._unavailable = self._closed = self._ended = False
        self._refused: set[str] = set()
        self._known: dict[str, None] = {}  # dicts serve as ordered sets; `_change` guards the three
        self._pending: dict[str, None] = {}
        self._settled: dict[str, TrialState] = {}  # trials whose final state MLflow shows
        self._change = threading.Condition()
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self.experiment_id: str | None = None
        """None until MLflow has answered."""

    def start(self, trial_ids: Sequence[str]) -> None:
        """Start the thread. It first brings MLflow up to date with these trials."""
        with self._change:
            self._known |= dict.fromkeys(trial_ids)
            self._pending |= self._known
        self._thread.start()

    def notify(self, trial_id: str) -> None:
        """Note that a checkpoint of this trial was committed, from any thread. Never blocks, never raises."""
        with self._change:
            self._known[trial_id] = self._pending[trial_id] = None
            self._change.notify()

    def close(self, *, timeout_s: float) -> list[str]:
        """Write the final state of every trial and of the sweep. Returns the trials that are incomplete in MLflow after `timeout_s`.

        An abandoned tracker writes nothing and returns all its trials.
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
            trials = [trial_id for trial_id in self._known if trial_id not in self._settled or self._files.is_pending(trial_id)]
            incomplete = trials or ([] if self._ended and not self._files.is_pending(None) else list(self._known))
        if incomplete:
            log.warning("MLflow lacks something of %d of %d trials; the next run of this sweep adds it", len(incomplete), len(self._known))
        return incomplete

    def abandon(self, *, timeout_s: float = 5.0) -> None:
        """Stop writing: another driver is MLflow's writer now. Waits at most `timeout_s` for a call that is under way."""
        self._abandoned.set()
        with self._change:
            self._closing.set()  # wakes a pause
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def comparison_url(self) -> str | None:
        """The page with the charts of all trials; None for a database, and until a server has answered."""
        base = ui_base(self._uri)
        return comparison_url(base, self.experiment_id) if base and self.experiment_id else None

    def _work(self) -> None:
        """Runs in the thread. It catches everything: neither an outage nor a bug of MLflow may end a sweep."""
        try:
            self._keep_up()
        except TrackingAbandoned:
            log.debug("tracking was abandoned")
        except TrackingError as error:
            log.warning("%s; tracking is off, the sweep continues", error)
        except Exception as error:
            log.warning("tracking failed and is off, the sweep continues: %s: %s", type(error).__name__, error_text(error))
            log.debug("tracking failed", exc_info=True)

    def _keep_up(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._abandoned.is_set():
            try:
                self._process_pending()
                if self._ended:
                    return
                wait_s = _FIRST_WAIT_S
                with self._change:
                    self._change.wait_for(lambda: self._pending or self._closing.is_set(), timeout=self._idle_s())
            except (MlflowUnavailable, RunGone) as error:
                self._lose(error)
                self._pause(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _idle_s(self) -> float | None:
        """Seconds until an update is due without a new notification; None: never."""
        due = [due_s for due_s in (self._sweep_run.due_s(), self._files.due_s()) if due_s is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _process_pending(self) -> None:
        """Write what is pending, and the end of the sweep once the tracker is being closed. Files come last: they may take long."""
        self._connected()
        while not self._abandoned.is_set():
            closing = self._closing.is_set()
            if (trial_id := self._take()) is not None:
                self._show_or_replace(trial_id)
            elif closing and not self._closed:
                self._end()
            elif self._sweep_run.is_due():
                self._update_sweep_run()
            elif not self._files.upload_next(self._connected()):
                self._ended = closing
                break
        if self._unavailable:
            log.warning("MLflow answers again and is up to date")
            self._unavailable = False

    def _end(self) -> None:
        with self._change:
            states = {self._settled.get(trial_id, TrialState.NEW) for trial_id in self._known}
        with translated():
            self._connected().end(sweep_state(states))
        self._closed = True
        self._sweep_run.update_now()
        self._files.retry_now()

    def _take(self) -> str | None:
        with self._change:
            trial_id = None if self._abandoned.is_set() else next(iter(self._pending), None)
            if trial_id is not None:
                del self._pending[trial_id]
            return trial_id

    def _show_or_replace(self, trial_id: str) -> None:
        """Show a trial. If its run was deleted in the meantime, search the experiment again and create a new run."""
        if trial_id in self._refused:
            return
        try:
            self._show(trial_id)
        except RunGone:
            self._runs = None
            try:
                self._show(trial_id)
            except RunGone as error:
                self._refused.add(trial_id)
                log.warning("trial %s: MLflow refused it: %s", trial_id, error)

    def _show(self, trial_id: str) -> None:
        runs = self._connected()
        live = (
            trial_id in self._known and not self._closing.is_set()
        )  # before reading: if the tracker is closed later, the trial is shown once more
        try:
            manifest = self._read(trial_id)
        except SweepError as error:
            log.warning("trial %s: not updated in MLflow for now: %s", trial_id, error)
            return
        content = self._content(manifest, live=live) if manifest else None
        with translated():
            runs.show(trial_id, content)
        if manifest and content:
            self._sweep_run.add(trial_id, summary_of(manifest, content.state))
            self._files.replace(trial_id, trial_files(manifest, self._fetch, live=live, origin=self._origin))
        if not live or (content and content.state is TrialState.FINISHED):
            with self._change:
                self._settled[trial_id] = content.state if content else TrialState.NEW

    def _content(self, manifest: Manifest, *, live: bool) -> RunContent:
        content = run_content(manifest, store=self._store, live=live)
        ours = manifest.attempts and manifest.attempts[-1].driver == self._origin.driver
        return replace(content, tags={**self._tags, **content.tags}) if ours else content

    def _update_sweep_run(self) -> None:
        with self._change:
            trial_ids = list(self._known)
        self._sweep_run.update(self._connected(), self._files, trial_ids)

    def _connected(self) -> Runs:
        """The runs. After a new search every trial is pending, and so are those that a dead driver left RUNNING."""
        if self._runs is None:
            runs = open_runs(self._uri, self._sweep, tags=self._tags, abandoned=self._abandoned)
            with translated():
                runs.begin()
            with self._change:
                self._pending |= self._known | dict.fromkeys(runs.running())
                self._settled.clear()
            self._runs, self._closed = runs, False
            self._sweep_run.update_now()
            self.experiment_id = runs.id
        return self._runs

    def _lose(self, error: Exception) -> None:
        """Search the runs again next time: after an outage runs may be missing, or exist although the reply was lost."""
        self._runs = None
        if not self._unavailable:
            what = "does not answer" if isinstance(error, MlflowUnavailable) else "has lost a run"
            log.warning("MLflow at %s %s; the sweep continues, tracking catches up later: %s", without_password(self._uri), what, error)
        self._unavailable = True

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._abandoned.wait(_FIRST_WAIT_S)
        else:
            self._closing.wait(seconds)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results may depend on."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
