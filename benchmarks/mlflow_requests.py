"""Measures how many requests and milliseconds it takes to show a trial in MLflow, on a real server with SQLite.

python benchmarks/mlflow_requests.py
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from infra.local.parts import free_ports
from infra.local.services import mlflow_part
from orchestration.record.manifest import Attempt, EpochMetrics, EpochPictures, Manifest, ObjectRef
from orchestration.tracking.mlflow_private import CLIENT_SETTINGS
from orchestration.tracking.run_content import run_content
from orchestration.tracking.run_files import trial_files
from orchestration.tracking.runs import Runs, open_runs
from rrn_core import configure

EPOCHS, CLASSES = 30, 21
HEADS = ("branch1", "branch2", "ensemble")
CONFUSION = json.dumps({"classes": ["a", "b"], "head": "ensemble", "counts": [[9, 1], [1, 9]]}).encode()


def main() -> None:
    os.environ |= CLIENT_SETTINGS
    with tempfile.TemporaryDirectory() as name:
        folder, (port,) = Path(name), free_ports(1)
        server = mlflow_part(folder, port=port, database=f"sqlite:///{folder}/mlflow.db")
        try:
            server.start()
            measure(f"http://127.0.0.1:{port}")
        finally:
            server.kill()


def measure(uri: str) -> None:
    runs = open_runs(uri, "benchmark", tags={})
    timed("the first epoch, which creates the run", lambda: show(runs, trial(1)), 1)
    epochs = iter(range(2, EPOCHS + 1))
    timed("another epoch", lambda: show(runs, trial(next(epochs))), EPOCHS - 1)
    timed("nothing new", lambda: show(runs, trial(EPOCHS)), EPOCHS)
    timed("an epoch with pictures", lambda: show(runs, trial(EPOCHS, with_pictures=True)), 1)
    timed("nothing new, after a restart", lambda: show(open_runs(uri, "benchmark", tags={}), trial(EPOCHS, with_pictures=True)), 10)


def timed(what: str, act: Callable[[], None], times: int) -> None:
    counts, spent_ms = [], []
    with Counted() as counted:
        for _ in range(times):
            before, began_s = counted.requests, time.perf_counter()
            act()
            counts.append(counted.requests - before)
            spent_ms.append(1000 * (time.perf_counter() - began_s))
    print(f"{what:40} {statistics.median(counts):4.0f} requests {statistics.median(spent_ms):8.1f} ms")


def show(runs: Runs, found: Manifest) -> None:
    runs.show(found.trial_id, run_content(found, store="s3://bucket", live=True))
    runs.store_files(found.trial_id, trial_files(found, lambda _: CONFUSION, live=True))


def trial(epochs: int, *, with_pictures: bool = False) -> Manifest:
    ref = ObjectRef(key="benchmark/abc/pictures/1-1/confusion.json", sha256="0", size=len(CONFUSION))
    return Manifest(
        sweep="benchmark",
        trial_id="abc",
        label="1/8 seed 1",
        config=configure().model_dump(mode="json"),
        varied=("partition", "seed"),
        iterations=1000,
        attempts=(Attempt(number=1, driver=1, node="here", started_ms=1),),
        created_ms=1_700_000_000_000,
        updated_ms=1_700_000_000_000,
        history=tuple(entry(epoch) for epoch in range(1, epochs + 1)),
        pictures=(EpochPictures(epoch=epochs, objects={"confusion.json": ref}),) if with_pictures else (),
    )


def entry(epoch: int) -> EpochMetrics:
    metrics = {f"train/loss_{i}": 1.0 / epoch for i in range(12)} | {"val/miou": 0.5, "perf/train_s": 1.0, "perf/eval_s": 1.0}
    metrics |= {f"val/miou_{head}": 0.5 for head in HEADS} | {f"val/iou_{head}/{i}": 0.5 for head in HEADS for i in range(CLASSES)}
    return EpochMetrics(epoch=epoch, step=10 * epoch, time_ms=1_700_000_000_000 + 1000 * epoch, metrics=metrics)


class Counted:
    """Counts the requests of the `requests` library while its context is active."""

    def __init__(self) -> None:
        self.requests = 0
        self._send = requests.Session.send

    def __enter__(self) -> Counted:
        def send(session: requests.Session, *rest: Any, **options: Any) -> requests.Response:
            self.requests += 1
            return self._send(session, *rest, **options)

        requests.Session.send = send  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        requests.Session.send = self._send  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
