"""A sweep of made-up trials and what MLflow shows of it, for the tests of tracking."""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

from orchestration.manifest import Attempt, Checkpoint, Entry, Manifest, ObjectRef
from orchestration.tracking import Tracker
from rrn_core.config import TrainConfig

STORE = "s3://bucket/sweeps"
METRICS = (
    "train/loss",
    "train/sup",
    "train/cps",
    "train/dr",
    "train/fm",
    "train/lr",
    "val/miou",
    "val/miou_b1",
    "val/miou_b2",
    "val/accuracy",
)


def entry(epoch: int) -> Entry:
    values = {name: epoch + i / 16 for i, name in enumerate(METRICS)}
    return Entry(epoch=epoch, step=10 * epoch, time_ms=1_700_000_000_000 + 1000 * epoch, metrics=values)


def checkpoint(epoch: int, score: float | None = None) -> Checkpoint:
    folder = f"sweep/abc/checkpoints/{epoch:08d}-1"
    objects = {name: ObjectRef(key=f"{folder}/{name}", sha256="0", size=1) for name in ("model.safetensors", "state.pt")}
    return Checkpoint(step=10 * epoch, epoch=epoch, attempt=1, score=score, objects=objects)


def manifest(epochs: int, *, trial_id: str = "abc", seed: int = 3, **changes: Any) -> Manifest:
    config = TrainConfig(partition="1/8", seed=seed, eps=0.5).model_dump(mode="json")
    default = {
        "sweep": "sweep",
        "trial_id": trial_id,
        "label": f"1/8 seed={seed}",
        "config": config,
        "varied": ("partition", "seed"),
        "iterations": 100,
        "attempt": 1,
        "created_ms": 1_700_000_000_000,
        "updated_ms": 1_700_000_000_500 + 1000 * epochs,
        "history": tuple(entry(epoch) for epoch in range(1, epochs + 1)),
    }
    return Manifest(**{**default, **changes})


class Sweep:
    """A sweep's store as a dict, its trackers, and what MLflow shows of it."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri, self.name = uri, f"sweep-{uuid.uuid4().hex[:8]}"
        self.client = MlflowClient(tracking_uri=uri)
        self.store: dict[str, Manifest] = {}

    def put(self, *manifests: Manifest) -> None:
        self.store |= {m.trial_id: m for m in manifests}

    def tracker(self, *, commit: str = "c0ffee") -> Tracker:
        tags = {"git_commit": commit, "dirty": "false"}
        return Tracker(self.uri, sweep=self.name, store=STORE, read=self.store.get, tags=tags, description="what it is for")

    def track(self, *manifests: Manifest, commit: str = "c0ffee") -> None:
        """One call of the driver, from start to end, on the store with these manifests."""
        self.put(*manifests)
        tracker = self.tracker(commit=commit)
        tracker.start(list(self.store))
        assert tracker.close(timeout_s=30) == []

    def runs(self, text: str = "tags.`rrn.kind` = 'trial'") -> list[Any]:
        experiment = self.client.get_experiment_by_name(self.name)
        return self.client.search_runs([experiment.experiment_id], text) if experiment else []

    def run(self, text: str = "tags.`rrn.kind` = 'trial'") -> Any:
        (only,) = self.runs(text)
        return only

    def parent(self) -> Any:
        return self.run("tags.`rrn.kind` = 'sweep'")

    def points(self, run: Any) -> dict[str, list[tuple[int, float, int]]]:
        """Every stored point of every metric as (step, value, timestamp), in MLflow's order."""
        names = sorted(run.data.metrics)
        return {name: [(p.step, p.value, p.timestamp) for p in self.client.get_metric_history(run.info.run_id, name)] for name in names}


def expected_points(epochs: int) -> dict[str, list[tuple[int, float, int]]]:
    entries = [entry(epoch) for epoch in range(1, epochs + 1)]
    return {name: [(e.epoch, e.metrics[name], e.time_ms) for e in entries] for name in sorted(METRICS)}


def attempt(number: int, outcome: str | None, **changes: Any) -> Attempt:
    """An attempt that took a useful and a lost second; open where it has no outcome."""
    ended = None if outcome is None else 1_700_000_000_000 + 5000 * number
    default = {"number": number, "driver": 1, "node": "a", "started_ms": 1_700_000_000_000, "ended_ms": ended, "outcome": outcome}
    return Attempt(**{**default, "useful_s": 1.0, "lost_s": 1.0, **changes})


def content(database: Path) -> list[str]:
    """Every row of every table."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=20)) as connection:
        return list(connection.iterdump())
