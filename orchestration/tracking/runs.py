"""The runs of a sweep in MLflow: writes only what differs from their content, so that a replay adds nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestration.errors import TrackingError, without_password
from orchestration.record.trial_state import TrialState
from orchestration.tracking.artifacts import Artifacts
from orchestration.tracking.dataset_inputs import UsedData
from orchestration.tracking.experiment import (
    MetricValue,
    RunGone,
    TrackingAbandoned,
    find_experiment,
    translated,
    write_data,
    write_params,
    write_tags,
    write_values,
)
from orchestration.tracking.mlflow_private import LONGEST_BATCH, LONGEST_TAG, NOTE, PARENT_RUN, file_tags
from orchestration.tracking.run_content import KIND, MLFLOW_STATUS, MetricPoint, RunContent
from orchestration.tracking.run_files import RunFile, digest_of

if TYPE_CHECKING:
    from orchestration.tracking.experiment import Client

_FILES = "rrn.files"  # the digest of the files that MLflow has
_FAILURE_TAGS = ("failure", "reason")  # deleted when the trial trains again


@dataclass(frozen=True)
class _Run:
    """A run as MLflow last showed it."""

    run_id: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    data: frozenset[tuple[str, str]]
    """Names and digests of its data sets."""
    place: str
    """Its artifact URI."""


class Runs:
    """The runs of a sweep's experiment: read once by a search, and updated with every change made here.

    Every method may raise TrackingAbandoned once `abandoned` is set, and MLflow's own errors: call them within `translated`.
    """

    def __init__(self, uri: str, client: Client, experiment_id: str, *, sweep: RunContent, abandoned: threading.Event) -> None:
        self.id, self._reader, self._abandoned = experiment_id, client, abandoned
        self.artifacts = Artifacts(uri, client, lambda: self._writer)
        self._own_tags: dict[str, str] | None = None
        self.created = self.points = 0
        """Runs created and points added so far."""
        runs = sorted(self._search(), key=lambda run: (run.start_ms, run.run_id))
        parents = [run for run in runs if run.tags.get(KIND) == "sweep"]
        self._trials: dict[str, list[_Run]] = {}
        for run in runs:
            if run.tags.get(KIND) == "trial":
                self._trials.setdefault(run.tags.get("trial_id", ""), []).append(run)
        self.left_running = sum(run.status == "RUNNING" for run in runs if run.tags.get(KIND) in ("sweep", "trial"))
        """Runs that were RUNNING in MLflow when the experiment was opened."""
        for run in parents[1:]:
            self._supersede(run)
        self._parent = self._tag(parents[0] if parents else self._create(sweep, sweep.tags), sweep.tags)

    @property
    def parent_id(self) -> str:
        return self._parent.run_id

    @property
    def trial_ids(self) -> list[str]:
        """Trials that have a run in MLflow."""
        return list(self._trials)

    def running(self) -> list[str]:
        """Trials with a run that is RUNNING in MLflow."""
        return [trial_id for trial_id, runs in self._trials.items() if any(run.status == "RUNNING" for run in runs)]

    def begin(self) -> None:
        """Set the sweep's own run to RUNNING."""
        self._parent = self._set_status(self._parent, "RUNNING", None)

    def run_id(self, trial_id: str) -> str | None:
        """The ID of the trial's run; None where it has none."""
        runs = self._trials.get(trial_id)
        return runs[0].run_id if runs else None

    def show(self, trial_id: str, content: RunContent | None, *, thorough: bool = False) -> None:
        """Make the trial's one run equal to `content`, except its files; None: the store has no such trial.

        Args:
            thorough: compare every point that MLflow has, instead of trusting the tag that records the last one.
        """
        runs = self._trials.get(trial_id, [])
        if content is None:
            self._trials[trial_id] = [self._set_status(run, "KILLED", None) if run.status == "RUNNING" else run for run in runs]
            return
        same = [run for run in runs if run.start_ms == content.start_ms]
        for run in runs:
            if run not in same[:1]:
                self._supersede(run)
        tags = {**content.tags, PARENT_RUN: self.parent_id}
        run = same[0] if same else self._create(content, tags)
        self._trials[trial_id] = [self._update(run, content, tags, thorough=thorough)]

    def store_files(self, trial_id: str | None, files: Sequence[RunFile], *, thorough: bool = False) -> None:
        """Upload these files of a trial that has a run; None: of the sweep's own run. Raises ArtifactsUnavailable, SweepError."""
        run = self._with_files(self._run_of(trial_id), files, thorough=thorough)
        if trial_id is None:
            self._parent = run
        else:
            self._trials[trial_id] = [run]

    def missing_files(self, trial_id: str | None, files: Sequence[RunFile]) -> int:
        """How many of these files the artifact store has not shown to be there, whatever the run's tag says of them."""
        return self.artifacts.missing(self._run_of(trial_id).run_id, files)

    def describe(self, note: str, charts: Mapping[str, str]) -> None:
        """Write the description of the sweep, in Markdown, and the tags of its charts, from `ui_links.views`."""
        self._parent = self._tag(self._parent, {NOTE: note[:LONGEST_TAG]})
        if self._own_tags is None:
            self._own_tags = dict(self._reader.get_experiment(self.id).tags)
        for name, value in {NOTE: note[:LONGEST_TAG], **charts}.items():
            if self._own_tags.get(name) != value:
                self._writer.set_experiment_tag(self.id, name, value)
                self._own_tags[name] = value

    def end(self, state: TrialState, *, end_ms: int | None = None) -> None:
        """Set the final status of the sweep's own run."""
        if self._parent.status != (status := MLFLOW_STATUS[state]):
            self._parent = self._set_status(self._parent, status, end_ms)

    @property
    def _writer(self) -> Client:
        if self._abandoned.is_set():
            raise TrackingAbandoned
        return self._reader

    def _search(self) -> Iterator[_Run]:
        token: str | None = None
        while token != "":
            page = self._reader.search_runs([self.id], max_results=1000, page_token=token)
            yield from map(_known_run, page)
            token = page.token or ""

    def _create(self, content: RunContent, tags: Mapping[str, str]) -> _Run:
        run = _known_run(self._writer.create_run(self.id, start_time=content.start_ms, tags=dict(tags), run_name=content.name))
        self.artifacts.begin(run.run_id)
        self.created += 1
        return run

    def _supersede(self, run: _Run) -> None:
        """Give a surplus run another kind: a lost reply created it twice, or the trial was started anew in the store."""
        if run.status == "RUNNING":
            self._set_status(run, "KILLED", None)
        self._tag(run, {KIND: "superseded"})

    def _update(self, run: _Run, content: RunContent, tags: Mapping[str, str], *, thorough: bool) -> _Run:
        run = self._log_data(self._log_params(run, content.params), content.data)
        for tag, points in content.series.items():
            self._log_points(run, points, after=None if thorough else _last_step(run, tag))
        # a call of its own, after the points: MLflow might keep a batch's tag and lose some of its points
        run = self._tag(run, {**tags, **{tag: str(points[-1].step) for tag, points in content.series.items() if points}})
        for name in _FAILURE_TAGS:
            if name in run.tags and name not in tags:
                self._writer.delete_tag(run.run_id, name)
                run = replace(run, tags={tag: value for tag, value in run.tags.items() if tag != name})
        return self._set_status(run, content.status, content.end_ms)

    def _run_of(self, trial_id: str | None) -> _Run:
        return self._parent if trial_id is None else self._trials[trial_id][0]

    def _with_files(self, run: _Run, files: Sequence[RunFile], *, thorough: bool) -> _Run:
        digest = digest_of(files)
        complete = run.tags.get(_FILES) == digest
        if not files or (complete and not thorough):
            return run
        self.artifacts.put(run.run_id, run.place, files, complete=complete, relist=thorough)
        listed = file_tags([file.name for file in files], tables=[file.name for file in files if file.table])
        return self._tag(run, {_FILES: digest, **listed})

    def _log_data(self, run: _Run, data: Sequence[UsedData]) -> _Run:
        missing = [item for item in data if (item.name, item.digest) not in run.data]
        if missing:
            write_data(self._writer, run.run_id, missing)
        return replace(run, data=run.data | {(item.name, item.digest) for item in missing})

    def _log_params(self, run: _Run, params: Mapping[str, str]) -> _Run:
        """Log those that the run lacks. MLflow refuses to change one, and a driver may die between run and parameters."""
        missing = {name: value for name, value in params.items() if name not in run.params}
        if missing:
            write_params(self._writer, run.run_id, missing)
        return replace(run, params={**missing, **run.params})

    def _log_points(self, run: _Run, points: Sequence[MetricPoint], *, after: int | None) -> None:
        """Log the points after the step `after`; None: those that MLflow lacks."""
        values = _values(point for point in points if after is None or point.step > after)
        if after is None:
            present = {(v.key, v.step, v.timestamp) for name in {v.key for v in values} for v in self._history(run, name)}
            values = [v for v in values if (v.key, v.step, v.time_ms) not in present]
        for i in range(0, len(values), LONGEST_BATCH):
            write_values(self._writer, run.run_id, values[i : i + LONGEST_BATCH])
        self.points += len(values)

    def _history(self, run: _Run, name: str) -> list[Any]:
        return list(self._reader.get_metric_history(run.run_id, name))

    def _tag(self, run: _Run, tags: Mapping[str, str]) -> _Run:
        changed = {name: value for name, value in tags.items() if run.tags.get(name) != value}
        if changed:
            write_tags(self._writer, run.run_id, changed)
        return replace(run, tags={**run.tags, **changed})

    def _set_status(self, run: _Run, status: str, end_ms: int | None) -> _Run:
        if run.status == status and end_ms in (None, run.end_ms):
            return run
        if status == "RUNNING":
            self._writer.update_run(run.run_id, status=status)
        else:
            self._writer.set_terminated(run.run_id, status=status, end_time=end_ms)
        return replace(run, status=status, end_ms=end_ms)


