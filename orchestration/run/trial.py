"""Run one TrialPlan: resume, train, upload checkpoints in the background, yield progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain

from orchestration.errors import Fenced, Preempted, StoreError
from orchestration.failures import classify, reason_of, traceback_of
from orchestration.observe.events import TrialProgress
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.inputs import weights_key
from orchestration.record.lease import require_lease
from orchestration.record.manifest import SCORE, Checkpoint, EpochMetrics, Manifest
from orchestration.record.trial_record import WORKER_DIED, TrialRecord, settle
from orchestration.record.trial_state import TrialState, budget_spent
from orchestration.record.upload_queue import PendingCheckpoint, UploadQueue
from orchestration.run.epoch_pictures import drawn
from orchestration.run.job import Job
from orchestration.run.resource_usage import Usage, machine
from orchestration.store.base import Store
from orchestration.store.open import open_store
from rrn_core import CheckpointError
from rrn_core.training import Report, train

log = logging.getLogger(__name__)

COMMIT_WITHIN_S = 25.0
"""Limit for the last checkpoint after a stop request; then the checkpoint is given up."""

CLOSE_WITHIN_S = 5.0
"""Limit for closing the attempt in the store afterwards."""


def run_trial(plan: TrialPlan, job: Job) -> Generator[TrialProgress, None, None]:
    """Train `plan` from its newest usable checkpoint to its end. Yields progress at every report of the training.

    The last item states the outcome: finished, or failed with no retries left. To stop early, close the generator or throw
    `Preempted`: it commits a checkpoint of the current step within COMMIT_WITHIN_S and closes the attempt within about
    CLOSE_WITHIN_S. If the store is unavailable, the attempt stays open and the next attempt closes it.

    Raises:
        Fenced: another attempt or driver took the trial over and owns its manifest.
        StoreError: the trial's record cannot be opened.
        Exception: the error that ended this attempt, if retries are left.
    """
    store = open_store(job.store, deadline_s=job.patience_s)
    if (known := _without_retries(plan, job, store)) is not None:
        yield _ended(plan, known)
        return
    record = TrialRecord.open(store, plan, retention=job.retention, driver=job.driver, machine=machine(job.runtime))
    if record.manifest.status is TrialState.FINISHED:
        yield _ended(plan, record.manifest)
        return
    try:
        yield from _train(plan, job, record, store)
        record.finish()
    except Fenced:
        raise
    except GeneratorExit:
        _close_quickly(record, job, record.stop)
        raise
    except Exception as error:
        _fail(record, error, job)
        if not budget_spent(record.manifest, job.retries, driver=job.driver):
            raise
    yield _ended(plan, record.manifest)


def _fail(record: TrialRecord, error: Exception, job: Job) -> None:
    fail = partial(record.fail, failure=classify(error), reason=reason_of(error), traceback=traceback_of(error))
    if isinstance(error, Preempted):
        _close_quickly(record, job, fail)
    else:
        fail()


def _close_quickly(record: TrialRecord, job: Job, end: Callable[[], None]) -> None:
    """Close the attempt without the long wait for the store: the process must end soon."""
    record.hurry(open_store(job.store, deadline_s=CLOSE_WITHIN_S))
    try:
        end()
    except StoreError as error:
        log.warning("trial %s: the attempt stays open, the next attempt closes it: %s", record.manifest.trial_id, error)


def _without_retries(plan: TrialPlan, job: Job, store: Store) -> Manifest | None:
    """The manifest of a trial with no retries left under this driver; else None."""
    require_lease(store, plan.sweep, job.driver)
    known = settle(store, plan.sweep, plan.trial_id, driver=job.driver, failure="lost", reason=WORKER_DIED, retries=job.retries)
    return known if known and budget_spent(known, job.retries, driver=job.driver) else None


def _train(plan: TrialPlan, job: Job, record: TrialRecord, store: Store) -> Iterator[TrialProgress]:
    """Train from the newest usable checkpoint, else from iteration 0."""
    for checkpoint, files in chain(record.usable_checkpoints(), [(None, None)]):
        record.begin_at(checkpoint.step if checkpoint else 0)
        first = _start_progress(plan, record.manifest, checkpoint.step if checkpoint else None)
        yield (first := replace(first, note=_resume_note(record.unusable, checkpoint)))
        try:
            yield from _attempt(plan, job, record, store, first, files)
            return
        except CheckpointError as error:  # raised before the first report: the stored bytes are intact but do not load
            if checkpoint is None:
                raise
            record.pass_over(checkpoint, error)


def _resume_note(unusable: Sequence[str], checkpoint: Checkpoint | None) -> str | None:
    """Why newer checkpoints were passed over, and that none is left if so; None if the newest one is used."""
    if not unusable:
        return None
    return "; ".join([*unusable, *([] if checkpoint else ["the trial starts from iteration 0"])])


def _attempt(
    plan: TrialPlan, job: Job, record: TrialRecord, store: Store, update: TrialProgress, files: Mapping[str, bytes] | None
) -> Iterator[TrialProgress]:
    saved_s = time.monotonic()
    pace = _IterationPace(update.iteration)
    report: Report | None = None
    submitted = update.iteration
    queue = UploadQueue(lambda pending: record.commit(**vars(pending)), limit_bytes=job.upload_queue_bytes)
    with Usage(job.runtime) as usage, queue:
        try:
            init_weights = _init_weights(plan, store) if files is None else None
            for report in train(plan.config, job.runtime, resume_from=files, init_weights=init_weights):
                if report.metrics is not None or time.monotonic() - saved_s >= job.checkpoint_every_s:
                    queue.submit(_pending(report, plan, job, usage))
                    saved_s, submitted = time.monotonic(), report.iteration
                update = _updated(update, report, pace, record)
                yield update
        except (GeneratorExit, Preempted):
            last = _pending(report, plan, job, usage) if report and report.iteration > submitted else None
            with suppress(StoreError):  # the queue logs it
                if not queue.conclude(last, within_s=COMMIT_WITHIN_S):
                    record.leave()
            raise


def _pending(report: Report, plan: TrialPlan, job: Job, usage: Usage) -> PendingCheckpoint:
    """A copy of the current state, because training continues, with metrics and pictures if it completes an epoch."""
    metrics, now_ms = report.metrics, time.time_ns() // 10**6
    entries = [EpochMetrics(epoch=report.epoch, step=report.iteration, time_ms=now_ms, metrics=metrics | usage.means())] if metrics else []
    pictures = drawn(report, plan.config, job.runtime, job.pictures)
    return PendingCheckpoint(
        step=report.iteration,
        epoch=report.epoch,
        files=report.state.to_files(),
        entries=entries,
        pictures=pictures,
        seconds=report.state.seconds,
        at_s=time.monotonic(),
    )


def _init_weights(plan: TrialPlan, store: Store) -> bytes | None:
    """The initial weights, which the driver uploaded; None if the trial has none."""
    sha256 = plan.config.init_sha256
    return store.read(weights_key(sha256))[0] if sha256 else None


class _IterationPace:
    """Estimates the remaining time from the mean iteration time of this attempt."""

    def __init__(self, start: int) -> None:
        self._start, self._since = start, time.monotonic()

    def eta_s(self, report: Report) -> float:
        per_iteration = (time.monotonic() - self._since) / max(1, report.iteration - self._start)
        return per_iteration * (report.iterations - report.iteration)


def _start_progress(plan: TrialPlan, manifest: Manifest, resumed_step: int | None) -> TrialProgress:
    last = manifest.last
    return TrialProgress(
        attempt=manifest.attempt,
        resumed_step=resumed_step,
        epoch=manifest.epochs,
        epochs=plan.config.epochs,
        iteration=resumed_step or 0,
        iterations=plan.iterations,
        loss=last.metrics.get("train/loss") if last else None,
        miou=last.score if last else None,
        committed=manifest.epochs,
    )


def _updated(update: TrialProgress, report: Report, pace: _IterationPace, record: TrialRecord) -> TrialProgress:
    return replace(
        update,
        epoch=report.epoch,
        iteration=report.iteration,
        iterations=report.iterations,
        loss=report.loss,
        miou=report.metrics.get(SCORE) if report.metrics else update.miou,
        eta_s=pace.eta_s(report),
        committed=record.manifest.epochs,
        worked_s=record.worked_s,
    )


def _ended(plan: TrialPlan, manifest: Manifest) -> TrialProgress:
    last = _start_progress(plan, manifest, None)
    if manifest.status is not TrialState.FINISHED:
        return replace(last, ended=TrialState.FAILED)
    return replace(last, epoch=plan.config.epochs, iteration=plan.iterations, eta_s=0.0, ended=TrialState.FINISHED)
