"""The runs of a sweep in MLflow: writes only what differs from what is to be shown, so that a replay adds nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orchestration.errors import TrackingError, without_password
from orchestration.tracking.artifacts import Artifacts
from orchestration.tracking.dataset_inputs import DatasetInput
from orchestration.tracking.experiment import (
    LONGEST_BATCH,
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
from orchestration.tracking.run_content import KIND, LONGEST_TAG, NOTE, MetricPoint, RunContent
from orchestration.tracking.run_files import IMAGES, RunFile, digest_of

if TYPE_CHECKING:
    from orchestration.tracking.experiment import Client

_PARENT = "mlflow.parentRunId"
_FILES = "rrn.files"  # the digest of the files that MLflow holds
_PASSING_TAGS = ("failure", "reason")  # deleted when they no longer hold


@dataclass(frozen=True)
class _Run:
    """A run as MLflow has it."""

    run_id: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    data: frozenset[tuple[str, str]]
    """Names and digests of its data sets."""
    place: str
    """Where its files lie."""


class Runs:
    """The runs of a sweep's experiment, as one search found them and as changed since; it writes only what differs.

    Every method may raise Abandoned once `abandoned` is set, and MLflow's own errors: call them within `translated`.
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
        self.left_running = sum(run.status == "RUNNING" for run in (*parents, *(run for found in self._trials.values() for run in found)))
        """Runs that MLflow believed to be running when the experiment was opened."""
        for run in parents[1:]:
            self._supersede(run)
        self._parent = self._tag(parents[0] if parents else self._create(sweep, sweep.tags), sweep.tags)

    @property
    def parent_id(self) -> str:
        return self._parent.run_id

    @property
    def trial_ids(self) -> list[str]:
        """Trials of which MLflow has a run."""
        return list(self._trials)

    def running(self) -> list[str]:
        """Trials that MLflow believes to be running."""
        return [trial_id for trial_id, runs in self._trials.items() if any(run.status == "RUNNING" for run in runs)]

    def begin(self) -> None:
        """A driver works on the sweep."""
        self._parent = self._set_status(self._parent, "RUNNING", None)

    def run_id(self, trial_id: str) -> str | None:
        """Of the trial's run, where it has one."""
        runs = self._trials.get(trial_id)
        return runs[0].run_id if runs else None

    def show(self, trial_id: str, view: RunContent | None, *, thorough: bool = False) -> None:
        """Make the trial's one run equal to `view`, but for its files; None: the store knows no such trial.

        Args:
            thorough: look at every point that MLflow holds, instead of trusting the tag that says up to where they are there.
        """
        found = self._trials.get(trial_id, [])
        if view is None:
            self._trials[trial_id] = [self._set_status(run, "KILLED", None) if run.status == "RUNNING" else run for run in found]
            return
        same = [run for run in found if run.start_ms == view.start_ms]
        for run in found:
            if run not in same[:1]:
                self._supersede(run)
        tags = {**view.tags, _PARENT: self.parent_id}
        run = same[0] if same else self._create(view, tags)
        self._trials[trial_id] = [self._update(run, view, tags, thorough=thorough)]

    def store_files(self, trial_id: str | None, files: Sequence[RunFile], *, thorough: bool = False) -> None:
        """Make a trial that is shown have these files; None: the sweep's own run. Raises Unstored, SweepError: as `Artifacts.put`."""
        run = self._stored(self._run_of(trial_id), files, thorough=thorough)
        if trial_id is None:
            self._parent = run
        else:
            self._trials[trial_id] = [run]

    def lacking(self, trial_id: str | None, files: Sequence[RunFile]) -> int:
        """How many of these files the run is not known to have."""
        run = self._run_of(trial_id)
        return 0 if run.tags.get(_FILES) == digest_of(files) else self.artifacts.lacking(run.run_id, files)

    def describe(self, note: str, charts: Mapping[str, str]) -> None:
        """Describe the sweep, in Markdown, and lay out its charts, as `links.views` makes them."""
        self._parent = self._tag(self._parent, {NOTE: note[:LONGEST_TAG]})
        if self._own_tags is None:
            self._own_tags = dict(self._reader.get_experiment(self.id).tags)
        for name, value in {NOTE: note[:LONGEST_TAG], **charts}.items():
            if self._own_tags.get(name) != value:
                self._writer.set_experiment_tag(self.id, name, value)
                self._own_tags[name] = value

    def end(self, status: str, *, end_ms: int | None = None) -> None:
        """Close the sweep's own run, unless it is closed so."""
        if self._parent.status != status:
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

    def _create(self, view: RunContent, tags: Mapping[str, str]) -> _Run:
        run = _known_run(self._writer.create_run(self.id, start_time=view.start_ms, tags=dict(tags), run_name=view.name))
        self.artifacts.begin(run.run_id)
        self.created += 1
        return run

    def _supersede(self, run: _Run) -> None:
        """A run that a lost reply left twice, or whose trial was started afresh in the store; it stays, under another kind."""
        if run.status == "RUNNING":
            self._set_status(run, "KILLED", None)
        self._tag(run, {KIND: "superseded"})

    def _update(self, run: _Run, view: RunContent, tags: Mapping[str, str], *, thorough: bool) -> _Run:
        run = self._log_data(self._log_params(run, view.params), view.data)
        for tag, points in view.series.items():
            self._log_points(run, points, after=None if thorough else _logged(run, tag))
        # Its own call, afterwards: were it sent along, MLflow might keep the tag of a batch of which it lost a part.
        run = self._tag(run, {**tags, **{tag: str(points[-1].step) for tag, points in view.series.items() if points}})
        for name in _PASSING_TAGS:
            if name in run.tags and name not in tags:
                self._writer.delete_tag(run.run_id, name)
                run = replace(run, tags={tag: value for tag, value in run.tags.items() if tag != name})
        return self._set_status(run, view.status, view.end_ms)

    def _run_of(self, trial_id: str | None) -> _Run:
        return self._parent if trial_id is None else self._trials[trial_id][0]

    def _stored(self, run: _Run, files: Sequence[RunFile], *, thorough: bool) -> _Run:
        digest = digest_of(files)
        complete = run.tags.get(_FILES) == digest
        if not files or (complete and not thorough):
            return run
        self.artifacts.put(run.run_id, run.place, files, complete=complete, look=thorough)
        tables = [{"path": file.name, "type": "table"} for file in files if file.table]
        shown = {"mlflow.loggedArtifacts": json.dumps(tables)} if tables else {}
        pictured = {"mlflow.loggedImages": "True"} if any(file.name.startswith(f"{IMAGES}/") for file in files) else {}
        return self._tag(run, {_FILES: digest, **shown, **pictured})

    def _log_data(self, run: _Run, data: Sequence[DatasetInput]) -> _Run:
        missing = [found for found in data if (found.name, found.digest) not in run.data]
        if missing:
            write_data(self._writer, run.run_id, missing)
        return replace(run, data=run.data | {(found.name, found.digest) for found in missing})

    def _log_params(self, run: _Run, params: Mapping[str, str]) -> _Run:
        """Log those that the run lacks: MLflow refuses to change one, and a driver may die between run and parameters."""
        missing = {name: value for name, value in params.items() if name not in run.params}
        if missing:
            write_params(self._writer, run.run_id, missing)
        return replace(run, params={**missing, **run.params})

    def _log_points(self, run: _Run, points: Sequence[MetricPoint], *, after: int | None) -> None:
        """Log the points after that step; None: those that MLflow lacks."""
        values = _values(point for point in points if after is None or point.step > after)
        if after is None:
            there = {(v.key, v.step, v.timestamp) for name in {v.key for v in values} for v in self._history(run, name)}
            values = [v for v in values if (v.key, v.step, v.time_ms) not in there]
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
    """Find or make the experiment and the sweep's run in it, which gets `tags`.

    Raises TrackingError where waiting would not help, Away where it may.
    """
    parent = RunContent(name=sweep, status="RUNNING", tags={**tags, KIND: "sweep", "sweep": sweep}, start_ms=start_ms)
    try:
        experiment_id, client = find_experiment(uri, sweep)
        with translated():
            return Runs(uri, client, experiment_id, sweep=parent, abandoned=abandoned or threading.Event())
    except RunGone as error:
        raise TrackingError(f"MLflow at {without_password(uri)} refused the experiment {sweep}: {error}") from error


def _known_run(run: Any) -> _Run:
    info, data = run.info, run.data
    inputs = run.inputs.dataset_inputs if run.inputs else []
    known = frozenset((found.dataset.name, found.dataset.digest) for found in inputs)
    return _Run(
        info.run_id, info.status, info.start_time, info.end_time, dict(data.tags), dict(data.params), known, info.artifact_uri or ""
    )


def _values(points: Iterator[MetricPoint]) -> list[MetricValue]:
    return [MetricValue(name, point.step, point.time_ms, value) for point in points for name, value in sorted(point.metrics.items())]


def _logged(run: _Run, tag: str) -> int:
    text = run.tags.get(tag, "0")
    return int(text) if text.isdecimal() else 0
