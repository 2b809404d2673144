"""The content of a trial's MLflow run, from its manifest alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

from orchestration.plan.trial_plan import ID_LENGTH
from orchestration.record.manifest import CONTENTS, SCORE, Checkpoint, EpochMetrics, Manifest, best_epoch
from orchestration.record.stored_trials import varied_settings
from orchestration.record.trial_state import TrialState
from orchestration.tracking.dataset_inputs import UsedData, data_sets, split_hash
from orchestration.tracking.descriptions import cell_of, label_of, trial_note
from orchestration.tracking.mlflow_private import LONGEST_PARAM, LONGEST_TAG, NOTE, storable_ms
from rrn_core.methods import METHODS, settings_class
from rrn_core.setting import setting_of

KIND = "rrn.kind"
"""The tag that separates trials from the sweep's own run."""
BEST_SCORE, BEST_EPOCH = "best/miou", "best/miou_epoch"
"""The highest `val/miou` so far and the first epoch that had it. MLflow's UI lists metrics by name, so these come first."""
_LOGGED_EPOCH, _LOGGED_ATTEMPT = "rrn.logged_epoch", "rrn.logged_attempt"
_TABLED = "val/iou_"  # a series for each class and head, which run_files.py shows as a table


@dataclass(frozen=True)
class MetricPoint:
    """Metrics at one step. MLflow stores a point once, even if it is sent again."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunContent:
    """The content of an MLflow run: of a trial, or of the whole sweep."""

    name: str
    state: TrialState
    tags: Mapping[str, str]
    start_ms: int | None = None
    end_ms: int | None = None
    """None while it runs. Here and in `start_ms`, None lets MLflow take its own clock."""
    params: Mapping[str, str] = field(default_factory=dict)
    data: tuple[UsedData, ...] = ()
    series: Mapping[str, tuple[MetricPoint, ...]] = field(default_factory=dict)
    """Points by rising step. The key is the tag that records the last step that MLflow has."""

    @property
    def status(self) -> str:
        """MLflow's status for the state."""
        return MLFLOW_STATUS[self.state]


MLFLOW_STATUS: Mapping[TrialState, str] = {
    TrialState.NEW: "SCHEDULED",
    TrialState.RUNNING: "RUNNING",
    TrialState.RESTARTING: "RUNNING",
    TrialState.INTERRUPTED: "KILLED",
    TrialState.FINISHED: "FINISHED",
    TrialState.STOPPED: "FINISHED",
    TrialState.FAILED: "FAILED",
}
"""MLflow's status for each state."""


def run_content(manifest: Manifest, *, store: str, live: bool) -> RunContent:
    """The content of a trial's run. An unfinished trial is RUNNING while its driver is `live` and an attempt is open, else KILLED."""
    running = live and (manifest.is_open or not manifest.attempts)
    unfinished = TrialState.RUNNING if running else TrialState.INTERRUPTED
    state = manifest.status if manifest.status.is_final else unfinished
    status = MLFLOW_STATUS[state]
    return RunContent(
        name=label_of(manifest),
        state=state,
        tags=_trial_tags(manifest, store, state),
        start_ms=storable_ms(manifest.created_ms),
        end_ms=None if status == "RUNNING" else storable_ms(manifest.updated_ms),
        params={name: _text(manifest.config[name])[:LONGEST_PARAM] for name in _param_names(manifest)},
        data=data_sets(manifest.config),
        series={
            _LOGGED_EPOCH: tuple(_epochs(manifest)),
            _LOGGED_ATTEMPT: _effort(manifest),
        },
    )


def sweep_state(trials: Collection[TrialState]) -> TrialState:
    """The final state of the sweep, from the states of its trials."""
    if TrialState.FAILED in trials:
        return TrialState.FAILED
    return TrialState.FINISHED if set(trials) == {TrialState.FINISHED} else TrialState.INTERRUPTED


def _param_names(manifest: Manifest) -> list[str]:
    """Settings that the sweep varies, then headline settings, then those that differ from the defaults. `config.yaml` has all of them."""
    config, method = manifest.config, str(manifest.config.get("method"))
    if method not in METHODS:
        return list(config)
    settings, defaults = settings_class(method).model_fields, _defaults(method)
    headlines = [name for name, field in settings.items() if setting_of(field).headline]
    chosen = [name for name in settings if name in config and name not in CONTENTS and config[name] != defaults[name]]
    return [name for name in dict.fromkeys([*manifest.varied, *headlines, *chosen]) if name in config and name in settings]


@cache
def _defaults(method: str) -> Mapping[str, Any]:
    """The default of every setting of a method, as in JSON."""
    return settings_class(method).model_construct().model_dump(mode="json")


def _epochs(manifest: Manifest) -> Iterator[MetricPoint]:
    best: EpochMetrics | None = None
    for entry in manifest.history:
        best = best_epoch(filter(None, (best, entry)))
        shown = {name: value for name, value in entry.metrics.items() if not name.startswith(_TABLED)}
        highest = {BEST_SCORE: best.metrics[SCORE], BEST_EPOCH: best.epoch} if best else {}
        yield MetricPoint(entry.epoch, storable_ms(entry.time_ms), {**shown, **highest})


def _effort(manifest: Manifest) -> tuple[MetricPoint, ...]:
    """Seconds up to the end of each attempt. An attempt that has ended never changes, so a replay sends the same points."""
    ended = [(attempt, attempt.ended_ms) for attempt in manifest.attempts if attempt.ended_ms is not None]
    useful = accumulate(attempt.useful_s for attempt, _ in ended)
    repeated = accumulate(attempt.repeated_s for attempt, _ in ended)
    lost = accumulate(attempt.lost_s for attempt, _ in ended)
    return tuple(
        MetricPoint(attempt.number, storable_ms(ended_ms), {"effort/useful_s": u, "effort/repeated_s": r, "effort/lost_s": n})
        for (attempt, ended_ms), u, r, n in zip(ended, useful, repeated, lost, strict=True)
    )


def _trial_tags(manifest: Manifest, store: str, state: TrialState) -> dict[str, str]:
    shown = dict.fromkeys(("partition", "seed", "method", "dataset", *varied_settings(manifest)))
    tags: dict[str, Any] = {name: manifest.config[name] for name in shown if name in manifest.config}
    tags |= {"sweep": manifest.sweep, "trial_id": manifest.trial_id, KIND: "trial", "attempt": manifest.attempt}
    tags |= {"cell": cell_of(manifest), "split": split_hash(manifest.config)[:ID_LENGTH]}
    tags[NOTE] = trial_note(manifest, store=store, state=state)
    tags |= {"proposal": manifest.proposal} if manifest.proposal is not None else {}
    tags |= {"failure": manifest.failure} if manifest.failure else {}
    tags |= {"reason": manifest.reason} if manifest.reason else {}
    if manifest.attempts:
        tags["attempts"] = f"{len(manifest.attempts)}: {', '.join(attempt.outcome or 'open' for attempt in manifest.attempts)}"
    if manifest.checkpoints:
        tags["checkpoint_last"] = _folder(max(manifest.checkpoints, key=lambda c: c.step), store)
    if manifest.best_checkpoint:
        tags["checkpoint_best"] = _folder(manifest.best_checkpoint, store)
    return {name: _text(value)[:LONGEST_TAG] for name, value in tags.items()}


def _folder(checkpoint: Checkpoint, store: str) -> str:
    key = min(ref.key for ref in checkpoint.objects.values())
    return f"{store.rstrip('/')}/{key.rpartition('/')[0]}"


def _text(value: Any) -> str:
    """A setting as in YAML: strings bare, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
