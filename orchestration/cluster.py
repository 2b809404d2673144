"""Run many TrialPlans on Ray and pass what they report to those who listen.

Ray only places and restarts trials. Its own state lives in a scratch folder that nobody reads again: what a sweep
has done is in the store.
"""

from __future__ import annotations

import logging
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, TuneError, Tuner
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from orchestration.errors import ClusterError, Fenced, SweepError
from orchestration.manifest import Manifest, TrialRecord, read_manifest
from orchestration.plan import TrialPlan
from orchestration.spec import Resources
from orchestration.store import open_store
from orchestration.trial import Job, Update, run_trial

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.5
"""A trial reports to the driver at most this often, besides after every commit: each report waits for the driver."""


DRIVER_WAITS_S = 20.0
"""How long the driver waits for an absent store: every trial's report waits meanwhile. Trials themselves wait longer."""


LOOK_EVERY_S = 10.0
"""How often the driver looks whether any node is left."""


class Source(Protocol):
    """Where plans come from: a fixed list or an adaptive search."""

    @property
    def remaining(self) -> int: ...

    def next(self) -> TrialPlan | None: ...

    def tell(self, manifest: Manifest) -> None: ...


class FixedSource:
    """A list of plans, one after the other."""

    def __init__(self, plans: Sequence[TrialPlan]) -> None:
        self._plans = list(plans)

    @property
    def remaining(self) -> int:
        return len(self._plans)

    def next(self) -> TrialPlan | None:
        return self._plans.pop(0) if self._plans else None

    def tell(self, manifest: Manifest) -> None:
        """A fixed list learns nothing."""


@dataclass(frozen=True)
class Event:
    """Something happened to a trial."""

    kind: Literal["started", "update", "retry", "finished", "failed", "elsewhere"]
    plan: TrialPlan
    update: Update | None = None
    reason: str | None = None


