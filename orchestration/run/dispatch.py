"""The driver's side of a running sweep: give out trials, record how their attempts end, and pass their progress to listeners.

It decides every restart. Ray, in a process of its own (ray_process.py), only places trials on nodes and reports.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from orchestration.errors import Fenced, StoreError, StoreUnavailable, SweepError
from orchestration.failures import Failure, classify_death
from orchestration.observe.events import Event, Listener, TrialProgress
from orchestration.plan.spec import Retries
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import Lease
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_record import settle
from orchestration.record.trial_state import TrialState, budget_spent
from orchestration.run.job import Job
from orchestration.run.stopping import Breaker, Stop
from orchestration.run.trial_source import Source
from orchestration.store.open import open_store

log = logging.getLogger(__name__)

DRIVER_WAITS_S = 20.0
"""How long the driver waits for a store that does not answer. All trials' reports wait with it, so trials themselves wait longer."""

LONGEST_PAUSE_S = 30.0
"""Longest pause before a trial starts again on a machine that could not hold it."""

NO_RETRIES = Retries.model_validate(dict.fromkeys(Retries.model_fields, 0))


class Dispatch:
    """Gives out the trials of `source` until each has ended.

    A trial that raises, or whose worker or node dies, is given out again while its budget for that class of failure lasts
    (`job.retries`, counted in the store), and resumes from the store. A failed trial does not stop the others, unless the first trials
    all fail with the same error: then `stop` is requested.

    Args:
        ended: the number of each trial's last attempt, which has ended.
    """

    def __init__(
        self, source: Source, job: Job, *, listeners: Sequence[Listener], stop: Stop, lease: Lease, ended: Mapping[str, int] | None = None
    ) -> None:
        self._source, self._job, self._listeners, self._stop, self._lease = source, job, listeners, stop, lease
        self._store = open_store(job.store, deadline_s=DRIVER_WAITS_S)
        self._breaker = Breaker(stop)
        self._ended = dict(ended or {})
        self._out: dict[str, TrialPlan] = {}
        self._again: list[tuple[float, TrialPlan]] = []
        """Trials that start again, each with the earliest time."""
        self._seen: dict[str, tuple[TrialProgress, float]] = {}
        self._unrecorded: Counter[str] = Counter()
        """Deaths by trial that the store could not record."""
        self.unwritable: dict[str, str] = {}
        """Why a trial failed, by its trial_id, where the store has no record of it."""
        self.began = False
        """Whether a trial was given out."""
        self.commits = 0
        """How often a trial of this run has committed."""

    @property
    def left(self) -> bool:
        """Whether a trial has not ended."""
        return bool(self._out or self._again or self._source.remaining)

    def next(self) -> tuple[TrialPlan | None, bool]:
        """The next plan, or None if there is none now; and whether there may be one later."""
        plan = self._due() or self._source.next()
        if plan:
            self._out[plan.trial_id] = plan
            self.began = True
        return plan, bool(plan or self._out or self._again)

    def stop_requested(self) -> bool:
        """Whether the trials must commit a last checkpoint and end. Raises LeaseLost."""
        self._lease.check()
        return self._stop.requested()

    def warned(self, text: str) -> None:
        """A warning from the process of Ray."""
        log.warning("%s", text)

    def started(self, trial_id: str) -> None:
        self._emit(Event(self._out[trial_id], TrialState.RUNNING))

    def progressed(self, trial_id: str, progress: TrialProgress) -> None:
        before, _ = self._seen.get(trial_id, (None, 0.0))
        self.commits += before is not None and progress.committed > before.committed
        self._seen[trial_id] = progress, time.monotonic()
        self._lease.see(trial_id, progress.attempt, progress.worked_s)
        self._emit(Event(self._out[trial_id], TrialState.RUNNING, progress))

    def completed(self, trial_id: str) -> None:
        """The trial's worker has ended by itself."""
        try:
            manifest = read_manifest(self._store, self._out[trial_id].sweep, trial_id)
        except SweepError as error:
            self._end_unrecorded(trial_id, error)
            return
        if manifest is None:
            absent = f"no manifest in {self._store.uri}; check that all nodes share this store, and that nobody deletes from it"
            self._end_unrecorded(trial_id, StoreError(absent))
        elif manifest.status.is_final:
            self._conclude(trial_id, manifest)
        else:
            self._end(trial_id, TrialState.INTERRUPTED, "another worker has taken this trial over")

    def refused(self, trial_id: str, reason: str) -> None:
        """The store refused the trial for good: it would refuse another attempt too."""
        try:
            manifest = self._settle(trial_id, "unavailable", reason, retries=NO_RETRIES)
            assert manifest
            self._conclude(trial_id, manifest)
        except SweepError as error:
            log.debug("trial %s: %s", trial_id, error)  # the worker's reason says more
            self._end_unrecorded(trial_id, StoreError(reason))

    def died(self, trial_id: str, line: str, text: str) -> None:
        """An attempt raised, or its worker died. `line` says so in short; `text` is all that Ray says."""
        failure = classify_death(text)
        try:
            manifest = self._settle(trial_id, failure, line, text, retries=self._job.retries)
        except StoreUnavailable as error:
            log.warning("trial %s: %s", trial_id, error)
            self._unrecorded[trial_id] += 1
            if self._unrecorded[trial_id] > self._job.retries.of(failure):
                self._end_unrecorded(trial_id, error)
            else:
                self._restart(trial_id, f"[{failure}] {line}", pauses=self._unrecorded[trial_id])
            return
        except SweepError as error:
            self._end_unrecorded(trial_id, error)
            return
        assert manifest
        if manifest.status is TrialState.FINISHED or budget_spent(manifest, self._job.retries, driver=self._job.driver):
            self._conclude(trial_id, manifest)
        else:
            self._ended[trial_id] = manifest.attempt
            held = manifest.failure in ("memory", "unavailable") or not manifest.attempts[-1].machine  # the machine could not hold it
            self._restart(trial_id, self._reason(manifest) or "", pauses=self._failures(manifest) if held else 0)

    def interrupted(self, reason: str, *, again: bool) -> None:
        """All workers are gone, for a reason that is not theirs. `again`: they start again."""
        for trial_id in list(self._out):
            try:
                self._settle(trial_id, None, reason)
            except SweepError as error:  # the attempt stays open; the next worker or driver closes it
                log.warning("trial %s: %s", trial_id, error)
            if again:
                self._restart(trial_id, reason)
            else:
                self._end(trial_id, TrialState.INTERRUPTED, reason)

    def _due(self) -> TrialPlan | None:
        now_s = time.monotonic()
        found = next((entry for entry in self._again if entry[0] <= now_s), None)
        if found:
            self._again.remove(found)
        return found[1] if found else None

    def _settle(
        self, trial_id: str, failure: Failure | None, reason: str, text: str = "", *, retries: Retries | None = None
    ) -> Manifest | None:
        """The trial's manifest, after its attempt was closed if the worker died before it could. Raises SweepError."""
        plan = self._out[trial_id]
        progress, at_s = self._seen.pop(trial_id, (None, 0.0))
        return settle(
            self._store,
            plan.sweep,
            trial_id,
            driver=self._job.driver,
            failure=failure,
            reason=reason,
            traceback=text,
            worked_s=progress.worked_s + time.monotonic() - at_s if progress else 0.0,
            retries=retries,
            unopened=plan if failure else None,
            after=self._ended.get(trial_id, 0),
        )

    def _conclude(self, trial_id: str, manifest: Manifest) -> None:
        self._lease.forget(trial_id)
        self._source.tell(manifest)
        self._breaker.tell(manifest)
        self._end(trial_id, manifest.status, self._reason(manifest))

    def _end_unrecorded(self, trial_id: str, error: SweepError) -> None:
        """End a trial whose attempt may still be open in the store; then the next driver closes it."""
        if isinstance(error, StoreUnavailable | Fenced):
            self._end(trial_id, TrialState.INTERRUPTED, str(error))
        else:
            self.unwritable[trial_id] = str(error)
            self._end(trial_id, TrialState.FAILED, str(error))

    def _end(self, trial_id: str, state: TrialState, reason: str | None) -> None:
        self._emit(Event(self._out.pop(trial_id), state, reason=reason))

    def _restart(self, trial_id: str, reason: str, *, pauses: int = 0) -> None:
        """Give the trial out again, after a pause that grows with `pauses`."""
        plan = self._out.pop(trial_id)
        self._again.append((time.monotonic() + (min(LONGEST_PAUSE_S, 2.0**pauses) if pauses else 0.0), plan))
        self._emit(Event(plan, TrialState.RESTARTING, reason=reason))

    def _failures(self, manifest: Manifest) -> int:
        """How many attempts of this run ended as the last one did."""
        return manifest.failures(manifest.failure, driver=self._job.driver) if manifest.failure else 0

    def _reason(self, manifest: Manifest) -> str | None:
        """One line with the class of failure, and how often it may happen."""
        if manifest.failure is None:
            return None
        return f"{manifest.failure_text}; start {self._failures(manifest)} of {self._job.retries.of(manifest.failure) + 1}"

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:  # a full disk under the log must not end the sweep
                log.debug("a listener failed: %s", error)
