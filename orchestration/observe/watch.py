"""`rrn-sweep watch`: show a sweep live from any machine that can read its store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.text import Text

from orchestration.errors import StoreError, SweepError
from orchestration.formatting import one_line
from orchestration.observe.driver_liveness import DriverLiveness
from orchestration.observe.events import Event
from orchestration.observe.live import LiveView
from orchestration.observe.state_changes import ReportedTrial, changes, newest
from orchestration.observe.status import shares
from orchestration.observe.terminal import SharedTerminal
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import driver_of
from orchestration.record.manifest import Manifest
from orchestration.record.trial_state import TrialState, state_of
from orchestration.store.open import open_store
from orchestration.sweep import Sweep

STORE_TIMEOUT_S = 10.0
"""A store that does not answer for this long is reported as unavailable."""

NEWEST = 5
"""Attempts that ended before the start of `watch`; this many are listed."""


def watch(sweep: Sweep, console: SharedTerminal, *, every_s: float = 3.0, once: bool = False, stop: threading.Event | None = None) -> None:
    """Show the sweep until it is complete or `stop` is set: as a table in a terminal, else as one line per change.

    It shows what the trials committed: the newest epoch, not the newest step. If the store becomes unavailable, it retries.

    Args:
        once: show the current state, then return.

    Raises:
        StoreError: the store is unavailable at the start.
    """
    stop = stop or threading.Event()
    watcher = _Watcher(with_short_store_timeout(sweep), console, drawn=once or console.is_terminal)
    if once:
        watcher.show()
        return
    try:
        with muted_store_warnings(), watcher.view:
            while not watcher.sweep.complete and not stop.wait(every_s):
                watcher.poll()
    finally:
        watcher.show()


class _Watcher:
    """Reads the store repeatedly and sends the changes to the live view."""

    def __init__(self, sweep: Sweep, console: SharedTerminal, *, drawn: bool) -> None:
        self.sweep, self._console, self._liveness = sweep, console, DriverLiveness()
        self._read_s, self._unavailable = time.monotonic(), False
        self._liveness.take(driver_of(sweep.store, sweep.name))
        own = sweep.trial_ids
        states = {trial_id: self._state(manifest) for trial_id, manifest in sweep.manifests.items() if trial_id in own}
        self._reported = {trial_id: _as_reported(sweep.manifests[trial_id], state) for trial_id, state in states.items()}
        failed = {trial_id for trial_id, state in states.items() if state is TrialState.FAILED}
        self.view = LiveView(console, total=sweep.total, finished=len(sweep.finished), failed=failed, notes=self._notes)
        for line in newest(sweep.plans, sweep.manifests, count=NEWEST):
            self._console.print(Text(one_line(line)))
        self._driver = self._liveness.state if drawn else ""  # a table shows it below the trials, a log needs a line
        self._take(sweep)

    def poll(self) -> None:
        """Read the store and show what changed."""
        try:
            driver, sweep = driver_of(self.sweep.store, self.sweep.name), _reread(self.sweep)
        except SweepError as error:
            self._liveness.miss()
            if not self._unavailable:
                self.view.say(f"{error}; retrying", style="yellow")
            self._unavailable = True
            return
        if self._unavailable:
            self.view.say("the store answers again")
        self._unavailable, self._read_s = False, time.monotonic()
        self._liveness.take(driver)
        self._take(sweep)

    def show(self) -> None:
        """Print the current state."""
        self._console.print(self.view.render())

    def _take(self, sweep: Sweep) -> None:
        self.sweep = sweep
        for plan in sweep.plans:
            if manifest := sweep.manifests.get(plan.trial_id):
                self._compare(plan, manifest)
            elif self._reported.pop(plan.trial_id, None):
                fault = sweep.unreadable.get(plan.trial_id)
                ended = TrialState.FAILED if fault else TrialState.INTERRUPTED
                self.view(Event(plan, ended, reason=fault or "its manifest was deleted from the store"))
        if self._driver != (state := self._liveness.state):
            self._driver = state
            self.view.say(self._driver_line())

    def _compare(self, plan: TrialPlan, manifest: Manifest) -> None:
        reported, state = self._reported.get(plan.trial_id, ReportedTrial()), self._state(manifest)
        if reported.manifest is not manifest or reported.state != state:
            for event in changes(plan, reported, manifest, state):
                self.view(event)
            self._reported[plan.trial_id] = ReportedTrial(len(manifest.attempts), state, manifest)

    def _state(self, manifest: Manifest) -> TrialState:
        return state_of(manifest, driver=self._liveness.token, retries=self.sweep.spec.retries)

    def _notes(self) -> list[str]:
        known = self.sweep.manifests
        attempts = [attempt for plan in self.sweep.plans if plan.trial_id in known for attempt in known[plan.trial_id].attempts]
        ago_s = time.monotonic() - self._read_s
        return [
            self._driver_line(),
            f"effort: {shares(attempts)}, up to each trial's newest checkpoint",
            f"loss and mIoU: after the newest committed epoch, on the validation list; read from the store {ago_s:.0f} s ago",
        ]

    def _driver_line(self) -> str:
        resume = "" if self._liveness.token is not None or self.sweep.complete else f"; resume with: rrn-sweep {self.sweep.file}"
        return f"{self._liveness}{resume}"


def _as_reported(manifest: Manifest, state: TrialState) -> ReportedTrial:
    """The part not to report at the start: everything except the progress of open trials."""
    return ReportedTrial(len(manifest.attempts), state, None if state.is_open else manifest)


def _reread(sweep: Sweep) -> Sweep:
    """The current sweep; finished trials are not read again, because they do not change.

    Raises:
        SweepError: the store is unavailable, or no longer has any of the unfinished trials (for example, its folder was unmounted).
    """
    finished = {trial_id: manifest for trial_id, manifest in sweep.manifests.items() if manifest.status is TrialState.FINISHED}
    now = sweep.reread(known=finished)
    if (open_ := sweep.manifests.keys() - finished.keys()) and not open_ & now.manifests.keys():
        raise StoreError(f"{sweep.store.uri}: the unfinished trials of sweep {sweep.name} disappeared")
    return now


@contextmanager
def muted_store_warnings() -> Iterator[None]:
    """Mute the store's warnings: the caller reports an outage itself, once."""
    logger = logging.getLogger("orchestration.store")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def with_short_store_timeout(sweep: Sweep) -> Sweep:
    """The sweep with a store that raises StoreUnavailable after STORE_TIMEOUT_S."""
    return replace(sweep, store=open_store(sweep.store.uri, deadline_s=STORE_TIMEOUT_S))
