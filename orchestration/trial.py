"""Run one TrialPlan: resume, train, save in the background, yield updates."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

from orchestration.contents import weights_key
from orchestration.errors import Fenced
from orchestration.manifest import SCORE, Entry, Manifest, TrialRecord
from orchestration.plan import TrialPlan
from orchestration.spec import Retention
from orchestration.store import Store, open_store
from rrn_core.config import Runtime
from rrn_core.training import Report, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What every trial of a sweep shares: where it stores and runs. Holds no credential."""

    store: str
    runtime: Runtime
    retention: Retention
    checkpoint_every_s: float = 300.0
    """Within an epoch, save at the first report after so many seconds; every completed epoch is saved anyway."""


@dataclass(frozen=True)
class Update:
    """Where a trial stands, for those who watch."""

    trial_id: str
    attempt: int
    resumed_step: int | None
    """Step of the checkpoint that this attempt went on from."""
    epoch: int
    epochs: int
    iteration: int
    iterations: int
    loss: float | None = None
    miou: float | None = None
    eta_s: float | None = None
    committed: int = 0
    """Epochs that the store holds."""
    finished: bool = False
    note: str | None = None
    """What the user should know about how this attempt started."""


def run_trial(plan: TrialPlan, job: Job) -> Iterator[Update]:
    """Train `plan` to its end from wherever the store says it was, yielding an update at every report of the training.

    The manifest is `finished` when the generator ends, `failed` with the reason when the training raises.

    Raises:
        Fenced: another attempt took the trial over; the manifest is theirs.
        StoreError: the trial could not even be opened.
    """
    store = open_store(job.store)
    record = TrialRecord.open(store, plan, retention=job.retention)
    if record.manifest.status == "finished":
        yield _finished(plan, record.manifest)
        return
    try:
        yield from _train(plan, job, record, store)
        record.finish()
    except Fenced:
        raise
    except Exception as error:
        record.fail(reason=f"{type(error).__name__}: {' '.join(str(error).split())}", traceback=traceback.format_exc())
        raise
    yield _finished(plan, record.manifest)


def _train(plan: TrialPlan, job: Job, record: TrialRecord, store: Store) -> Iterator[Update]:
    found = record.load_checkpoint()
    step, files = (found[0].step, found[1]) if found else (0, None)
    update = _first(plan, record.manifest, step if found else None)
    yield replace(update, note="; ".join(record.unusable) or None)
    saved_s, entries = time.monotonic(), list[Entry]()
    pace = _Pace(step)
    with _Committer(record) as committer:
        for report in train(plan.config, job.runtime, resume_from=files, init_weights=None if found else _init_weights(plan, store)):
            if report.metrics is not None:
                entries.append(Entry(epoch=report.epoch, step=report.iteration, time_ms=time.time_ns() // 10**6, metrics=report.metrics))
            if report.metrics is not None or time.monotonic() - saved_s >= job.checkpoint_every_s:
                committer.submit(report, entries)
                saved_s, entries = time.monotonic(), []
            update = _next(update, report, pace, committed=record.manifest.epochs)
            yield update


def _init_weights(plan: TrialPlan, store: Store) -> bytes | None:
    """The weights to start from, which the driver has put into the store."""
    sha256 = plan.config.init_sha256
    return store.read(weights_key(sha256))[0] if sha256 else None


class _Committer:
    """Commits checkpoints in a thread while training goes on; at most one is under way, a second waits for it."""

    def __init__(self, record: TrialRecord) -> None:
        self._record = record
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Committer:
        return self

    def submit(self, report: Report, entries: list[Entry]) -> None:
        """Copy the state now, commit it soon. Raises what went wrong with the checkpoint before."""
        files = report.state.to_files()
        self._wait()
        self._pending = self._pool.submit(
            self._record.commit, step=report.iteration, epoch=report.epoch, files=files, entries=entries, seconds=report.state.seconds
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for the commit under way; its error counts only where nothing went wrong before it."""
        try:
            self._wait()
        except Exception as late:
            if kind is None:
                raise
            log.warning("the last checkpoint was not committed: %s", late)
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


class _Pace:
    """Seconds per iteration of this attempt."""

    def __init__(self, start: int) -> None:
        self._start, self._since = start, time.monotonic()

    def eta_s(self, report: Report) -> float:
        per_iteration = (time.monotonic() - self._since) / max(1, report.iteration - self._start)
        return per_iteration * (report.iterations - report.iteration)


def _first(plan: TrialPlan, manifest: Manifest, resumed_step: int | None) -> Update:
    last = manifest.last
    return Update(
        trial_id=plan.trial_id,
        attempt=manifest.attempt,
        resumed_step=resumed_step,
        epoch=manifest.epochs,
        epochs=plan.config.epochs,
        iteration=resumed_step or 0,
        iterations=plan.iterations,
        loss=last.metrics["train/loss"] if last else None,
        miou=last.metrics[SCORE] if last else None,
        committed=manifest.epochs,
    )


def _next(update: Update, report: Report, pace: _Pace, *, committed: int) -> Update:
    return replace(
        update,
        epoch=report.epoch,
        iteration=report.iteration,
        iterations=report.iterations,
        loss=report.loss,
        miou=report.metrics[SCORE] if report.metrics else update.miou,
        eta_s=pace.eta_s(report),
        committed=committed,
    )


def _finished(plan: TrialPlan, manifest: Manifest) -> Update:
    done = replace(_first(plan, manifest, None), iteration=plan.iterations, eta_s=0.0, finished=True)
    return replace(done, epoch=plan.config.epochs)
