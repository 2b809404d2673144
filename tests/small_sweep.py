"""A sweep of two small trials, and what is left of it: in its folder, a directory store and MLflow on SQLite."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from processes import Sweep, run_sweep
from servers import wait_until

from orchestration.record.manifest import read_manifests
from orchestration.store.open import open_store

SMALL = """
name: small
preset: digits
base: {train_images: 96, val_images: 8, batch_size: 4, epochs: 4, warmup_epochs: 0, partition: "1/4"}
grid: {eps: [0.4, 0.6]}
"""


def status(here: Path, *options: str) -> dict[str, dict]:
    code, text = run_sweep("status", "small.yaml", "--json", *options, cwd=here, deadline_s=30)
    assert code == 0, text
    return {trial["label"]: trial for trial in json.loads(text)["trials"]}


def wait_for_an_epoch(here: Path, running: Sweep) -> None:
    """Until some trial has committed an epoch and is not done."""
    store = open_store(str(here / "runs" / "store"))

    def begun() -> bool:
        return any(manifest.status == "running" and manifest.epochs for manifest in read_manifests(store, "small").values())

    wait_until(lambda: begun() or running.process.poll() is not None, deadline_s=180, what="a committed epoch")
    assert running.process.poll() is None, running.text


def weights(trial: dict) -> str:
    return trial["checkpoints"][-1]["objects"]["model.safetensors"]["sha256"]


def outcomes(here: Path, *options: str) -> set[str]:
    return {attempt["outcome"] for trial in status(here, *options).values() for attempt in trial.get("attempts", [])}


def mlflow_points(here: Path) -> list[tuple]:
    """Every stored metric point but the timings and what the attempts cost, as (run, key, step, value)."""
    with sqlite3.connect(here / "runs" / "mlflow.db") as database:
        ours = " AND ".join(f"key NOT LIKE '{part}/%'" for part in ("perf", "effort", "system"))
        query = f"SELECT run_uuid, key, step, value FROM metrics WHERE {ours}"
        return database.execute(query).fetchall()


def mlflow_statuses(here: Path) -> list[str]:
    with sqlite3.connect(here / "runs" / "mlflow.db") as database:
        return [status for (status,) in database.execute("SELECT status FROM runs ORDER BY start_time")]
