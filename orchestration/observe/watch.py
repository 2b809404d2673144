"""`watch` and `logs`: a sweep or a trial followed from any machine that reaches the store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from orchestration.errors import StoreError, SweepError
from orchestration.observe.events import Event
from orchestration.observe.live import View
from orchestration.observe.state_changes import Pulse, State, Told, changes, newest, state_of
from orchestration.observe.status import shares
from orchestration.observe.trial_log import Key, kept, story
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import driver_of
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_record import spent
from orchestration.store.directory import open_store
from orchestration.sweep import Sweep

LOOK_WITHIN_S = 10.0
"""A store that gives no answer for so long is said to be away."""

NEWEST = 5
"""So many of the attempts that ended before the first look are told."""

CANDIDATES = 8
"""So many trials are named where it is not clear which one is meant."""


def watch(sweep: Sweep, console: Console, *, every_s: float = 3.0, once: bool = False, stop: threading.Event | None = None) -> None:
    """Show the sweep as its store tells it, until it is complete or `stop` is set: a table in a terminal, else lines as things change.

    Of a trial it knows what was committed: the newest epoch, not the newest step. A store that is away is waited for.

    Args:
        once: show it as it is now, then return.

    Raises:
        StoreError: at the very start.
    """
    stop = stop or threading.Event()
    watcher = _Watcher(_impatient(sweep), console, drawn=once or console.is_terminal)
    if once:
        watcher.show()
        return
    try:
        with _no_word_of_the_store(), watcher.view:
            while not watcher.sweep.complete and not stop.wait(every_s):
                watcher.look()
    finally:
        watcher.show()


def logs(
    sweep: Sweep, word: str, say: Callable[[str], None], *, follow: bool = False, every_s: float = 2.0, stop: threading.Event | None = None
) -> None:
    """Say what happened to a trial, line by line, and what the store keeps of it.

    Args:
        word: a beginning of the trial's identity, or its label.
        follow: go on as it goes on, until it has finished or failed for good, or `stop` is set.

    Raises:
        SweepError: `word` fits no trial, or several.
    """
    plan = find_trial(sweep, word)
    manifest = sweep.manifests.get(plan.trial_id)
    if manifest is None:
        say(f"trial {plan.trial_id} {plan.label}: not started yet")
    told = _tell(manifest, set(), say)
    if follow:
        with _no_word_of_the_store():
            manifest = _followed(_impatient(sweep), plan.trial_id, manifest, told, say, every_s=every_s, stop=stop or threading.Event())
    for line in kept(manifest, sweep.store.uri) if manifest else ():
        say(line)


def find_trial(sweep: Sweep, word: str) -> TrialPlan:
    """The trial with the label `word`, or whose identity begins so. Raises SweepError, with candidates, where none or several fit."""
    named = [plan for plan in sweep.plans if plan.label == word]
    fitting = named or [plan for plan in sweep.plans if word and plan.trial_id.startswith(word)]
    if len(fitting) == 1:
        return fitting[0]
    if not sweep.plans:
        raise SweepError(f"{word}: no trial of sweep {sweep.name} has started yet")
    near = fitting or [plan for plan in sweep.plans if word and word in plan.label] or sweep.plans
    listed = ", ".join(f"{plan.trial_id} ({plan.label})" for plan in near[:CANDIDATES])
    more = f", and {len(near) - CANDIDATES} more" if len(near) > CANDIDATES else ""
    what = "begins several identities" if fitting else "no trial has such a label, or an identity that begins so"
    raise SweepError(f"{word}: {what}; give one of {listed}{more}")


class _Watcher:
    """Tells the live view what changes from look to look."""

    def __init__(self, sweep: Sweep, console: Console, *, drawn: bool) -> None:
        self.sweep, self._console, self._pulse = sweep, console, Pulse()
        self._looked_s, self._away = time.monotonic(), False
        self._pulse.take(driver_of(sweep.store, sweep.name))
        states = {trial_id: self._state(manifest) for trial_id, manifest in sweep.manifests.items() if trial_id in sweep.trial_ids}
        self._told = {trial_id: _as_found(sweep.manifests[trial_id], state) for trial_id, state in states.items()}
        failed = {trial_id for trial_id, state in states.items() if state == "failed"}
        finished = len(sweep.plans) - len(sweep.unfinished)
        self.view = View(console, total=sweep.total, finished=finished, failed=failed, notes=self._notes)
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
        told, state = self._told.get(plan.trial_id, Told()), self._state(manifest)
        if told.manifest is not manifest or told.state != state:
            for event in changes(plan, told, manifest, state):
                self.view(event)
            self._told[plan.trial_id] = Told(len(manifest.attempts), state, manifest)

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


def _as_found(manifest: Manifest, state: State) -> Told:
    """At the first look: of what happened before only where the running trials are is told."""
    return Told(len(manifest.attempts), state, None if state in ("running", "retrying") else manifest)


@contextmanager
def _no_word_of_the_store() -> Iterator[None]:
    """S3's own lines of an outage, one for each look, would tell what is told here already."""
    logger = logging.getLogger("orchestration.store.s3")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _impatient(sweep: Sweep) -> Sweep:
    """The sweep with a store that soon says when it is away."""
    return replace(sweep, store=open_store(sweep.store.uri, deadline_s=LOOK_WITHIN_S))


def _reread(sweep: Sweep) -> Sweep:
    """The sweep as it is now; a finished trial does not change. Raises SweepError, also where a folder is gone that held it."""
    finished = {trial_id: manifest for trial_id, manifest in sweep.manifests.items() if manifest.status == "finished"}
    now = sweep.reread(known=finished)
    if (open_ := sweep.manifests.keys() - finished.keys()) and not open_ & now.manifests.keys():
        raise StoreError(f"{sweep.store.uri}: what was there of sweep {sweep.name} is not there any more")
    return now


def _followed(
    sweep: Sweep,
    trial_id: str,
    manifest: Manifest | None,
    told: set[Key],
    say: Callable[[str], None],
    *,
    every_s: float,
    stop: threading.Event,
) -> Manifest | None:
    """Tell what is new of a trial until it is over; its last manifest."""
    away = False
    while not _is_over(manifest, sweep) and not stop.wait(every_s):
        try:
            manifest = read_manifest(sweep.store, sweep.name, trial_id) or manifest
        except SweepError as error:
            if not away:
                say(f"{error}; following on")
            away = True
            continue
        if away:
            say("the store answers again")
        away = False
        told = _tell(manifest, told, say)
    return manifest


def _is_over(manifest: Manifest | None, sweep: Sweep) -> bool:
    if manifest is None or manifest.status == "running":
        return False
    return manifest.status == "finished" or spent(manifest, sweep.spec.retries, driver=manifest.driver)


def _tell(manifest: Manifest | None, told: Iterable[Key], say: Callable[[str], None]) -> set[Key]:
    """Say what was not told yet; all that is told now."""
    before = set(told)
    for key, line in story(manifest) if manifest else ():
        if key not in before:
            say(line)
    return before | {key for key, _ in (story(manifest) if manifest else ())}
