"""Run one TrialPlan: resume, train, save in the background, yield updates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

from orchestration.errors import Fenced, Preempted, StoreError
from orchestration.failures import classify, reason_of, traceback_of
from orchestration.observe.progress import TrialProgress
from orchestration.plan.spec import PictureRule, Retention, Retries
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.inputs import weights_key
from orchestration.record.lease import current_token
from orchestration.record.manifest import SCORE, EpochMetrics, Manifest
from orchestration.record.trial_record import TrialRecord, settle, spent
from orchestration.record.upload_queue import PendingCheckpoint, UploadQueue
from orchestration.run.epoch_pictures import drawn
from orchestration.run.resource_usage import Usage, machine
from orchestration.store.base import Store
from orchestration.store.open import open_store
from rrn_core import CheckpointError
from rrn_core.config import Runtime
from rrn_core.training import Report, train

log = logging.getLogger(__name__)

COMMIT_WITHIN_S = 25.0
"""A trial that is told to stop commits a last checkpoint within so many seconds, or leaves it."""

CLOSE_WITHIN_S = 5.0
"""Then it waits so long for the store to note its end."""

LONGEST_PAUSE_S = 30.0
"""Between attempts that end because the store or the disk refuses."""


@dataclass(frozen=True)
class Job:
    """What every trial of a sweep shares: where it stores and runs, and for which driver. Holds no credential."""

    store: str
    runtime: Runtime
    retention: Retention
    retries: Retries = field(default_factory=Retries)
    driver: int = 0
    """Token of the lease under which the sweep runs."""
    checkpoint_every_s: float = 300.0
    """Within an epoch, save at the first report after so many seconds; every completed epoch is saved anyway."""
    outbox_bytes: int = 2**32
    """Checkpoints that wait for an absent store take so much of the local disk; then training waits too."""
    patience_s: float = 3600.0
    """How long an absent store is waited for."""
    pictures: PictureRule = field(default_factory=PictureRule)
    """What is drawn; it changes no result."""


def run_trial(plan: TrialPlan, job: Job) -> Generator[TrialProgress, None, None]:
    """Train `plan` to its end from wherever the store says it was, yielding an update at every report of the training.

    The last update says how the trial ended: finished, or failed with no new start left. A generator that is closed, or told
    `Preempted` by `throw`, first commits a checkpoint of the step that it reached, within COMMIT_WITHIN_S, and notes its end, within
    about CLOSE_WITHIN_S; where the store is away, the attempt stays open, and who comes next closes it.

    Raises:
        Fenced: another attempt, or another driver, took the trial over; the manifest is theirs.
        StoreError: the trial could not even be opened.
        Exception: what ended this attempt, where another may go better.
    """
    store = open_store(job.store, deadline_s=job.patience_s)
    if (known := _given_up(plan, job, store)) is not None:
        yield _ended(plan, known)
        return
    record = TrialRecord.open(store, plan, retention=job.retention, driver=job.driver, machine=machine(job.runtime))
    if record.manifest.status == "finished":
        yield _ended(plan, record.manifest)
        return
    try:
        yield from _train(plan, job, record, store)
        record.finish()
    except Fenced:
        raise
    except GeneratorExit:
        _soon(record, job, record.stop)
        raise
    except Exception as error:
        _fail(record, error, job)
        if not spent(record.manifest, job.retries, driver=job.driver):
            raise
    yield _ended(plan, record.manifest)


def _fail(record: TrialRecord, error: Exception, job: Job) -> None:
    fail = partial(record.fail, failure=classify(error), reason=reason_of(error), traceback=traceback_of(error))
    if isinstance(error, Preempted):
        _soon(record, job, fail)
    else:
        fail()


def _soon(record: TrialRecord, job: Job, end: Callable[[], None]) -> None:
    """Close the attempt now or not at all: a process that is told to end has no hour to wait for the store."""
    record.hurry(open_store(job.store, deadline_s=CLOSE_WITHIN_S))
    try:
        end()
    except StoreError as error:
        log.warning("trial %s: the attempt stays open, who comes next closes it: %s", record.manifest.trial_id, error)


def _given_up(plan: TrialPlan, job: Job, store: Store) -> Manifest | None:
    """The manifest of a trial whose budget this driver has spent; else None, after a pause where the last attempt found no store."""
    token = current_token(store, plan.sweep)
    if token > job.driver:
        raise Fenced(f"trial {plan.trial_id}: driver {token} has taken the sweep over from driver {job.driver}")
    word = "its process ended without a word"
    known = settle(store, plan.sweep, plan.trial_id, driver=job.driver, failure="lost", reason=word, retries=job.retries)
    if known and spent(known, job.retries, driver=job.driver):
        return known
    if known and known.failure == "unavailable" and (fruitless := known.failures("unavailable", driver=job.driver)):
        time.sleep(min(LONGEST_PAUSE_S, 2.0**fruitless))
    return None


def _train(plan: TrialPlan, job: Job, record: TrialRecord, store: Store) -> Iterator[TrialProgress]:
    """Train from the newest checkpoint that can be used, or from the start."""
    for checkpoint, files in chain(record.usable_checkpoints(), [(None, None)]):
        record.begin_at(checkpoint.step if checkpoint else 0)
        first = _first(plan, record.manifest, checkpoint.step if checkpoint else None)
        yield (first := replace(first, note="; ".join(record.unusable) or None))
        try:
            yield from _attempt(plan, job, record, store, first, files)
            return
        except CheckpointError as error:  # told before the first report: what was stored intact does not load
            if checkpoint is None:
                raise
            record.pass_over(checkpoint, error)


def _attempt(
    plan: TrialPlan, job: Job, record: TrialRecord, store: Store, update: TrialProgress, files: Mapping[str, bytes] | None
) -> Iterator[TrialProgress]:
    saved_s = time.monotonic()
    pace = _IterationPace(update.iteration)
    report: Report | None = None
    submitted = update.iteration
    with Usage(job.runtime) as usage, UploadQueue(lambda parcel: _commit(record, parcel), limit_bytes=job.outbox_bytes) as outbox:
        try:
            init_weights = _init_weights(plan, store) if files is None else None
            for report in train(plan.config, job.runtime, resume_from=files, init_weights=init_weights):
                if report.metrics is not None or time.monotonic() - saved_s >= job.checkpoint_every_s:
                    outbox.submit(_parcel(report, plan, job, usage))
                    saved_s, submitted = time.monotonic(), report.iteration
                update = _next(update, report, pace, record)
                yield update
        except (GeneratorExit, Preempted):
            last = _parcel(report, plan, job, usage) if report and report.iteration > submitted else None
            with suppress(StoreError):  # the outbox tells it
                if not outbox.conclude(last, within_s=COMMIT_WITHIN_S):
                    record.leave()
            raise


def _parcel(report: Report, plan: TrialPlan, job: Job, usage: Usage) -> PendingCheckpoint:
    """The state as it is now, copied, since training goes on, and what there is to tell of an epoch that it completes."""
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


def _commit(record: TrialRecord, parcel: PendingCheckpoint) -> None:
    record.commit(
        step=parcel.step,
        epoch=parcel.epoch,
        files=parcel.files,
        entries=parcel.entries,
        pictures=parcel.pictures,
        seconds=parcel.seconds,
        at_s=parcel.at_s,
    )


def _init_weights(plan: TrialPlan, store: Store) -> bytes | None:
    """The weights to start from, which the driver has put into the store."""
    sha256 = plan.config.init_sha256
    return store.read(weights_key(sha256))[0] if sha256 else None


class _IterationPace:
    """Seconds per iteration of this attempt."""

    def __init__(self, start: int) -> None:
        self._start, self._since = start, time.monotonic()

    def eta_s(self, report: Report) -> float:
        per_iteration = (time.monotonic() - self._since) / max(1, report.iteration - self._start)
        return per_iteration * (report.iterations - report.iteration)


def _first(plan: TrialPlan, manifest: Manifest, resumed_step: int | None) -> TrialProgress:
    last = manifest.last
    return TrialProgress(
        trial_id=plan.trial_id,
        attempt=manifest.attempt,
        resumed_step=resumed_step,
        epoch=manifest.epochs,
        epochs=plan.config.epochs,
        iteration=resumed_step or 0,
        iterations=plan.iterations,
        loss=last.metrics.get("train/loss") if last else None,
        miou=last.metrics[SCORE] if last else None,
        committed=manifest.epochs,
    )


def _next(update: TrialProgress, report: Report, pace: _IterationPace, record: TrialRecord) -> TrialProgress:
    return replace(
        update,
        epoch=report.epoch,
        iteration=report.iteration,
        iterations=report.iterations,
        loss=report.loss,
        miou=report.metrics[SCORE] if report.metrics else update.miou,
        eta_s=pace.eta_s(report),
        committed=record.manifest.epochs,
        worked_s=record.worked_s,
    )


def _ended(plan: TrialPlan, manifest: Manifest) -> TrialProgress:
    last = _first(plan, manifest, None)
    if manifest.status != "finished":
        return replace(last, ended="failed")
    return replace(last, epoch=plan.config.epochs, iteration=plan.iterations, eta_s=0.0, ended="finished")
