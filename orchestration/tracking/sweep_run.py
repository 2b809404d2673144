"""What MLflow shows of a sweep as a whole: its description, its charts, and the files of its own run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from orchestration.tracking.artifact_queue import ArtifactQueue
from orchestration.tracking.descriptions import SweepFacts, TrialSummary, sweep_note
from orchestration.tracking.experiment import MlflowUnavailable, RunGone, one_line, translated
from orchestration.tracking.run_files import RunFile, overview_files
from orchestration.tracking.runs import Runs
from orchestration.tracking.ui_links import comparison_url, file_url, grouped_by, runs_url, trials_url, views

log = logging.getLogger(__name__)

EVERY_S = 60.0
"""While trials go on, the sweep as a whole is shown anew at most so often."""

Overview = Callable[[], Mapping[str, bytes]]
"""Makes the files of the sweep's own run, by name: tables, figures, a report."""


class SweepRun:
    """Gathers what is known of the trials, and shows the sweep by it."""

    def __init__(self, name: str, facts: SweepFacts, overview: Overview | None) -> None:
        self._name, self._facts, self._overview = name, facts, overview
        self._summaries: dict[str, TrialSummary] = {}
        self._from_s: float | None = 0.0
        self._shown_s = 0.0
        self._files: tuple[RunFile, ...] = ()
        self._told: set[str] = set()

    def note(self, trial_id: str, summary: TrialSummary) -> None:
        """A trial stands so."""
        if self._summaries.get(trial_id) != summary and self._from_s is None:
            self._from_s = self._shown_s + EVERY_S
        self._summaries[trial_id] = summary

    def hurry(self) -> None:
        """It shall be shown at once: nothing more will come, or what MLflow holds is not known any more."""
        self._from_s = 0.0

    def due_s(self) -> float | None:
        """The instant, by `time.monotonic`, at which it shall be shown; None while there is nothing new."""
        return self._from_s

    def is_due(self) -> bool:
        """Whether to show it now."""
        return self._from_s is not None and time.monotonic() >= self._from_s

    def show(self, runs: Runs, filing: ArtifactQueue, known: Sequence[str]) -> None:
        """Show it by the trials that the file asks for, in this order; its files are left to `filing`. Raises Abandoned, Away."""
        self._from_s, self._shown_s = None, time.monotonic()
        summaries = {trial_id: self._summaries[trial_id] for trial_id in known if trial_id in self._summaries}
        try:
            self._files = made(self._overview, summaries)
            filing.want(None, self._files)
        except Exception as error:  # a bug in a figure must not end the tracking
            self._tell("the comparison for MLflow could not be made", error)
        try:
            with translated():
                describe(runs, self._name, summaries, self._facts, files=self._files, total=len(known))
        except RunGone as error:  # the sweep's own run was deleted, or MLflow takes exception to the text
            self._tell("the sweep cannot be described in MLflow", error)
        except MlflowUnavailable:
            self.hurry()
            raise

    def _tell(self, what: str, error: Exception) -> None:
        """As a warning, once."""
        log.log(logging.DEBUG if what in self._told else logging.WARNING, "%s: %s: %s", what, type(error).__name__, one_line(error))
        self._told.add(what)


def made(overview: Overview | None, summaries: Mapping[str, TrialSummary]) -> tuple[RunFile, ...]:
    """The files that `overview` makes, once some trial has an epoch. Raises whatever it raises."""
    return overview_files(overview()) if overview and any(summary.epochs for summary in summaries.values()) else ()


def describe(
    runs: Runs, name: str, summaries: Mapping[str, TrialSummary], facts: SweepFacts, *, files: Sequence[RunFile], total: int
) -> None:
    """Describe the sweep by the trials that have started; `summaries` by trial, in the order of the file.

    Raises Abandoned, and MLflow's own errors: call it within `translated`.
    """
    varied = list(dict.fromkeys(setting for summary in summaries.values() for setting in summary.varied))
    links = _links(runs, summaries, varied, files)
    charts = views(varied, drawn=max((summary.drawn for summary in summaries.values()), default=0))
    runs.describe(sweep_note(name, list(summaries.values()), facts, links=links, total=total), charts)


def _links(runs: Runs, summaries: Mapping[str, TrialSummary], varied: Sequence[str], files: Sequence[RunFile]) -> dict[str, str]:
    """Addresses within the UI, by what they lead to."""
    finished = {trial_id: summary.last for trial_id, summary in summaries.items() if summary.status == "FINISHED"}
    best_first = sorted(finished, key=lambda trial_id: -(finished[trial_id] or 0.0))
    run_ids = [run_id for trial_id in best_first if (run_id := runs.run_id(trial_id))]
    shown = {f"charts by {grouped_by(varied)}": comparison_url("", runs.id), "charts of every trial": trials_url("", runs.id)}
    shown |= {"finished trials side by side": runs_url("", runs.id, run_ids)} if len(run_ids) > 1 else {}
    pages_first = sorted((file.name for file in files), key=lambda name: not name.endswith(".html"))
    return shown | {name: file_url("", runs.id, runs.parent_id, name) for name in pages_first}
