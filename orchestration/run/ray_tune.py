"""Run many TrialPlans on Ray and pass what they report to those who listen.

Ray only places and restarts trials. Its own state lives in a scratch folder that nobody reads again: what a sweep
has done is in the store.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig, TuneError, Tuner
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from orchestration.errors import ClusterError, SweepError
from orchestration.failures import Failure, classify_death
from orchestration.observe.events import Event, Listener
from orchestration.observe.progress import TrialProgress
from orchestration.plan.spec import Resources, Retries
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import Lease
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_record import settle
from orchestration.run.ray_actor import TrialActor
from orchestration.run.ray_nodes import slots
from orchestration.run.stopping import Breaker, Stop
from orchestration.run.trial import Job
from orchestration.run.trial_source import Source
from orchestration.store.open import open_store

log = logging.getLogger(__name__)

DRIVER_WAITS_S = 20.0
"""How long the driver waits for an absent store: every trial's report waits meanwhile. Trials themselves wait longer."""


LOOK_EVERY_S = 10.0
"""How often the driver looks whether any node is left."""


SPARE_STARTS = 20
"""New starts that Ray grants a trial beyond all budgets together."""


NO_RETRIES = Retries.model_validate(dict.fromkeys(Retries.model_fields, 0))


def run(source: Source, job: Job, *, resources: Resources, listeners: Sequence[Listener], stop: Stop, lease: Lease) -> None:
    """Run every plan that `source` yields; returns when none is left, or when `stop` was requested and the trials have ended.

    A trial whose process or node dies, or which raises, starts again while its budget for that class of failure lasts
    (`job.retries`, counted in the store), and resumes from the store. A failed trial is marked, and the others go on; only when
    the first trials all fail with the very same error is `stop` requested here.

    Needs `nodes.connect`.

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
                # Starting a process costs more than a small trial. A GPU trial gets a fresh one, so that its memory is surely free.
                reuse_actors=resources.gpu == 0,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=scratch,
                # the budgets are ours; Ray's only bounds a trial that cannot even reach the store
                failure_config=FailureConfig(max_failures=sum(job.retries.model_dump().values()) + SPARE_STARTS),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # checkpoints are the trial's own affair
                stop=_StopAll(stop),
                callbacks=[_Events(job, source, listeners, stop, lease)],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except (TuneError, ray.exceptions.RayError, OSError) as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            what = last[0].partition(". ")[0].rstrip(".")  # further sentences advise on what was not wrong
            raise ClusterError(f"Ray failed: {what}; the same command goes on from the last checkpoints") from error


class _NeverRestored:
    """Ray pickles its whole set-up to disk. Nothing of it is read again, and listeners hold locks: leave all of it out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_NeverRestored, Searcher):
    """Hands the source's plans to Ray Tune as they are."""

    def __init__(self, source: Source, job: Job) -> None:
        super().__init__(metric="miou", mode="max")
        self._source, self._job = source, job

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        plan = self._source.next()
        return Searcher.FINISHED if plan is None else {"plan": plan, "job": self._job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The source is told from the manifest instead."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("Ray's state is never restored")


class _StopAll(_NeverRestored, Stopper):
    """Ray asks it many times a second."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stop.requested()


class _Events(_NeverRestored, Callback):
    """Turns Ray Tune's callbacks into events, and settles in the store what a dead trial could not."""

    def __init__(self, job: Job, source: Source, listeners: Sequence[Listener], stop: Stop, lease: Lease) -> None:
        self._job, self._source, self._listeners, self._lease = job, source, listeners, lease
        self._store = open_store(job.store, deadline_s=DRIVER_WAITS_S)
        self._breaker = Breaker(stop)
        self._seen: dict[str, tuple[TrialProgress, float]] = {}
        self._looked_s = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Without a node Ray would wait for ever, and without the lease this driver may not go on."""
        self._lease.check()
        if time.monotonic() - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = time.monotonic()
        if not any(node["Alive"] for node in ray.nodes()):  # type: ignore[no-untyped-call]
            raise ClusterError("no node of the Ray cluster is alive any more")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._emit(Event("started", trial.config["plan"]))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        known = {name: result[name] for name in TrialProgress.__dataclass_fields__ if name in result}
        if "attempt" in known:
            plan: TrialPlan = trial.config["plan"]
            update = TrialProgress(**{**known, "trial_id": plan.trial_id})
            self._seen[plan.trial_id] = update, time.monotonic()
            self._lease.see(plan.trial_id, update.attempt, update.worked_s)
            self._emit(Event("update", plan, update))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._emit(Event("retry", trial.config["plan"], reason=_reason(self._settled(trial, self._job.retries), trial)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        refused = (trial.last_result or {}).get("refused")
        manifest = self._settled(trial, NO_RETRIES, "unavailable", refused) if refused else self._manifest(trial)
        self._conclude(trial, manifest, refused or f"nothing of it in {self._store.uri}; the store must be one that all nodes share")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._conclude(trial, self._settled(trial, NO_RETRIES), _last_words(_error_text(trial)))

    def _conclude(self, trial: Trial, manifest: Manifest | None, otherwise: str) -> None:
        """Pass on how a trial ended; `otherwise` is the reason where the store knows nothing of it."""
        plan: TrialPlan = trial.config["plan"]
        self._lease.forget(plan.trial_id)
        if manifest is None:
            self._emit(Event("failed", plan, reason=otherwise))
            return
        if manifest.status == "running":
            self._emit(Event("elsewhere", plan, reason="another process took this trial over"))
            return
        self._source.tell(manifest)
        self._breaker.tell(manifest)
        self._emit(Event("finished" if manifest.status == "finished" else "failed", plan, reason=_reason(manifest, trial)))

    def _settled(self, trial: Trial, retries: Retries, failure: Failure | None = None, reason: str = "") -> Manifest | None:
        """The trial's manifest, its attempt closed if its process could not."""
        plan: TrialPlan = trial.config["plan"]
        text = _error_text(trial)
        with self._warned(trial):
            return settle(
                self._store,
                plan.sweep,
                plan.trial_id,
                driver=self._job.driver,
                failure=failure or classify_death(text),
                reason=reason or _last_words(text),
                traceback=text,
                worked_s=self._worked_s(plan.trial_id),
                retries=retries,
            )
        return None

    def _manifest(self, trial: Trial) -> Manifest | None:
        plan: TrialPlan = trial.config["plan"]
        with self._warned(trial):
            return read_manifest(self._store, plan.sweep, plan.trial_id)
        return None

    @contextmanager
    def _warned(self, trial: Trial) -> Iterator[None]:
        """A store that does not answer leads to a warning: an exception here would end the whole sweep."""
        try:
            yield
        except SweepError as error:
            log.warning("trial %s: %s", trial.config["plan"].trial_id, error)

    def _worked_s(self, trial_id: str) -> float:
        """For how long the trial's process was at work before it died, as far as it told."""
        if trial_id not in self._seen:
            return 0.0
        update, at_s = self._seen.pop(trial_id)
        return update.worked_s + time.monotonic() - at_s

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:  # a full disk under the log must not end the sweep
                log.debug("a listener failed: %s", error)


def _reason(manifest: Manifest | None, trial: Trial) -> str | None:
    """One line with its class: what the trial itself left in its manifest, or what Ray says of its process."""
    if manifest and manifest.failure:
        return f"[{manifest.failure}] {manifest.reason}"
    return None if manifest else f"[lost] {_last_words(_error_text(trial))}"


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line or "died" in line), "its process ended without a word")


def _error_text(trial: Trial) -> str:
    """What Ray wrote of the trial's failures in the driver's scratch folder."""
    with suppress(OSError):
        return Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
    return ""


def _trial_id(trial: Trial) -> str:
    return str(trial.config["plan"].trial_id)
