"""What the MLflow run of a trial has to show, from its manifest alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

from orchestration.plan.trial_plan import ID_LENGTH
from orchestration.record.manifest import CONTENTS, SCORE, Checkpoint, EpochMetrics, Manifest
from orchestration.tracking.dataset_inputs import DatasetInput, data_sets, split_hash
from orchestration.tracking.descriptions import cell_of, trial_note
from rrn_core.methods import METHODS, settings_class
from rrn_core.setting import setting_of

KIND = "rrn.kind"
"""The tag that tells trials from the sweep's own run."""
NOTE = "mlflow.note.content"
"""The tag that MLflow's UI shows as a description, in Markdown."""
BEST_SCORE, BEST_EPOCH = "best/miou", "best/miou_epoch"
"""The highest `val/miou` so far, and the first epoch that had it; MLflow's UI begins with the metric that is the first by name."""
LONGEST_TAG = 5000  # characters; MLflow takes 8000
_LONGEST_PARAM = 6000  # what MLflow takes
_LOGGED_EPOCH, _LOGGED_ATTEMPT = "rrn.logged_epoch", "rrn.logged_attempt"
_TABLED = "val/iou_"  # a series for each class and head: a table shows these better (runfiles.py)


@dataclass(frozen=True)
class MetricPoint:
    """Metrics at one step; the same point is stored once, however often it is sent."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunContent:
    """What the MLflow run of a trial, or of the whole sweep, has to show."""

    name: str
    status: str
    tags: Mapping[str, str]
    start_ms: int | None = None
    end_ms: int | None = None
    """None while it runs, or where MLflow's clock shall tell; so is `start_ms`."""
    params: Mapping[str, str] = field(default_factory=dict)
    data: tuple[DatasetInput, ...] = ()
    series: Mapping[str, tuple[MetricPoint, ...]] = field(default_factory=dict)
    """Points by rising step, under the tag that says up to which step MLflow holds them."""


def run_content(manifest: Manifest, *, store: str, live: bool) -> RunContent:
    """What MLflow has to show of a trial; an unfinished one is RUNNING while a driver is `live` and an attempt is open, else KILLED."""
    unfinished = "RUNNING" if live and not _closed(manifest) else "KILLED"
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(manifest.status, unfinished)
    return RunContent(
        name=manifest.label,
        status=status,
        tags=_trial_tags(manifest, store),
        start_ms=manifest.created_ms,
        end_ms=None if status == "RUNNING" else manifest.updated_ms,
        params={name: _text(manifest.config[name])[:_LONGEST_PARAM] for name in _telling(manifest)},
        data=data_sets(manifest.config),
        series={
            _LOGGED_EPOCH: tuple(_epochs(manifest)),
            _LOGGED_ATTEMPT: _effort(manifest),
        },
    )


def sweep_status(trials: set[str | None]) -> str:
    """How the sweep's own run stands, from the statuses of its trials; None of one that never started."""
    return "FAILED" if "FAILED" in trials else "FINISHED" if trials == {"FINISHED"} else "KILLED"


def _telling(manifest: Manifest) -> list[str]:
    """Settings that tell trials apart or that somebody chose, those that the sweep varies first; the others stand in `config.yaml`."""
    config, method = manifest.config, str(manifest.config.get("method"))
    if method not in METHODS:
        return list(config)
    settings, usual = settings_class(method).model_fields, _defaults(method)
    headlines = [name for name, field in settings.items() if setting_of(field).headline]
    chosen = [name for name in settings if name in config and name not in CONTENTS and config[name] != usual[name]]
    return [name for name in dict.fromkeys([*manifest.varied, *headlines, *chosen]) if name in config and name in settings]


@cache
def _defaults(method: str) -> Mapping[str, Any]:
    """Of every setting of a method, as JSON holds it."""
    return settings_class(method).model_construct().model_dump(mode="json")


def _epochs(manifest: Manifest) -> Iterator[MetricPoint]:
    best: EpochMetrics | None = None
    for entry in manifest.history:
        if best is None or entry.metrics[SCORE] > best.metrics[SCORE]:
            best = entry
        shown = {name: value for name, value in entry.metrics.items() if not name.startswith(_TABLED)}
        yield MetricPoint(entry.epoch, entry.time_ms, {**shown, BEST_SCORE: best.metrics[SCORE], BEST_EPOCH: best.epoch})


def _closed(manifest: Manifest) -> bool:
    return bool(manifest.attempts) and manifest.attempts[-1].ended_ms is not None


def _effort(manifest: Manifest) -> tuple[MetricPoint, ...]:
    """The seconds up to the end of each attempt; an attempt that has ended never changes, so a replay sends the very same points."""
    ended = [(attempt, attempt.ended_ms) for attempt in manifest.attempts if attempt.ended_ms is not None]
    useful = accumulate(attempt.useful_s for attempt, _ in ended)
    repeated = accumulate(attempt.repeated_s for attempt, _ in ended)
    lost = accumulate(attempt.lost_s for attempt, _ in ended)
    return tuple(
        MetricPoint(attempt.number, ended_ms, {"effort/useful_s": u, "effort/repeated_s": r, "effort/lost_s": n})
        for (attempt, ended_ms), u, r, n in zip(ended, useful, repeated, lost, strict=True)
    )


def _trial_tags(manifest: Manifest, store: str) -> dict[str, str]:
    shown = dict.fromkeys(("partition", "seed", "method", "dataset", *manifest.varied))
    tags: dict[str, Any] = {name: manifest.config[name] for name in shown if name in manifest.config}
    tags |= {"sweep": manifest.sweep, "trial_id": manifest.trial_id, KIND: "trial", "attempt": manifest.attempt}
    tags |= {"cell": cell_of(manifest), "split": split_hash(manifest.config)[:ID_LENGTH], NOTE: trial_note(manifest, store=store)}
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
    """A setting as it stands in YAML: texts bare, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
