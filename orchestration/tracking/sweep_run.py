"""The sweep's own run in MLflow: its description, its charts and its files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from orchestration.record.trial_state import TrialState
from orchestration.tracking.artifact_queue import ArtifactQueue
from orchestration.tracking.descriptions import SweepFacts, TrialSummary, sweep_note
from orchestration.tracking.experiment import MlflowUnavailable, RunGone, translated
from orchestration.tracking.mlflow_private import artifact_url, error_text
from orchestration.tracking.run_files import RunFile, overview_files
from orchestration.tracking.runs import Runs
from orchestration.tracking.ui_links import comparison_url, grouped_by, runs_url, trials_url, views

log = logging.getLogger(__name__)

EVERY_S = 60.0
"""Shortest time between two updates while trials run."""

Overview = Callable[[], Mapping[str, bytes]]
"""Returns the files of the sweep's own run, by name: tables, figures, a report."""


class SweepRun:
    """Collects summaries of the trials, and updates the sweep's own run from them."""

    def __init__(self, name: str, facts: SweepFacts, overview: Overview | None) -> None:
        self._name, self._facts, self._overview = name, facts, overview
        self._summaries: dict[str, TrialSummary] = {}
        self._due_s: float | None = 0.0
        self._updated_s = 0.0
        self._files: tuple[RunFile, ...] = ()
        self._warned: set[str] = set()

    def add(self, trial_id: str, summary: TrialSummary) -> None:
        """Replace the summary of a trial."""
        if self._summaries.get(trial_id) != summary and self._due_s is None:
            self._due_s = self._updated_s + EVERY_S
        self._summaries[trial_id] = summary

    def update_now(self) -> None:
        """Make the next update due at once: it is the last one, or MLflow may have lost the one before."""
        self._due_s = 0.0

    def due_s(self) -> float | None:
        """When the next update is due, by `time.monotonic`; None while nothing has changed."""
        return self._due_s

    def is_due(self) -> bool:
        return self._due_s is not None and time.monotonic() >= self._due_s

    def update(self, runs: Runs, queue: ArtifactQueue, trial_ids: Sequence[str]) -> None:
        """Describe the sweep and queue its files. Raises TrackingAbandoned, MlflowUnavailable.

        Args:
            trial_ids: all trials of the file, in its order.
        """
        self._due_s, self._updated_s = None, time.monotonic()
        summaries = {trial_id: self._summaries[trial_id] for trial_id in trial_ids if trial_id in self._summaries}
        try:
            self._files = comparison_files(self._overview, summaries)
            queue.replace(None, self._files)
        except Exception as error:  # a bug in a figure must not end the tracking
            self._warn_once("MLflow: the comparison could not be drawn", error)
        try:
            with translated():
                describe(runs, self._name, summaries, self._facts, files=self._files, total=len(trial_ids))
        except RunGone as error:  # the sweep's own run was deleted, or MLflow refuses the text
            self._warn_once("MLflow: the description of the sweep could not be written", error)
        except MlflowUnavailable:
            self.update_now()
            raise

    def _warn_once(self, what: str, error: Exception) -> None:
        log.log(logging.DEBUG if what in self._warned else logging.WARNING, "%s: %s: %s", what, type(error).__name__, error_text(error))
        self._warned.add(what)


def comparison_files(overview: Overview | None, summaries: Mapping[str, TrialSummary]) -> tuple[RunFile, ...]:
    """The files from `overview`; none before some trial has an epoch. Raises any exception of `overview`."""
    return overview_files(overview()) if overview and any(summary.epochs for summary in summaries.values()) else ()


def describe(
    runs: Runs, name: str, summaries: Mapping[str, TrialSummary], facts: SweepFacts, *, files: Sequence[RunFile], total: int
) -> None:
    """Write the description and the charts of the sweep. Raises TrackingAbandoned, and MLflow's own errors: call it within `translated`.

    Args:
        summaries: of the trials that have started, in the order of the file.
    """
    varied = list(dict.fromkeys(setting for summary in summaries.values() for setting in summary.varied))
    links = _links(runs, summaries, varied, files)
    charts = views(varied, drawn=max((summary.drawn for summary in summaries.values()), default=0))
    runs.describe(sweep_note(name, list(summaries.values()), facts, links=links, total=total), charts)


def _links(runs: Runs, summaries: Mapping[str, TrialSummary], varied: Sequence[str], files: Sequence[RunFile]) -> dict[str, str]:
    """URLs within the UI, by their text."""
    finished = {trial_id: summary.last for trial_id, summary in summaries.items() if summary.state is TrialState.FINISHED}
    best_first = sorted(finished, key=lambda trial_id: -(finished[trial_id] or 0.0))
    run_ids = [run_id for trial_id in best_first if (run_id := runs.run_id(trial_id))]
    shown = {f"charts by {grouped_by(varied)}": comparison_url("", runs.id), "charts of every trial": trials_url("", runs.id)}
    shown |= {"finished trials side by side": runs_url("", runs.id, run_ids)} if len(run_ids) > 1 else {}
    pages_first = sorted((file.name for file in files), key=lambda name: not name.endswith(".html"))
    return shown | {name: artifact_url("", runs.id, runs.parent_id, name) for name in pages_first}