def open_runs(
    uri: str, sweep: str, *, tags: Mapping[str, str], start_ms: int | None = None, abandoned: threading.Event | None = None
) -> Runs:
    """Find or create the experiment and the sweep's own run in it, which gets `tags`.

    Raises TrackingError where waiting would not help, MlflowUnavailable where it may.
    """
    parent = RunContent(name=sweep, state=TrialState.RUNNING, tags={**tags, KIND: "sweep", "sweep": sweep}, start_ms=start_ms)
    try:
        experiment_id, client = find_experiment(uri, sweep)
        with translated():
            return Runs(uri, client, experiment_id, sweep=parent, abandoned=abandoned or threading.Event())
    except RunGone as error:
        raise TrackingError(f"MLflow at {without_password(uri)} refused the experiment {sweep}: {error}") from error


def _known_run(run: Any) -> _Run:
    info, data = run.info, run.data
    inputs = run.inputs.dataset_inputs if run.inputs else []
    known = frozenset((item.dataset.name, item.dataset.digest) for item in inputs)
    return _Run(
        info.run_id, info.status, info.start_time, info.end_time, dict(data.tags), dict(data.params), known, info.artifact_uri or ""
    )


def _values(points: Iterator[MetricPoint]) -> list[MetricValue]:
    return [MetricValue(name, point.step, point.time_ms, value) for point in points for name, value in sorted(point.metrics.items())]


def _last_step(run: _Run, tag: str) -> int:
    """The last step that MLflow has of a series, as its tag says."""
    text = run.tags.get(tag, "0")
    return int(text) if text.isdecimal() else 0
