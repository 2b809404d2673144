"""Makes MLflow equal to the store, from the store alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.record.manifest import Manifest, read_manifests
from orchestration.store.base import Store
from orchestration.tracking.artifacts import ArtifactsUnavailable
from orchestration.tracking.descriptions import SweepFacts, TrialSummary, summary_of
from orchestration.tracking.experiment import MlflowUnavailable, RunGone, one_line, translated
from orchestration.tracking.run_content import RunContent, run_content, sweep_status
from orchestration.tracking.run_files import RunFile, stored, trial_files
from orchestration.tracking.runs import Runs, open_runs
from orchestration.tracking.sweep_run import Overview, describe, made
from orchestration.tracking.ui_links import checked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What `sync` found and did."""

    runs: int
    """Runs looked at, with the sweep's own."""
    created: int
    closed: int
    """Runs that a dead driver had left running."""
    points: int
    """Metric values that MLflow lacked."""
    files: int = 0
    """Files that it lacked, and has now."""
    missing: int = 0
    """Files that it still lacks."""
    fault: str = ""
    """Why."""

    def __str__(self) -> str:
        done = f"{self.created} created, {self.closed} closed, {self.points} points and {self.files} files added"
        lacking = f"; {self.missing} files could not be stored, sync again later: {self.fault}" if self.missing else ""
        return f"MLflow: {self.runs} runs looked at, {done}{lacking}"


def sync(
    uri: str,
    sweep: str,
    store: Store,
    *,
    trial_ids: Collection[str] | None = None,
    facts: SweepFacts | None = None,
    overview: Overview | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SyncReport:
    """Make MLflow equal to the store, for every trial of the sweep; no driver may be at work on it.

    Args:
        trial_ids: those by which the sweep's own run is judged and described: all that the file asks for, in its order; unset, all that
            have ever started.
        facts: as for `Tracker`.
        overview: as for `Tracker`.
        progress: told of trials shown, and all of them.

    Raises:
        TrackingError: MLflow is away, or refuses a trial; whatever it took stays. A place for files that is away is told in the result.
        StoreError: the store is away, or holds a manifest that cannot be read.
    """
    manifests = read_manifests(store, sweep)
    try:
        runs = open_runs(checked(uri), sweep, tags={}, start_ms=min((m.created_ms for m in manifests.values()), default=None))
        work = _Sync(runs, sweep, store, manifests, list(manifests if trial_ids is None else trial_ids))
        return work.done(uri, facts or SweepFacts(), overview, progress or (lambda done, total: None))
    except MlflowUnavailable as error:
        raise TrackingError(f"MLflow at {without_password(uri)} is away: {error}; nothing is lost, sync again when it is back") from error


class _Sync:
    """One pass over all trials. Its methods raise TrackingError and Away."""

    def __init__(self, runs: Runs, sweep: str, store: Store, manifests: Mapping[str, Manifest], judged: Sequence[str]) -> None:
        self._runs, self._sweep, self._store, self._manifests, self._judged = runs, sweep, store, manifests, judged
        self._views = {trial_id: run_content(manifest, store=store.uri, live=False) for trial_id, manifest in manifests.items()}
        self._refused: list[str] = []
        self._missing, self._fault = 0, ""
        self._place_away = False

    def done(self, uri: str, facts: SweepFacts, overview: Overview | None, progress: Callable[[int, int], None]) -> SyncReport:
        trial_ids = sorted({*self._views, *self._runs.trial_ids})
        for done, trial_id in enumerate(trial_ids, start=1):
            self._show(trial_id)
            progress(done, len(trial_ids))
        self._show_sweep(facts, overview)
        if self._refused:
            raise TrackingError(f"MLflow at {without_password(uri)} refused {len(self._refused)} runs: {'; '.join(self._refused)}")
        runs = self._runs
        synced = SyncReport(len(runs.trial_ids) + 1, runs.created, runs.left_running, runs.points, runs.artifacts.added)
        return SyncReport(**{**vars(synced), "missing": self._missing, "fault": self._fault})

    def _show(self, trial_id: str) -> None:
        view: RunContent | None = self._views.get(trial_id)
        try:
            with translated():
                self._runs.show(trial_id, view, thorough=True)
        except RunGone as error:
            self._refused.append(f"{trial_id}: {error}")
            return
        if view:
            self._store_files(trial_id, trial_files(self._manifests[trial_id], stored(self._store), live=False))

    def _store_files(self, trial_id: str | None, files: Sequence[RunFile]) -> None:
        """Of the trial, or of the sweep's own run; once the place has failed, only what is known to be missing is counted."""
        try:
            if not self._place_away:
                with translated():
                    self._runs.store_files(trial_id, files, thorough=True)
                return
        except TrackingError:
            raise
        except (ArtifactsUnavailable, SweepError) as error:
            self._place_away = isinstance(error, ArtifactsUnavailable)
            self._fault = self._fault or str(error)
        self._missing += self._runs.lacking(trial_id, files)

    def _show_sweep(self, facts: SweepFacts, overview: Overview | None) -> None:
        summaries = {t: summary_of(self._manifests[t], self._views[t].status) for t in self._judged if t in self._manifests}
        files = self._overview_files(overview, summaries)
        self._store_files(None, files)
        statuses = {self._views[trial_id].status if trial_id in self._views else None for trial_id in self._judged}
        ended_ms = max((self._manifests[trial_id].updated_ms for trial_id in summaries), default=None)
        try:
            with translated():
                self._runs.end(sweep_status(statuses), end_ms=ended_ms)
                describe(self._runs, self._sweep, summaries, facts, files=files, total=len(self._judged))
        except RunGone as error:
            self._refused.append(f"the sweep's own run: {error}")

    def _overview_files(self, overview: Overview | None, summaries: Mapping[str, TrialSummary]) -> tuple[RunFile, ...]:
        try:
            return made(overview, summaries)
        except Exception as error:  # a bug in a figure must not keep the rest away
            log.warning("the comparison for MLflow could not be made: %s: %s", type(error).__name__, one_line(error))
            return ()
