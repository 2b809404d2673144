"""What the MLflow run of a trial has to show, from its manifest alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from orchestration.manifest import Checkpoint, Manifest

KIND = "rrn.kind"
"""The tag that tells trials from the sweep's own run."""
LONGEST_TAG = 5000  # characters; MLflow takes 8000
_LONGEST_PARAM = 6000  # what MLflow takes
_LOGGED_EPOCH, _LOGGED_ATTEMPT = "rrn.logged_epoch", "rrn.logged_attempt"


@dataclass(frozen=True)
class Point:
    """Metrics at one step; the same point is stored once, however often it is sent."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunView:
    """What the MLflow run of a trial, or of the whole sweep, has to show."""

    name: str
    status: str
    tags: Mapping[str, str]
    start_ms: int | None = None
    end_ms: int | None = None
    """None while it runs, or where MLflow's clock shall tell; so is `start_ms`."""
    params: Mapping[str, str] = field(default_factory=dict)
    series: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    """Points by rising step, under the tag that says up to which step MLflow holds them."""


def run_view(manifest: Manifest, *, store: str, live: bool) -> RunView:
    """What MLflow has to show of a trial; an unfinished one is RUNNING while a driver is `live` and an attempt is open, else KILLED."""
    unfinished = "RUNNING" if live and not _closed(manifest) else "KILLED"
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(manifest.status, unfinished)
    return RunView(
        name=manifest.label,
        status=status,
        tags=_trial_tags(manifest, store),
        start_ms=manifest.created_ms,
        end_ms=None if status == "RUNNING" else manifest.updated_ms,
        params={name: _text(value)[:_LONGEST_PARAM] for name, value in manifest.config.items()},
        series={
            _LOGGED_EPOCH: tuple(Point(entry.epoch, entry.time_ms, entry.metrics) for entry in manifest.history),
            _LOGGED_ATTEMPT: _effort(manifest),
        },
    )


def sweep_status(trials: set[str | None]) -> str:
    """How the sweep's own run stands, from the statuses of its trials; None of one that never started."""
    return "FAILED" if "FAILED" in trials else "FINISHED" if trials == {"FINISHED"} else "KILLED"


def _closed(manifest: Manifest) -> bool:
    return bool(manifest.attempts) and manifest.attempts[-1].ended_ms is not None


def _effort(manifest: Manifest) -> tuple[Point, ...]:
    """The seconds up to the end of each attempt; an attempt that has ended never changes, so a replay sends the very same points."""
    ended = [(attempt, attempt.ended_ms) for attempt in manifest.attempts if attempt.ended_ms is not None]
    useful = accumulate(attempt.useful_s for attempt, _ in ended)
    repeated = accumulate(attempt.repeated_s for attempt, _ in ended)
    lost = accumulate(attempt.lost_s for attempt, _ in ended)
    return tuple(
        Point(attempt.number, ended_ms, {"effort/useful_s": u, "effort/repeated_s": r, "effort/lost_s": n})
        for (attempt, ended_ms), u, r, n in zip(ended, useful, repeated, lost, strict=True)
    )


def _trial_tags(manifest: Manifest, store: str) -> dict[str, str]:
    tags: dict[str, Any] = {"sweep": manifest.sweep, "trial_id": manifest.trial_id, KIND: "trial", "attempt": manifest.attempt}
    tags |= {name: manifest.config[name] for name in ("partition", "seed", "method", "dataset") if name in manifest.config}
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
