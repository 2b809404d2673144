"""A sweep of invented trials, and what MLflow shows of it, for the tests of tracking."""

from __future__ import annotations

import io
import json
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from orchestration.errors import NotFound
from orchestration.formatting import label
from orchestration.record.manifest import Attempt, Checkpoint, EpochMetrics, EpochPictures, Manifest, ObjectRef, sha256_of
from orchestration.tracking.descriptions import SweepFacts
from orchestration.tracking.tracker import Tracker
from rrn_core import configure

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
SHOWN = (*METRICS, "best/miou_epoch", "best/miou")
"""Metrics of an epoch in MLflow. The values of `entry` rise, so every epoch is the best so far."""
CLASSES = ("sky", "car", "tree")
HEADS = ("branch1", "branch2", "ensemble")


def entry(epoch: int) -> EpochMetrics:
    values = {name: epoch + i / 16 for i, name in enumerate(METRICS)}
    return EpochMetrics(epoch=epoch, step=10 * epoch, time_ms=1_700_000_000_000 + 1000 * epoch, metrics=values)


def validated(epoch: int, score: float) -> EpochMetrics:
    """An epoch with the validation metrics of a real one; the last class does not occur."""
    heads = {f"val/miou_{head}": score - 0.01 * i for i, head in enumerate(reversed(HEADS))}
    classes = {f"val/iou_{head}/{name}": score / (1 + i) for head in HEADS for i, name in enumerate(CLASSES[:-1])}
    known = {"train/loss": 1.0 / epoch, "val/miou": score, "system/cpu_utilization_percentage": 50.0, "perf/train_s": 2.0}
    return EpochMetrics(epoch=epoch, step=10 * epoch, time_ms=1_700_000_000_000 + 1000 * epoch, metrics=known | heads | classes)


def checkpoint(epoch: int, score: float | None = None) -> Checkpoint:
    folder = f"sweep/abc/checkpoints/{epoch:08d}-1"
    objects = {name: ObjectRef(key=f"{folder}/{name}", sha256="0", size=1) for name in ("model.safetensors", "state.safetensors")}
    return Checkpoint(step=10 * epoch, epoch=epoch, attempt=1, score=score, objects=objects)


def manifest(epochs: int, *, trial_id: str = "abc", seed: int = 3, **changes: Any) -> Manifest:
    config = configure(partition="1/8", seed=seed, eps=0.5).model_dump(mode="json")
    varied = ("partition", "seed")
    default = {
        "sweep": "sweep",
        "trial_id": trial_id,
        "label": label({name: changes.get("config", config).get(name) for name in changes.get("varied", varied)}),
        "config": config,
        "varied": varied,
        "iterations": 100,
        "attempt": 1,
        "created_ms": 1_700_000_000_000,
        "updated_ms": 1_700_000_000_500 + 1000 * epochs,
        "history": tuple(entry(epoch) for epoch in range(1, epochs + 1)),
    }
    return Manifest(**{**default, **changes})


def png(shade: int) -> bytes:
    """A picture of 1600 x 400 pixels."""
    body = io.BytesIO()
    Image.new("RGB", (1600, 400), (shade, 0, 0)).save(body, "PNG")
    return body.getvalue()


CONFUSION = json.dumps({"classes": CLASSES, "head": "ensemble", "counts": [[90, 10, 0], [5, 45, 0], [0, 0, 0]]}).encode()


class Sweep:
    """A sweep's store as a dict, its trackers, and what MLflow shows of it."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri, self.name = uri, f"sweep-{uuid.uuid4().hex[:8]}"
        self.client = MlflowClient(tracking_uri=uri)
        self.store: dict[str, Manifest] = {}
        self.objects: dict[str, bytes] = {}

    def drawn(self, epoch: int, *, trial_id: str = "abc", shade: int = 200) -> EpochPictures:
        """Put pictures of an epoch into the store."""
        refs = {}
        for name, body in (("predictions.png", png(shade)), ("confusion.json", CONFUSION)):
            key = f"sweep/{trial_id}/pictures/{epoch:04d}-1/{name}"
            self.objects[key] = body
            refs[name] = ObjectRef(key=key, sha256=sha256_of(body), size=len(body))
        return EpochPictures(epoch=epoch, objects=refs)

    def fetch(self, ref: ObjectRef) -> bytes:
        if ref.key not in self.objects:
            raise NotFound(ref.key)
        return self.objects[ref.key]

    def put(self, *manifests: Manifest) -> None:
        self.store |= {m.trial_id: m for m in manifests}

    def tracker(self, *, commit: str = "c0ffee", **changes: Any) -> Tracker:
        default = {"store": STORE, "read": self.store.get, "fetch": self.fetch, "driver": 1, "facts": SweepFacts(about="what it is for")}
        return Tracker(self.uri, sweep=self.name, tags={"git_commit": commit, "dirty": "false"}, **{**default, **changes})

    def track(self, *manifests: Manifest, **changes: Any) -> None:
        """Run a driver from start to end on the store with these manifests."""
        self.put(*manifests)
        tracker = self.tracker(**changes)
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

    def files(self, run: Any, folder: str | None = None) -> list[str]:
        """Names of all files of a run."""
        found = self.client.list_artifacts(run.info.run_id, folder)
        return [name for info in found for name in (self.files(run, info.path) if info.is_dir else [info.path])]

    def body(self, run: Any, name: str) -> bytes:
        return Path(self.client.download_artifacts(run.info.run_id, name)).read_bytes()

    def points(self, run: Any) -> dict[str, list[tuple[int, float, int]]]:
        """Every point of every metric as (step, value, timestamp), in MLflow's order."""
        names = sorted(run.data.metrics)
        return {name: [(p.step, p.value, p.timestamp) for p in self.client.get_metric_history(run.info.run_id, name)] for name in names}


def expected_points(epochs: int) -> dict[str, list[tuple[int, float, int]]]:
    entries = [entry(epoch) for epoch in range(1, epochs + 1)]
    shown = {e.epoch: {**e.metrics, "best/miou": e.metrics["val/miou"], "best/miou_epoch": float(e.epoch)} for e in entries}
    return {name: [(e.epoch, shown[e.epoch][name], e.time_ms) for e in entries] for name in sorted(SHOWN)}


def attempt(number: int, outcome: str | None, **changes: Any) -> Attempt:
    """An attempt with one useful and one lost second; open without an outcome."""
    ended = None if outcome is None else 1_700_000_000_000 + 5000 * number
    default = {"number": number, "driver": 1, "node": "a", "started_ms": 1_700_000_000_000, "ended_ms": ended, "outcome": outcome}
    return Attempt(**{**default, "useful_s": 1.0, "lost_s": 1.0, **changes})


def content(database: Path) -> list[str]:
    """Every row of every table."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=20)) as connection:
        return list(connection.iterdump())
