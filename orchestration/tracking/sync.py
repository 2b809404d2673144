"""`sync`: makes MLflow equal to the store, from the store alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.plan.tracking_address import checked_address
from orchestration.record.manifest import Manifest, read_all
from orchestration.record.trial_state import TrialState
from orchestration.store.base import Store
from orchestration.tracking.artifacts import ArtifactsUnavailable
from orchestration.tracking.descriptions import SweepFacts, TrialSummary, summary_of
from orchestration.tracking.experiment import MlflowUnavailable, RunGone, translated
from orchestration.tracking.mlflow_private import error_text, storable_ms
from orchestration.tracking.run_content import RunContent, run_content, sweep_state
from orchestration.tracking.run_files import RunFile, stored, trial_files
from orchestration.tracking.runs import Runs, open_runs
from orchestration.tracking.sweep_run import Overview, comparison_files, describe

log = logging.getLogger(__name__)

_OWN_RUN = "the sweep's own run"


@dataclass(frozen=True)
class SyncReport:
    """What `sync` found and changed."""

    runs: int
    """Runs compared, with the sweep's own."""
    created: int
    closed: int
    """Runs that a dead driver had left running."""
    points: int
    """Metric values added."""
    files: int = 0
    """Files uploaded."""
    missing: int = 0
    """Files that could not be uploaded, or not be seen to be there."""
    error: str = ""
    """Why not."""

    def __str__(self) -> str:
        done = f"{self.created} created, {self.closed} closed, {self.points} points and {self.files} files added"
        missing = f"; {self.missing} files could not be stored or found, sync again later: {self.error}" if self.missing else ""
        return f"MLflow: {self.runs} runs compared, {done}{missing}"


def sync(
    uri: str,
    sweep: str,
    store: Store,
    *,
    trial_ids: Collection[str] | None = None,
    facts: SweepFacts | None = None,
    overview: Overview | None = None,
    progress: Callable[[int, int], None] | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> SyncReport:
    """Make MLflow equal to the store, for every trial of the sweep. No driver may be running the sweep.

    Args:
        trial_ids: the trials of the file, in its order, which decide the state and the description of the sweep's own run; unset, all that
            have ever started.
        facts: as for `Tracker`.
        overview: as for `Tracker`.
        progress: called with the number of trials done and of all trials.
        confirm: called before every write of a trial; raises LeaseLost once another driver has taken the sweep over.

    Raises:
        TrackingError: MLflow is unavailable, or refuses a trial; what was written stays. An unavailable artifact store is part of the
            result instead.
        StoreError: the store is unavailable. A manifest that cannot be read is named in a warning, and its run stays as it is.
    """
    manifests, unreadable = read_all(store, sweep)
    for fault in unreadable.values():
        log.warning("%s; its run in MLflow stays as it is", fault)
    try:
        started_ms = min((storable_ms(manifest.created_ms) for manifest in manifests.values()), default=None)
        runs = open_runs(checked_address(uri), sweep, tags={}, start_ms=started_ms)
        work = _Sync(runs, sweep, store, manifests, list(manifests if trial_ids is None else trial_ids), skip=unreadable, confirm=confirm)
        return work.run(uri, facts or SweepFacts(), overview, progress or (lambda done, total: None))
    except MlflowUnavailable as error:
        raise TrackingError(
            f"MLflow at {without_password(uri)} does not answer: {error}; nothing is lost, sync again when it is back"
        ) from error


class _Sync:
    """One pass over all trials. Its methods raise TrackingError and MlflowUnavailable."""

    def __init__(
        self,
        runs: Runs,
        sweep: str,
        store: Store,
        manifests: Mapping[str, Manifest],
        planned: Sequence[str],
        *,
        skip: Collection[str],
        confirm: Callable[[], None],
    ) -> None:
        self._runs, self._sweep, self._store, self._manifests, self._planned = runs, sweep, store, manifests, planned
        self._skip, self._confirm = skip, confirm
        self._contents = {trial_id: run_content(manifest, store=store.uri, live=False) for trial_id, manifest in manifests.items()}
        self._refused: dict[str, RunGone] = {}
        """Why, by the run's name in the error."""
        self._missing, self._error = 0, ""
        self._artifacts_unavailable = False

    def run(self, uri: str, facts: SweepFacts, overview: Overview | None, progress: Callable[[int, int], None]) -> SyncReport:
        trial_ids = sorted({*self._contents, *self._runs.trial_ids} - set(self._skip))
        for done, trial_id in enumerate(trial_ids, start=1):
            self._confirm()
            self._show(trial_id)
            progress(done, len(trial_ids))
        self._confirm()
        self._show_sweep(facts, overview)
        if self._refused:
            errors = "; ".join(f"{run}: {error}" for run, error in self._refused.items())
            raise TrackingError(f"MLflow at {without_password(uri)} refused {len(self._refused)} runs: {errors}")
        runs = self._runs
        return SyncReport(
            runs=len(runs.trial_ids) + 1,
            created=runs.created,
            closed=runs.left_running,
            points=runs.points,
            files=runs.artifacts.added,
            missing=self._missing,
            error=self._error,
        )

    def _show(self, trial_id: str) -> None:
        content: RunContent | None = self._contents.get(trial_id)
        try:
            with translated():
                self._runs.show(trial_id, content, thorough=True)
        except RunGone as error:
            self._refused[trial_id] = error
            return
        if content:
            self._store_files(trial_id, trial_files(self._manifests[trial_id], stored(self._store), live=False))

    def _store_files(self, trial_id: str | None, files: Sequence[RunFile]) -> None:
        """Upload the files of a trial; None: of the sweep's own run. After the first failure of the artifact store, only count them."""
        try:
            if not self._artifacts_unavailable:
                with translated():
                    self._runs.store_files(trial_id, files, thorough=True)
                return
        except TrackingError:
            raise
        except RunGone as error:
            self._refused[trial_id or _OWN_RUN] = error
            return
        except (ArtifactsUnavailable, SweepError) as error:
            self._artifacts_unavailable = isinstance(error, ArtifactsUnavailable)
            self._error = self._error or str(error)
        self._missing += self._runs.missing_files(trial_id, files)

    def _show_sweep(self, facts: SweepFacts, overview: Overview | None) -> None:
        summaries = {t: summary_of(self._manifests[t], self._contents[t].state) for t in self._planned if t in self._manifests}
        files = self._comparison_files(overview, summaries)
        self._store_files(None, files)
        states = {self._contents[trial_id].state if trial_id in self._contents else TrialState.NEW for trial_id in self._planned}
        ended_ms = max((storable_ms(self._manifests[trial_id].updated_ms) for trial_id in summaries), default=None)
        try:
            with translated():
                self._runs.end(sweep_state(states), end_ms=ended_ms)
                describe(self._runs, self._sweep, summaries, facts, files=files, total=len(self._planned))
        except RunGone as error:
            self._refused[_OWN_RUN] = error

    def _comparison_files(self, overview: Overview | None, summaries: Mapping[str, TrialSummary]) -> tuple[RunFile, ...]:
        try:
            return comparison_files(overview, summaries)
        except Exception as error:  # a bug in a figure must not stop the rest
            log.warning("MLflow: the comparison could not be drawn: %s: %s", type(error).__name__, error_text(error))
            return ()
