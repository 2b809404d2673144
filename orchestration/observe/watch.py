"""`watch`: the live view of a sweep, from any machine that reaches the store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from orchestration.errors import StoreError, SweepError
from orchestration.observe.events import Event
from orchestration.observe.live import LiveView
from orchestration.observe.state_changes import DriverLiveness, ReportedTrial, State, changes, newest, state_of
from orchestration.observe.status import shares
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import driver_of
from orchestration.record.manifest import Manifest
from orchestration.store.open import open_store
from orchestration.sweep import Sweep

LOOK_WITHIN_S = 10.0
"""A store that gives no answer for so long is said to be away."""

NEWEST = 5
"""So many of the attempts that ended before the first look are told."""


def watch(sweep: Sweep, console: Console, *, every_s: float = 3.0, once: bool = False, stop: threading.Event | None = None) -> None:
    """Show the sweep as its store tells it, until it is complete or `stop` is set: a table in a terminal, else lines as things change.

    Of a trial it knows what was committed: the newest epoch, not the newest step. A store that is away is waited for.

    Args:
        once: show it as it is now, then return.

    Raises:
        StoreError: at the very start.
    """
    stop = stop or threading.Event()
    watcher = _Watcher(impatient(sweep), console, drawn=once or console.is_terminal)
    if once:
        watcher.show()
        return
    try:
        with quiet_about_the_store(), watcher.view:
            while not watcher.sweep.complete and not stop.wait(every_s):
                watcher.look()
    finally:
        watcher.show()


class _Watcher:
    """Tells the live view what changes from look to look."""

    def __init__(self, sweep: Sweep, console: Console, *, drawn: bool) -> None:
        self.sweep, self._console, self._pulse = sweep, console, DriverLiveness()
        self._looked_s, self._away = time.monotonic(), False
        self._pulse.take(driver_of(sweep.store, sweep.name))
        states = {trial_id: self._state(manifest) for trial_id, manifest in sweep.manifests.items() if trial_id in sweep.trial_ids}
        self._told = {trial_id: _as_found(sweep.manifests[trial_id], state) for trial_id, state in states.items()}
        failed = {trial_id for trial_id, state in states.items() if state == "failed"}
        finished = len(sweep.plans) - len(sweep.unfinished)
        self.view = LiveView(console, total=sweep.total, finished=finished, failed=failed, notes=self._notes)
        for line in newest(sweep.plans, sweep.manifests, count=NEWEST):
            self._console.print(Text(line))
        self._driver = self._pulse.state if drawn else ""  # a log is told of it, below a table it stands anyway
        self._take(sweep)

    def look(self) -> None:
        """Ask the store, and tell what has changed."""
        try:
            driver, sweep = driver_of(self.sweep.store, self.sweep.name), _reread(self.sweep)
        except SweepError as error:
            self._pulse.miss()
            if not self._away:
                self.view.say(f"{error}; watching on", style="yellow")
            self._away = True
            return
        if self._away:
            self.view.say("the store answers again")
        self._away, self._looked_s = False, time.monotonic()
        self._pulse.take(driver)
        self._take(sweep)

    def show(self) -> None:
        """How it stands, once, below all that was told."""
        self._console.print(self.view.render())

    def _take(self, sweep: Sweep) -> None:
        self.sweep = sweep
        for plan in sweep.plans:
            if manifest := sweep.manifests.get(plan.trial_id):
                self._compare(plan, manifest)
            elif self._told.pop(plan.trial_id, None):
                self.view(Event("stopped", plan, reason="its manifest is gone from the store"))
        if self._driver != (state := self._pulse.state):
            self._driver = state
            self.view.say(self._driver_line())

    def _compare(self, plan: TrialPlan, manifest: Manifest) -> None:
        told, state = self._told.get(plan.trial_id, ReportedTrial()), self._state(manifest)
        if told.manifest is not manifest or told.state != state:
            for event in changes(plan, told, manifest, state):
                self.view(event)
            self._told[plan.trial_id] = ReportedTrial(len(manifest.attempts), state, manifest)

    def _state(self, manifest: Manifest) -> State:
        return state_of(manifest, driver=self._pulse.token, retries=self.sweep.spec.retries)

    def _notes(self) -> list[str]:
        known = self.sweep.manifests
        attempts = [attempt for plan in self.sweep.plans if plan.trial_id in known for attempt in known[plan.trial_id].attempts]
        ago_s = time.monotonic() - self._looked_s
        return [
            self._driver_line(),
            f"effort: {shares(attempts)}, up to each trial's newest checkpoint",
            f"loss and mIoU: after the newest committed epoch, on the validation list; the store was asked {ago_s:.0f} s ago",
        ]

    def _driver_line(self) -> str:
        left = "" if self._pulse.token is not None or self.sweep.complete else f"; rrn-sweep {self.sweep.file} goes on with what is left"
        return f"{self._pulse}{left}"


def _as_found(manifest: Manifest, state: State) -> ReportedTrial:
    """At the first look: of what happened before only where the running trials are is told."""
    return ReportedTrial(len(manifest.attempts), state, None if state in ("running", "retrying") else manifest)


def _reread(sweep: Sweep) -> Sweep:
    """The sweep as it is now; a finished trial does not change. Raises SweepError, also where a folder is gone that held it."""
    finished = {trial_id: manifest for trial_id, manifest in sweep.manifests.items() if manifest.status == "finished"}
    now = sweep.reread(known=finished)
    if (open_ := sweep.manifests.keys() - finished.keys()) and not open_ & now.manifests.keys():
        raise StoreError(f"{sweep.store.uri}: what was there of sweep {sweep.name} is not there any more")
    return now


@contextmanager
def quiet_about_the_store() -> Iterator[None]:
    """S3's own lines of an outage, one for each look, would tell what is told here already."""
    logger = logging.getLogger("orchestration.store.s3")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def impatient(sweep: Sweep) -> Sweep:
    """The sweep with a store that soon says when it is away."""
    return replace(sweep, store=open_store(sweep.store.uri, deadline_s=LOOK_WITHIN_S))