Listener = Callable[[Event], None]


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Join the Ray cluster at `address` (`host:port` or `auto`), or start a local one where it is None.

    Raises:
        ClusterError: the cluster does not answer.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    _probe(address)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks repeat what an event tells in one line
    try:
        if address is None:
            # "local", because without an address Ray would join any cluster that happens to run on this machine
            ray.init(address="local", include_dashboard=False, object_store_memory=2**27, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be reached: {error}; check RAY_ADDRESS and the token") from error
    try:
        yield
    finally:
        ray.shutdown()


def slots(resources: Resources) -> int:
    """How many trials fit on the cluster at once.

    Raises:
        ClusterError: no node can ever hold one.
    """
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    per_node = [_fits(node, resources) for node in nodes]
    if not sum(per_node):
        largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
        raise ClusterError(
            f"no node can hold a trial: resources ask for cpu {resources.cpu:g}, gpu {resources.gpu:g}; "
            f"the largest of {len(nodes)} nodes has cpu {largest.get('CPU', 0):g}, gpu {largest.get('GPU', 0):g}; "
            "lower resources in the sweep file or join a larger cluster with RAY_ADDRESS"
        )
    return sum(per_node)


def run(source: Source, job: Job, *, resources: Resources, retries: int, listeners: Sequence[Listener]) -> None:
    """Run every plan that `source` yields; returns when none is left. Needs `connect`.

    A trial whose process or node dies, or which raises, starts again up to `retries` times and resumes from the store;
    one that would fail in the same way again (bad data, a diverged loss) does not. A failed trial is marked, and the others go on.

    Raises:
        ClusterError: no node can hold a trial, or Ray itself failed.
    """
    concurrent = slots(resources)
    with tempfile.TemporaryDirectory(prefix="rrn-sweep-") as scratch:
        tuner = Tuner(
            tune.with_resources(rrn_trial, {"cpu": resources.cpu, "gpu": resources.gpu}),
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
                failure_config=FailureConfig(max_failures=retries),
                callbacks=[_Events(job, source, listeners)],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except (TuneError, ray.exceptions.RayError) as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ClusterError(f"Ray failed: {last[0]}; the same command goes on from the last checkpoints") from error


def rrn_trial(config: dict[str, Any]) -> None:
    """The function that Ray runs for a trial; a restarted one asks the store where it was."""
    reported_s, committed = -REPORT_EVERY_S, -1
    try:
        for update in run_trial(config["plan"], config["job"]):
            if update.finished or update.committed != committed or time.monotonic() - reported_s >= REPORT_EVERY_S:
                tune.report(asdict(update))
                reported_s, committed = time.monotonic(), update.committed
    except Fenced as error:
        # not an error to retry: someone else is training this very trial
        log.warning("%s", error)
    except (ValueError, FloatingPointError) as error:
        # the same settings on the same data would raise it again; the manifest holds the reason
        log.warning("%s", error)


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


class _Events(_NeverRestored, Callback):
    """Turns Ray Tune's callbacks into events, and settles in the store what a dead trial could not."""

    def __init__(self, job: Job, source: Source, listeners: Sequence[Listener]) -> None:
        self._job, self._source, self._listeners = job, source, listeners
        self._store = open_store(job.store, deadline_s=DRIVER_WAITS_S)
        self._looked_s = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Without a node Ray would wait for ever."""
        if time.monotonic() - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = time.monotonic()
        if not any(node["Alive"] for node in ray.nodes()):  # type: ignore[no-untyped-call]
            raise ClusterError("no node of the Ray cluster is alive any more")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._emit(Event("started", trial.config["plan"]))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        known = {name: result[name] for name in Update.__dataclass_fields__ if name in result}
        if "attempt" in known:
            self._emit(Event("update", trial.config["plan"], Update(**{**known, "trial_id": trial.config["plan"].trial_id})))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._emit(Event("retry", trial.config["plan"], reason=_reason(self._manifest(trial), trial)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        plan: TrialPlan = trial.config["plan"]
        manifest = self._manifest(trial)
        if manifest is None:
            self._emit(Event("failed", plan, reason=f"nothing of it in {self._store.uri}; the store must be one that all nodes share"))
        elif manifest.status == "running":
            self._emit(Event("elsewhere", plan, reason="another process took this trial over"))
        else:
            self._source.tell(manifest)
            self._emit(Event("finished" if manifest.status == "finished" else "failed", plan, reason=manifest.reason))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        plan: TrialPlan = trial.config["plan"]
        manifest = self._manifest(trial)
        reason = _reason(manifest, trial)
        if manifest is None or manifest.status == "running":
            manifest = self._bury(plan, reason=reason, traceback=_error_text(trial)) or manifest
        if manifest:
            self._source.tell(manifest)
        self._emit(Event("failed", plan, reason=reason))

    def _bury(self, plan: TrialPlan, *, reason: str, traceback: str) -> Manifest | None:
        """Mark a trial failed whose process died without a word; opening the record fences it off, should it be alive after all."""
        try:
            record = TrialRecord.open(self._store, plan, retention=self._job.retention)
            if record.manifest.status != "finished":
                record.fail(reason=reason, traceback=traceback)
            return record.manifest
        except SweepError as error:
            log.warning("trial %s failed, and the store could not be told: %s", plan.trial_id, error)
            return None

    def _manifest(self, trial: Trial) -> Manifest | None:
        """None also where the store does not answer: an exception here would end the whole sweep."""
        plan: TrialPlan = trial.config["plan"]
        try:
            return read_manifest(self._store, plan.sweep, plan.trial_id)
        except SweepError as error:
            log.warning("trial %s: %s", plan.trial_id, error)
            return None

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:  # a full disk under the log must not end the sweep
                log.debug("a listener failed: %s", error)


def _reason(manifest: Manifest | None, trial: Trial) -> str:
    """One line: what the trial itself left in its manifest, or what Ray says of its process."""
    if manifest and manifest.status == "failed" and manifest.reason:
        return manifest.reason
    lines = [line.strip() for line in _error_text(trial).splitlines() if line.strip()]
    error = next((line for line in reversed(lines) if "Error" in line or "died" in line), "its process ended without a word")
    return f"worker lost: {error}"


def _error_text(trial: Trial) -> str:
    """What Ray wrote of the trial's failures in the driver's scratch folder."""
    with suppress(OSError):
        return Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
    return ""


def _probe(address: str | None) -> None:
    """Fail within seconds where nothing listens; Ray itself would try for minutes."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ClusterError(f"RAY_ADDRESS: must be host:port of a cluster's head or auto, got {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(f"RAY_ADDRESS: nothing answers at {address}: {error}") from error


def _fits(node: dict[str, float], resources: Resources) -> int:
    """Trials that fit on one node; the small slack forgives fractions such as 3 x 1/3."""
    asked = {"CPU": resources.cpu, "GPU": resources.gpu}
    return min(int(node.get(name, 0) / amount + 1e-6) for name, amount in asked.items() if amount)


def _trial_id(trial: Trial) -> str:
    return str(trial.config["plan"].trial_id)
