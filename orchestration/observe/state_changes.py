"""Turn the difference between two readings of a trial's manifest into events.

Compares no wall clocks, because machines may disagree about the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestration.formatting import instant
from orchestration.observe.events import Event, TrialProgress
from orchestration.observe.trial_log import attempt_end
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Attempt, Manifest
from orchestration.record.trial_state import TrialState


@dataclass(frozen=True)
class ReportedTrial:
    """The part of a trial's history that was already reported."""

    attempts: int = 0
    """Number of attempts."""
    state: TrialState = TrialState.NEW
    manifest: Manifest | None = None


def changes(plan: TrialPlan, reported: ReportedTrial, manifest: Manifest, state: TrialState) -> Iterator[Event]:
    """Events since `reported`, including attempts that started and ended in between."""
    count = len(manifest.attempts)
    for attempt in manifest.attempts[max(reported.attempts - 1, 0) :]:
        if attempt.number > reported.attempts:
            yield Event(plan, TrialState.RUNNING)
        elif reported.state not in (TrialState.RUNNING, TrialState.NEW):
            continue  # its end was reported
        if attempt.number < count:
            state_then = TrialState.INTERRUPTED if attempt.outcome == "interrupted" else TrialState.RESTARTING
            yield Event(plan, state_then, reason=attempt_end(attempt))
    if (state.is_open or state is TrialState.FINISHED) and manifest != reported.manifest:
        yield from _updates(plan, reported, manifest, ended=state if state.is_final else None)
    if (reported.attempts, reported.state) != (count, state):
        yield from _of_state(plan, manifest.attempts[-1:], state, reported)


def newest(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest], *, count: int) -> list[str]:
    """One line for each of the `count` attempts that ended last, by the clocks of their nodes."""
    known = [manifests[plan.trial_id] for plan in plans if plan.trial_id in manifests]
    ended = sorted(
        ((attempt.ended_ms, manifest.label, attempt, manifest) for manifest in known for attempt in manifest.attempts if attempt.ended_ms),
        key=lambda one: one[:2],
    )
    return [f"{instant(ms)} {label}: attempt {attempt.number} {_end(attempt, manifest)}" for ms, label, attempt, manifest in ended[-count:]]


def _updates(plan: TrialPlan, reported: ReportedTrial, manifest: Manifest, *, ended: TrialState | None) -> Iterator[Event]:
    """Progress events: first the step that the attempt resumed from, if that is new, then the current progress."""
    attempt, last = manifest.attempts[-1], manifest.last
    reached = attempt.last_step or max((c.step for c in manifest.checkpoints), default=0)
    pace = _seconds_per_step(manifest, attempt)
    now = TrialProgress(
        attempt=attempt.number,
        resumed_step=attempt.first_step or None,
        epoch=manifest.epochs,
        epochs=plan.config.epochs,
        iteration=reached,
        iterations=manifest.iterations,
        loss=last.metrics.get("train/loss") if last else None,
        miou=last.score if last else None,
        eta_s=None if pace is None else pace * (manifest.iterations - reached),
        committed=manifest.epochs,
        worked_s=attempt.seconds,
        ended=ended,
    )
    known = reported.manifest.attempts[attempt.number - 1].first_step if reported.manifest and reported.attempts == attempt.number else 0
    if attempt.first_step and not known:
        epoch = max((entry.epoch for entry in manifest.history if entry.step <= attempt.first_step), default=0)
        yield Event(plan, TrialState.RUNNING, replace(now, epoch=epoch, iteration=attempt.first_step, loss=None, ended=None))
    yield Event(plan, TrialState.RUNNING, now)


def _seconds_per_step(manifest: Manifest, attempt: Attempt) -> float | None:
    """Pace of this attempt if it has committed, else of the earlier attempts; from durations by monotonic clocks."""
    steps = attempt.last_step - attempt.first_step
    if attempt.last_step and steps > 0:
        return (attempt.useful_s + attempt.repeated_s) / steps
    return manifest.seconds / manifest.reached if manifest.reached else None


def _of_state(plan: TrialPlan, newest: Sequence[Attempt], state: TrialState, reported: ReportedTrial) -> Iterator[Event]:
    """The event of a new state; none for a trial that only continues to run."""
    end = attempt_end(newest[0]) if newest else ""
    if state in (TrialState.FINISHED, TrialState.FAILED, TrialState.RESTARTING):
        yield Event(plan, state, reason=None if state is TrialState.FINISHED else end)
    elif state is TrialState.INTERRUPTED:
        why = {"interrupted": "the sweep was stopped", "open": "its driver is gone"}.get(end, end)
        yield Event(plan, state, reason=f"{why}; the next run of the sweep resumes it")
    elif newest and reported.attempts == newest[0].number and reported.state is TrialState.INTERRUPTED:
        yield Event(plan, TrialState.RUNNING)  # its driver seemed dead before


def _end(attempt: Attempt, manifest: Manifest) -> str:
    if attempt.outcome == "finished":
        score = manifest.last.score if manifest.last else None
        miou = "" if score is None else f", mIoU {score:.3f} after the last epoch"
        return f"finished{miou}"
    failed = attempt is manifest.attempts[-1] and manifest.status is TrialState.FAILED
    return attempt_end(attempt) if attempt.outcome == "interrupted" else f"{'failed' if failed else 'ended'}: {attempt_end(attempt)}"
