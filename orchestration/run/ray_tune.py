"""Run many TrialPlans on Ray Tune and pass their progress to listeners.

Ray only places and restarts trials. Its own state is in a scratch folder that is never read again: the store knows what the sweep has done.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig, TuneError, Tuner
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from orchestration.errors import ClusterError, SweepError
from orchestration.failures import Failure, classify_death
from orchestration.observe.events import Event, Listener, TrialProgress
from orchestration.plan.spec import Resources, Retries
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import Lease
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_record import settle
from orchestration.record.trial_state import TrialState
from orchestration.run.ray_actor import TrialActor, progress_of, refusal_of
from orchestration.run.ray_nodes import slots
from orchestration.run.ray_private import error_line, error_text, first_sentence, living_nodes
from orchestration.run.stopping import Breaker, Stop
from orchestration.run.trial import Job
from orchestration.run.trial_source import Source
from orchestration.store.open import open_store

log = logging.getLogger(__name__)

DRIVER_WAITS_S = 20.0
"""How long the driver waits for a store that does not answer. All trials' reports wait with it, so trials themselves wait longer."""

LOOK_EVERY_S = 10.0
"""How often the driver checks that any node is left."""

SPARE_STARTS = 20
"""Restarts that Ray allows a trial beyond the sum of its budgets."""

NO_RETRIES = Retries.model_validate(dict.fromkeys(Retries.model_fields, 0))


