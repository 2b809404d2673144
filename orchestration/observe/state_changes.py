"""What changed between two looks at a sweep in the store. Compares no clocks: machines may disagree about the time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestration.observe.events import Event
from orchestration.observe.progress import TrialProgress
from orchestration.observe.trial_log import attempt_end, instant
from orchestration.plan.spec import Retries
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import Driver
from orchestration.record.manifest import SCORE, Attempt, Manifest
from orchestration.record.trial_record import spent

State = Literal["new", "running", "retrying", "finished", "failed", "stopped"]
"""`stopped`: neither runs nor has come to an end; the sweep goes on with it when it runs again."""


@dataclass(frozen=True)
class ReportedTrial:
    """What was said of a trial so far."""

    attempts: int = 0
    state: State = "new"
    manifest: Manifest | None = None


def state_of(manifest: Manifest, *, driver: int | None, retries: Retries) -> State:
    """Where a trial stands while the driver with that token is at work; None: none is."""
    if manifest.status == "finished" or not manifest.attempts:
        return "finished" if manifest.status == "finished" else "new"
    attempt = manifest.attempts[-1]
    driven = attempt.driver == driver
    if attempt.ended_ms is None:
        return "running" if driven else "stopped"
    if attempt.outcome == "stopped":
        return "stopped"
    if driven and not spent(manifest, retries, driver=attempt.driver):
        return "retrying"
    return "failed" if manifest.status == "failed" else "stopped"


def changes(plan: TrialPlan, told: ReportedTrial, manifest: Manifest, state: State) -> Iterator[Event]:
    """What happened to a trial since, also in attempts that came and went in between."""
    count = len(manifest.attempts)
    for attempt in manifest.attempts[max(told.attempts - 1, 0) :]:
        if attempt.number > told.attempts:
            yield Event("started", plan)
        elif told.state not in ("running", "new"):
            continue  # its end was told
        if attempt.number < count:
            yield Event("stopped" if attempt.outcome == "stopped" else "retry", plan, reason=attempt_end(attempt))
    if state in ("running", "retrying", "finished") and manifest != told.manifest:
        yield from _updates(plan, told, manifest, ended="finished" if state == "finished" else None)
    if (told.attempts, told.state) != (count, state):
        yield from _of_state(plan, manifest.attempts[-1:], state, told)


def newest(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest], *, count: int) -> list[str]:
    """A line for each of the attempts that ended last, by the clocks of their nodes."""
    known = [manifests[plan.trial_id] for plan in plans if plan.trial_id in manifests]
    ended = sorted(
        ((attempt.ended_ms, manifest.label, attempt, manifest) for manifest in known for attempt in manifest.attempts if attempt.ended_ms),
        key=lambda one: one[:2],
    )
    return [f"{instant(ms)} {label}: attempt {attempt.number} {_end(attempt, manifest)}" for ms, label, attempt, manifest in ended[-count:]]


class DriverLiveness:
    """Whether a sweep's driver lives, told by what changes from look to look. Time in which the store was away doesn't count."""

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._quiet_s, self._looked_s = 0.0, time.monotonic()
        self._beaten = self._missed = False

    def take(self, driver: Driver | None) -> None:
        """What a look showed."""
        before, now_s = self._driver, time.monotonic()
        if driver and before and driver.token == before.token:
            quiet = driver.beat == before.beat
            self._quiet_s = self._quiet_s + (0.0 if self._missed else now_s - self._looked_s) if quiet else 0.0
            self._beaten = self._beaten or not quiet
        else:
            self._quiet_s, self._beaten = 0.0, before is not None  # one that came while we looked is alive
        self._driver, self._looked_s, self._missed = driver, now_s, False

    def miss(self) -> None:
        """The store could not be looked at."""
        self._missed = True

    @property
    def token(self) -> int | None:
        """Of the driver that is at work, as far as one can see."""
        return self._driver.token if self._driver and self.state not in ("dead", "silent") else None

    @property
    def state(self) -> Literal["none", "dead", "silent", "alive", "unknown"]:
        """`unknown`: on another machine, and looked at for too short a time to tell."""
        if self._driver is None:
            return "none"
        if self._driver.alive is not None:
            return "alive" if self._driver.alive else "dead"
        if self._quiet_s >= self._driver.patience_s:
            return "silent"
        return "alive" if self._beaten else "unknown"

    def __str__(self) -> str:
        if self._driver is None:
            return "no driver: nothing runs"
        ends = {
            "dead": "is dead: nothing runs",
            "silent": f"gave no sign of life for {self._driver.patience_s:.0f} s: it is dead, or cut off",
            "alive": "is alive",
            "unknown": f"was last heard of at {self._driver.heard}; waiting for a sign of life",
        }
        return f"{self._driver.name} {ends[self.state]}"


def _updates(plan: TrialPlan, told: ReportedTrial, manifest: Manifest, *, ended: Literal["finished"] | None) -> Iterator[Event]:
    """Where the trial is; first where its attempt went on from, once that is known."""
    attempt, last = manifest.attempts[-1], manifest.last
    reached = attempt.last_step or max((c.step for c in manifest.checkpoints), default=0)
    pace = _seconds_per_step(manifest, attempt)
    now = TrialProgress(
        trial_id=plan.trial_id,
        attempt=attempt.number,
        resumed_step=attempt.first_step or None,
        epoch=manifest.epochs,
        epochs=plan.config.epochs,
        iteration=reached,
        iterations=manifest.iterations,
        loss=last.metrics.get("train/loss") if last else None,
        miou=last.metrics.get(SCORE) if last else None,
        eta_s=None if pace is None else pace * (manifest.iterations - reached),
        committed=manifest.epochs,
        worked_s=attempt.seconds,
        ended=ended,
    )
    known = told.manifest.attempts[attempt.number - 1].first_step if told.manifest and told.attempts == attempt.number else 0
    if attempt.first_step and not known:
        epoch = max((entry.epoch for entry in manifest.history if entry.step <= attempt.first_step), default=0)
        yield Event("update", plan, replace(now, epoch=epoch, iteration=attempt.first_step, loss=None, ended=None))
    yield Event("update", plan, now)


def _seconds_per_step(manifest: Manifest, attempt: Attempt) -> float | None:
    """Of this attempt where it has committed something, else of those before. From monotonic clocks alone."""
    steps = attempt.last_step - attempt.first_step
    if attempt.last_step and steps > 0:
        return (attempt.useful_s + attempt.repeated_s) / steps
    return manifest.seconds / manifest.reached if manifest.reached else None


def _of_state(plan: TrialPlan, newest: Sequence[Attempt], state: State, told: ReportedTrial) -> Iterator[Event]:
    """What a new state means; none where the trial merely runs."""
    end = attempt_end(newest[0]) if newest else ""
    if state == "finished":
        yield Event("finished", plan)
    elif state == "failed":
        yield Event("failed", plan, reason=end)
    elif state == "retrying":
        yield Event("retry", plan, reason=end)
    elif state == "stopped":
        why = {"stopped": "with the sweep", "open": "its driver is gone"}.get(end, end)
        yield Event("stopped", plan, reason=f"{why}; the sweep goes on with it when it runs again")
    elif newest and told.attempts == newest[0].number and told.state == "stopped":
        yield Event("started", plan)  # its driver was taken for dead


def _end(attempt: Attempt, manifest: Manifest) -> str:
    if attempt.outcome == "finished":
        miou = f", mIoU {manifest.last.metrics[SCORE]:.3f} after the last epoch" if manifest.last else ""
        return f"finished{miou}"
    failed = attempt is manifest.attempts[-1] and manifest.status == "failed"
    return attempt_end(attempt) if attempt.outcome == "stopped" else f"{'failed' if failed else 'ended'}: {attempt_end(attempt)}"
