"""The promise, with real parts: Ray, an S3 server and an MLflow server; the whole machine dies, the same command finishes."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow import MlflowClient
from processes import run_sweep, sweep
from servers import MlflowServer, S3Server, wait_until

SWEEP = """
name: {name}
preset: digits
base: {{train_images: 96, val_images: 8, batch_size: 4, epochs: 6, warmup_epochs: 0}}
grid: {{partition: ["1/8", "1/4"], eps: [0.4, 0.6]}}
store: s3://rrn-test/end-to-end
tracking: {tracking}
"""


def test_a_sweep_whose_machine_dies_ends_exactly_as_the_undisturbed_one(
    tmp_path: Path, s3_environment: S3Server, mlflow_server: MlflowServer
):
    for name in ("undisturbed", "killed"):
        (tmp_path / f"{name}.yaml").write_text(SWEEP.format(name=name, tracking=mlflow_server.uri))
    code, text = run_sweep("undisturbed.yaml", cwd=tmp_path)
    assert code == 0, text

    with sweep("killed.yaml", cwd=tmp_path) as first:
        wait_until(lambda: halfway(trials("killed", tmp_path), most=2), deadline_s=120, what="a finished and a begun trial")
        assert first.process.poll() is None, "the sweep was done before it could be killed"
        first.end()
    at_death = trials("killed", tmp_path)
    assert halfway(at_death, most=5)
    code, text = run_sweep("killed.yaml", cwd=tmp_path)
    assert code == 0, text
    assert "4 of 4 finished" in text

    ours, theirs = trials("killed", tmp_path), trials("undisturbed", tmp_path)
    assert {label: weights(trial) for label, trial in ours.items()} == {label: weights(trial) for label, trial in theirs.items()}
    finished_before = [label for label, trial in at_death.items() if trial["state"] == "finished"]
    assert {label: ours[label] for label in finished_before} == {label: at_death[label] for label in finished_before}

    client = MlflowClient(tracking_uri=mlflow_server.uri)
    killed, undisturbed = (runs(client, name) for name in ("killed", "undisturbed"))
    assert {run.info.status for run in killed} == {"FINISHED"}
    assert len(killed) == len(undisturbed) == 5
    assert points(client, killed) == points(client, undisturbed)

    code, text = run_sweep("killed.yaml", cwd=tmp_path)
    assert (code, text.strip()) == (0, "4 of 4 finished, nothing to do")


def trials(name: str, folder: Path) -> dict[str, dict]:
    code, text = run_sweep("status", f"{name}.yaml", "--json", cwd=folder, deadline_s=30)
    assert code == 0, text
    return {trial["label"]: trial for trial in json.loads(text)["trials"]}


def halfway(found: dict[str, dict], *, most: int) -> bool:
    """One trial is done, another has committed 1 to `most` epochs."""
    begun = [trial for trial in found.values() if trial["state"].startswith("resumable") and 1 <= trial["epochs"][0] <= most]
    return bool(begun) and any(trial["state"] == "finished" for trial in found.values())


def weights(trial: dict) -> str:
    return trial["checkpoints"][-1]["objects"]["model.safetensors"]["sha256"]


def runs(client: MlflowClient, sweep_name: str) -> list:
    return list(client.search_runs([client.get_experiment_by_name(sweep_name).experiment_id]))


def points(client: MlflowClient, found: list) -> list[tuple]:
    """Every stored point but the timings, as (run name, metric, step, value); a point that was logged twice stands twice."""
    stored = []
    for run in found:
        for name in (name for name in run.data.metrics if not name.startswith("perf/")):
            stored += [(run.info.run_name, name, point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
    assert any(point[1] == "val/miou" for point in stored)
    # the sweep's own run is named after the sweep
    return sorted(point for point in stored if point[0] not in ("killed", "undisturbed"))
