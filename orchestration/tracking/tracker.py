"""Shows a sweep in MLflow: a view of the store that one thread of the driver keeps up to date and that can always be rebuilt."""

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
from orchestration.record.manifest import Manifest
from orchestration.tracking.artifact_queue import ArtifactQueue
from orchestration.tracking.descriptions import SweepFacts, summary_of
from orchestration.tracking.experiment import MlflowUnavailable, RunGone, TrackingAbandoned, find_experiment, one_line, translated
from orchestration.tracking.run_content import LONGEST_TAG, RunContent, run_content, sweep_status
from orchestration.tracking.run_files import CodeOrigin, Fetch, trial_files
from orchestration.tracking.runs import Runs, open_runs
from orchestration.tracking.sweep_run import Overview, SweepRun
from orchestration.tracking.ui_links import checked, comparison_url, ui_base

log = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0  # between attempts while MLflow is away; each pause is twice the one before
_PACKAGES = ("rrn-sweep", "ray", "mlflow", "torch", "numpy", "optuna")


class Tracker:
    """Keeps the MLflow experiment of a sweep equal to the store, in its own thread: the sweep never waits for it and never fails by it.

    Args:
        uri: `sqlite:////absolute/path.db`, or the address of an MLflow server.
        store: the store's URI, for the tags that say where checkpoints lie.
        read: a trial's manifest, None where it never started; may raise SweepError.
        fetch: reads an object of the store; `runfiles.stored` makes one.
        driver: token of the driver. `tags` and `code` are for the attempts that it ordered.
        tags: who runs which code.
        code: texts by file name, such as a `git.diff`, that become files of each trial.
        facts: for the description of the sweep.
        overview: makes the files of the sweep's own run; called in the tracker's thread, at most every `sweepview.EVERY_S` and at the end.

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
        code: Mapping[str, str] | None = None,
        facts: SweepFacts | None = None,
        overview: Overview | None = None,
    ) -> None:
        self._uri, self._sweep, self._store, self._read, self._fetch = checked(uri), sweep, store, read, fetch
        self._tags = {name: value[:LONGEST_TAG] for name, value in tags.items() if value}
        self._origin = CodeOrigin(driver, {**versions(), **tags}, code or {})
        self._whole = SweepRun(sweep, facts or SweepFacts(), overview)
        self._files = ArtifactQueue()
        self._runs: Runs | None = None
        self._away = self._closed = self._ended = False
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
            lacking = [trial_id for trial_id in self._known if trial_id not in self._settled or self._files.lacks(trial_id)]
            behind = lacking or ([] if self._ended and not self._files.lacks(None) else list(self._known))
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
        """The page with the charts of all trials, on a server; None until it has answered, and of a database."""
        base = ui_base(self._uri)
        return comparison_url(base, self.experiment_id) if base and self.experiment_id else None

    def _work(self) -> None:
        """The thread. It catches everything: neither an outage nor a bug of MLflow may end a sweep."""
        try:
            self._keep_up()
        except TrackingAbandoned:
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
                self._work_off()
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
        """Until something is due although nobody says a word."""
        due = [due_s for due_s in (self._whole.due_s(), self._files.due_s()) if due_s is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _work_off(self) -> None:
        """Show whatever is pending, and how the sweep ended once it is closed; files, which may take long, come last."""
        self._connected()
        while not self._abandoned.is_set():
            closing = self._closing.is_set()
            if (trial_id := self._take()) is not None:
                self._show_again(trial_id)
            elif closing and not self._closed:
                self._end()
            elif self._whole.is_due():
                self._show_whole()
            elif not self._files.store_next(self._connected()):
                self._ended = closing
                break
        if self._away:
            log.warning("MLflow answers again and is up to date")
            self._away = False

    def _end(self) -> None:
        with self._change:
            statuses = {self._settled.get(trial_id) for trial_id in self._known}
        with translated():
            self._connected().end(sweep_status(statuses))
        self._closed = True
        self._whole.hurry()
        self._files.hurry()

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
        except RunGone:
            self._runs = None
            try:
                self._show(trial_id)
            except RunGone as error:
                self._refused.add(trial_id)
                log.warning("trial %s cannot be shown in MLflow: %s", trial_id, error)

    def _show(self, trial_id: str) -> None:
        runs = self._connected()
        live = trial_id in self._known and not self._closing.is_set()  # before reading: what is closed later is shown again
        try:
            manifest = self._read(trial_id)
        except SweepError as error:
            log.warning("trial %s cannot be shown in MLflow for now: %s", trial_id, error)
            return
        view = self._view(manifest, live=live) if manifest else None
        with translated():
            runs.show(trial_id, view)
        if manifest and view:
            self._whole.note(trial_id, summary_of(manifest, view.status))
            self._files.want(trial_id, trial_files(manifest, self._fetch, live=live, origin=self._origin))
        if not live or (view and view.status == "FINISHED"):
            with self._change:
                self._settled[trial_id] = view.status if view else ""

    def _view(self, manifest: Manifest, *, live: bool) -> RunContent:
        view = run_content(manifest, store=self._store, live=live)
        ours = manifest.attempts and manifest.attempts[-1].driver == self._origin.driver
        return replace(view, tags={**self._tags, **view.tags}) if ours else view

    def _show_whole(self) -> None:
        with self._change:
            known = list(self._known)
        self._whole.show(self._connected(), self._files, known)

    def _connected(self) -> Runs:
        """The runs; when they had to be looked up, every trial is pending, and so are those that a dead driver left RUNNING."""
        if self._runs is None:
            runs = open_runs(self._uri, self._sweep, tags=self._tags, abandoned=self._abandoned)
            with translated():
                runs.begin()
            with self._change:
                self._pending |= self._known | dict.fromkeys(runs.running())
                self._settled.clear()
            self._runs, self._closed = runs, False
            self._whole.hurry()
            self.experiment_id, self.parent_run_id = runs.id, runs.parent_id
        return self._runs

    def _lose(self, error: Exception) -> None:
        """Forget what was found: after an outage runs may be missing, or exist although the reply was lost."""
        self._runs = None
        if not self._away:
            what = "is away" if isinstance(error, MlflowUnavailable) else "has lost a run"
            log.warning("MLflow at %s %s, the sweep goes on and tracking catches up later: %s", without_password(self._uri), what, error)
        self._away = True

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._abandoned.wait(_FIRST_WAIT_S)
        else:
            self._closing.wait(seconds)


def versions() -> dict[str, str]:
    """Of Python and of the packages that results may depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def make_experiment(uri: str, sweep: str) -> None:
    """Find or make the sweep's experiment, as its first run would: proves that MLflow is there and may be written to.

    Raises:
        TrackingError: it is not, whatever the reason.
    """
    try:
        find_experiment(uri, sweep)
    except (MlflowUnavailable, RunGone) as error:
        raise TrackingError(f"{error}; is it up, and the address right?") from error