def run(source: Source, job: Job, *, resources: Resources, listeners: Sequence[Listener], stop: Stop, lease: Lease) -> None:
    """Run every plan of `source`. Returns when none is left, or when `stop` was requested and the trials have ended.

    A trial that raises, or whose worker or node dies, restarts while its budget for that class of failure lasts (`job.retries`, counted
    in the store), and resumes from the store. A failed trial does not stop the others, unless the first trials all fail with the same
    error: then `stop` is requested here.

    Call it within `ray_nodes.connect`.

    Raises:
        ClusterError: no node can hold a trial, or Ray itself failed.
        LeaseLost: another driver has taken the sweep over.
    """
    concurrent = slots(resources)
    with tempfile.TemporaryDirectory(prefix="rrn-sweep-", ignore_cleanup_errors=True) as scratch:
        tuner = Tuner(
            tune.with_resources(TrialActor, {"cpu": resources.cpu, "gpu": resources.gpu}),
            tune_config=TuneConfig(
                search_alg=_Searcher(source, job),
                num_samples=max(1, source.remaining),
                max_concurrent_trials=concurrent,
                # starting a worker costs more than a small trial; a GPU trial gets a new one, so that all GPU memory is free
                reuse_actors=resources.gpu == 0,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=scratch,
                # our own budgets decide; Ray's only bounds a trial that cannot even reach the store
                failure_config=FailureConfig(max_failures=sum(job.retries.model_dump().values()) + SPARE_STARTS),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # the trial itself writes its checkpoints
                stop=_StopAll(stop),
                callbacks=[_Events(job, source, listeners, stop, lease)],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except (TuneError, ray.exceptions.RayError, OSError) as error:
            raise ClusterError(f"Ray failed: {first_sentence(error)}; the same command resumes from the last checkpoints") from error


class _NeverRestored:
    """Ray pickles its whole set-up to disk. None of it is read again, and listeners hold locks, so all of it is left out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_NeverRestored, Searcher):
    """Hands the source's plans to Ray Tune as they are."""

    def __init__(self, source: Source, job: Job) -> None:
        super().__init__()  # with a metric, Tune would demand it in every result
        self._source, self._job = source, job

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        plan = self._source.next()
        return Searcher.FINISHED if plan is None else {"plan": plan, "job": self._job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to do: the source gets the manifest, in `_Events`."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("Ray's state is never restored")


class _StopAll(_NeverRestored, Stopper):
    """Ray calls it many times a second."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stop.requested()


class _Events(_NeverRestored, Callback):
    """Turns Ray Tune's callbacks into events, and closes the attempts of dead workers in the store."""

    def __init__(self, job: Job, source: Source, listeners: Sequence[Listener], stop: Stop, lease: Lease) -> None:
        self._job, self._source, self._listeners, self._lease = job, source, listeners, lease
        self._store = open_store(job.store, deadline_s=DRIVER_WAITS_S)
        self._breaker = Breaker(stop)
        self._seen: dict[str, tuple[TrialProgress, float]] = {}
        self._looked_s = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """End the sweep if the lease is lost, or if no node is left, for which Ray would wait forever."""
        self._lease.check()
        if time.monotonic() - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = time.monotonic()
        if not living_nodes():
            raise ClusterError("no node of the Ray cluster is alive")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._emit(Event(trial.config["plan"], TrialState.RUNNING))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        if progress := progress_of(result):
            plan: TrialPlan = trial.config["plan"]
            self._seen[plan.trial_id] = progress, time.monotonic()
            self._lease.see(plan.trial_id, progress.attempt, progress.worked_s)
            self._emit(Event(plan, TrialState.RUNNING, progress))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._emit(Event(trial.config["plan"], TrialState.RESTARTING, reason=self._restart_reason(trial)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        plan: TrialPlan = trial.config["plan"]
        if refused := refusal_of(trial.last_result or {}):
            self._conclude(trial, lambda: self._settle(trial, NO_RETRIES, "unavailable", refused), refused)
        else:
            absent = f"no manifest in {self._store.uri}; check that all nodes share this store"
            self._conclude(trial, lambda: read_manifest(self._store, plan.sweep, plan.trial_id), absent)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._conclude(trial, lambda: self._settle(trial, NO_RETRIES), error_line(error_text(trial)))

    def _conclude(self, trial: Trial, ended: Callable[[], Manifest | None], otherwise: str) -> None:
        """Emit how a trial ended; `otherwise` is the reason if the store has no manifest.

        If the store does not answer, the attempt may still be open: the next driver closes it.
        """
        plan: TrialPlan = trial.config["plan"]
        try:
            manifest = ended()
        except SweepError as error:  # an exception here would end the whole sweep
            log.warning("trial %s: %s", plan.trial_id, error)
            self._emit(Event(plan, TrialState.INTERRUPTED, reason=str(error)))
            return
        self._lease.forget(plan.trial_id)
        if manifest is None:
            self._emit(Event(plan, TrialState.FAILED, reason=otherwise))
            return
        if not manifest.status.is_final:
            self._emit(Event(plan, TrialState.INTERRUPTED, reason="another worker has taken this trial over"))
            return
        self._source.tell(manifest)
        self._breaker.tell(manifest)
        self._emit(Event(plan, manifest.status, reason=_reason(manifest, trial)))

    def _restart_reason(self, trial: Trial) -> str | None:
        try:
            return _reason(self._settle(trial, self._job.retries), trial)
        except SweepError as error:  # an exception here would end the whole sweep
            log.warning("trial %s: %s", trial.config["plan"].trial_id, error)
            return _reason(None, trial)

    def _settle(self, trial: Trial, retries: Retries, failure: Failure | None = None, reason: str = "") -> Manifest | None:
        """The trial's manifest, after its attempt was closed if the worker died before it could. Raises SweepError."""
        plan: TrialPlan = trial.config["plan"]
        text = error_text(trial)
        return settle(
            self._store,
            plan.sweep,
            plan.trial_id,
            driver=self._job.driver,
            failure=failure or classify_death(text),
            reason=reason or error_line(text),
            traceback=text,
            worked_s=self._worked_s(plan.trial_id),
            retries=retries,
        )

    def _worked_s(self, trial_id: str) -> float:
        """Seconds that the worker had trained when it died: what it last reported, and the time since."""
        if trial_id not in self._seen:
            return 0.0
        progress, at_s = self._seen.pop(trial_id)
        return progress.worked_s + time.monotonic() - at_s

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:  # a full disk under the log must not end the sweep
                log.debug("a listener failed: %s", error)


def _reason(manifest: Manifest | None, trial: Trial) -> str | None:
    """One line with the class of failure: from the manifest, or from Ray if there is none."""
    if manifest and manifest.failure:
        return manifest.failure_text
    return None if manifest else f"[lost] {error_line(error_text(trial))}"


def _trial_id(trial: Trial) -> str:
    return str(trial.config["plan"].trial_id)
