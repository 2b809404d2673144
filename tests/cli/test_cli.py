"""cli/ with a directory store, SQLite and a local Ray: what a user sees."""

from __future__ import annotations

import json
import time

import cv2
import numpy as np
import pytest
from own_data import make_folder
from processes import run_sweep
from small_sweep import mlflow_points, mlflow_statuses, status

pytestmark = pytest.mark.slow


def test_a_sweep_runs_is_idempotent_and_grows(here):
    code, text = run_sweep("small.yaml", cwd=here)
    assert code == 0, text
    assert "2 of 2 finished" in text
    assert "MLflow UI:   rrn-sweep ui small.yaml" in text
    assert f"checkpoints: file://{here}/runs/store/small" in text
    assert mlflow_statuses(here) == ["FINISHED"] * 3
    before = status(here)

    started = time.monotonic()
    code, text = run_sweep("small.yaml", cwd=here)
    assert (code, text.strip()) == (0, "2 of 2 finished, nothing to do")
    assert time.monotonic() - started < 3

    code, text = run_sweep("small.yaml", "--set", "grid.eps=[0.4,0.6,0.7]", cwd=here)
    assert code == 0, text
    assert text.count("skipped, finished") == 2
    assert text.count(": started") == 1
    after = status(here, "--set", "grid.eps=[0.4,0.6,0.7]")
    assert {label: after[label] for label in before} == before
    points = mlflow_points(here)
    assert len(points) == len(set(points))


def test_a_failing_trial_leaves_the_others_and_is_told_first(here):
    code, text = run_sweep("small.yaml", "--set", "grid={lr: [0.05, 1.0e+9]}", "--set", "retries=0", cwd=here)
    assert code == 1, text
    summary = text[text.index("FAILED ") :]
    assert "lr=1e+09: [diverged] FloatingPointError: diverged: loss" in summary.splitlines()[0]
    assert "1 of 2 finished" in text
    assert sorted(mlflow_statuses(here)) == ["FAILED", "FAILED", "FINISHED"]

    code, text = run_sweep("small.yaml", "--set", "grid={lr: [0.05, 1.0e+9]}", "--retry", "memory", cwd=here)
    assert (code, ": started" in text) == (1, False), text
    (failed,) = [trial for trial in status(here, "--set", "grid={lr: [0.05, 1.0e+9]}").values() if trial["failure"]]
    assert [attempt["outcome"] for attempt in failed["attempts"]] == ["diverged"]


@pytest.mark.parametrize(
    ("device", "told"), [("cuda:99", "cuda:99, but torch finds"), ("mps", "must be auto, cpu, cuda or cuda:N, got mps")]
)
def test_a_device_that_is_absent_is_refused_before_anything_starts(here, device, told):
    for command in (["small.yaml"], ["best", "small.yaml"]):
        code, text = run_sweep(*command, "--device", device, cwd=here)
        assert (code, text.count("\n")) == (2, 1), text
        assert text.startswith(f"device: {told}")
    assert not (here / "runs").exists()


def test_the_first_trials_failing_alike_stop_the_sweep_and_say_why(tmp_path):
    data = make_folder(tmp_path / "data")
    (tmp_path / "own.yaml").write_text(OWN.replace("[0.4]", "[0.3, 0.4, 0.5, 0.6, 0.7]"))
    for image in (data / "masks").glob("*.png"):
        cv2.imwrite(str(image), np.full((64, 64), 7, np.uint8))
    code, text = run_sweep("own.yaml", "--data-root", "data", "--set", "resources.cpu=2", cwd=tmp_path)
    assert code == 1, text
    assert "circuit breaker: the first 3 trials failed with the same data error at " in text
    trials = json.loads(run_sweep("status", "own.yaml", "--json", "--data-root", "data", cwd=tmp_path)[1])["trials"]
    assert [trial["failure"] for trial in trials[:3]] == ["data"] * 3
    assert trials[4]["state"] == "new"


def test_only_the_named_trial_runs_and_gc_and_sync_change_nothing_that_counts(here):
    one, other = (line.split()[0] for line in run_sweep("plan", "small.yaml", cwd=here)[1].splitlines()[1:3])
    code, text = run_sweep("small.yaml", "--only", one[:6], "--set", "epochs=1", cwd=here)
    assert code == 2, text  # with one epoch the trials are others
    code, text = run_sweep("small.yaml", "--only", one[:6], cwd=here)
    assert (code, text.count(": started")) == (0, 1), text
    states = {trial["trial_id"]: trial["state"] for trial in status(here).values()}
    assert states == {one: "finished", other: "new"}

    points = sorted(point[1:] for point in mlflow_points(here))
    orphan = here / "runs" / "store" / "small" / one / "checkpoints" / "00000001-1" / "model.safetensors"
    orphan.parent.mkdir()
    orphan.write_bytes(b"left behind")
    assert run_sweep("gc", "small.yaml", "--dry-run", cwd=here)[0] == 0
    assert orphan.exists()
    code, text = run_sweep("gc", "small.yaml", cwd=here)
    assert (code, orphan.exists()) == (0, False), text
    (here / "runs" / "mlflow.db").unlink()
    code, text = run_sweep("sync", "small.yaml", cwd=here)
    assert code == 0, text
    assert sorted(point[1:] for point in mlflow_points(here)) == points
    assert status(here)[next(iter(status(here)))]["state"] == "finished"


def test_a_trial_that_fits_no_node_is_refused_with_the_numbers(here):
    code, text = run_sweep("small.yaml", "--set", "resources.cpu=64", cwd=here)
    assert code == 2
    assert "no node can hold a trial: resources ask for cpu 64, gpu 0; the largest of 1 nodes has" in text


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "RAY_ADDRESS: nothing answers at 127.0.0.1:1"),
        ({"RAY_ADDRESS": "ray://127.0.0.1:1"}, "RAY_ADDRESS: must be host:port of a cluster's head or auto"),
        ({"RRN_STORE": "/proc/nowhere"}, "/proc/nowhere"),
    ],
    ids=["no cluster", "client address", "unwritable store"],
)
def test_what_cannot_start_is_told_in_one_line_and_leaves_nothing_running(here, environment, line):
    code, text = run_sweep("small.yaml", cwd=here, environment=environment, deadline_s=60)
    assert code == 2, text
    assert line in text
    assert "Traceback" not in text
    if (here / "runs" / "mlflow.db").exists():
        assert "RUNNING" not in mlflow_statuses(here)


def test_a_lost_mlflow_database_is_rebuilt_from_the_store(here):
    code, text = run_sweep("small.yaml", "--set", "grid.eps=[0.4]", "--set", "epochs=1", cwd=here)
    assert code == 0, text
    before = sorted(point[1:] for point in mlflow_points(here))
    (here / "runs" / "mlflow.db").unlink()
    code, text = run_sweep("small.yaml", "--set", "grid.eps=[0.4]", "--set", "epochs=1", cwd=here)
    assert code == 0, text
    assert ": started" not in text
    assert sorted(point[1:] for point in mlflow_points(here)) == before


def test_a_search_proposes_and_a_restart_keeps_its_trials(here):
    search = [
        *("--set", "grid={}", "--set", "search={sampler: tpe, trials: 2, at: best}"),
        *("--set", "space.eps={low: 0.2, high: 0.8}", "--set", "space.lambda1={low: 0.1, high: 2, log: true}", "--set", "epochs=1"),
    ]
    code, text = run_sweep("small.yaml", *search, cwd=here)
    assert code == 0, text
    before = status(here, *search)
    assert len(before) == 2
    code, text = run_sweep("small.yaml", *search, cwd=here)
    assert (code, text.strip()) == (0, "2 of 2 finished, nothing to do")
    more = [word.replace("trials: 2", "trials: 3") for word in search]
    code, text = run_sweep("small.yaml", *more, cwd=here)
    assert code == 0, text
    after = status(here, *more)
    assert len(after) == 3
    assert {label: after[label] for label in before} == before


OWN = """
name: own
preset: digits
base: {dataset: folder, epochs: 1, batch_size: 2, warmup_epochs: 0, partition: "1/2"}
grid: {eps: [0.4]}
"""


def test_images_of_ones_own_are_checked_trained_evaluated_and_predicted(tmp_path):
    data = make_folder(tmp_path / "data")
    (tmp_path / "own.yaml").write_text(OWN)
    place = ("--data-root", "data")

    code, text = run_sweep("check", "own.yaml", *place, cwd=tmp_path)
    assert (code, "FAULT" in text) == (0, False), text
    assert "4 labelled, 4 unlabelled, 2 validation images" in text
    code, text = run_sweep("plan", "own.yaml", *place, "--probe", cwd=tmp_path)
    assert code == 0
    assert "CPU-hours for the trials to run" in text

    code, text = run_sweep("own.yaml", *place, cwd=tmp_path)
    assert code == 0, text
    (trial,) = json.loads(run_sweep("status", "own.yaml", "--json", cwd=tmp_path)[1])["trials"]  # without --data-root
    assert trial["state"] == "finished"
    key = trial["checkpoints"][-1]["objects"]["model.safetensors"]["key"]
    checkpoint = f"runs/store/{key}"
    code, text = run_sweep("evaluate", checkpoint, *place, "--json", cwd=tmp_path)
    assert code == 0, text
    assert json.loads(text)["miou"]["ensemble"] == trial["last"]["metrics"]["val/miou"]
    code, text = run_sweep("predict", checkpoint, "data/images/im0.png", "data/images/im9.png", "--out", "seen", *place, cwd=tmp_path)
    assert code == 0, text
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["im0.png", "im0_overlay.png", "im9.png", "im9_overlay.png"]

    code, text = run_sweep("weights", "import", checkpoint, "--out", "start.safetensors", cwd=tmp_path)
    assert code == 0, text
    code, text = run_sweep("own.yaml", "--set", "init_weights=start.safetensors", *place, cwd=tmp_path)
    assert (code, "skipped" in text) == (0, False), text

    cv2.imwrite(str(data / "masks" / "im0.png"), np.full((64, 64), 7, np.uint8))
    code, text = run_sweep("check", "own.yaml", *place, cwd=tmp_path)
    assert code == 2
    assert any(line.startswith("FAULT") and "im0" in line for line in text.splitlines()), text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["small.yaml", "--set", "esp=1"], "small.yaml: esp: unknown key"),
        (["small.yaml", "--set", "store=ftp://x"], "store"),
        (["small.yaml", "--set", "tracking=ftp://x"], "small.yaml: tracking: must be sqlite:///PATH or http(s)://HOST"),
        (["small.yaml", "--set", "tracking=http://me:secret@host"], "credentials belong in the environment"),
        (
            ["small.yaml", "--set", "partition=n:97"],
            'grid (eps=0.4) and 1 more: partition "n:97" asks for 97 labelled images; the training list has 96',
        ),
        (["small.yaml", "--set", "eps=0.5"], "base.eps: is varied in grid or space too"),
        (["small.yaml", "--workers", "-1"], "--workers: input should be greater than or equal to 0, got -1"),
        (["chek", "small.yaml"], 'chek: neither a command nor a sweep file; did you mean "check"?'),
        (["plan", "small.yaml", "--probe", "--device", "gpu"], "device: must be auto, cpu, cuda or cuda:N, got gpu"),
        (["small.yaml", "--set", "dataset=camvid"], "--data-root: trial eps=0.4 needs the folder of camvid; give it, or set RRN_DATA_ROOT"),
        (["small.yaml", "--set", "dataset=camvid", "--data-root", "nowhere"], "nowhere is not a folder"),
        (["small.yaml", "--set", "init_weights=no.safetensors"], "init_weights: no.safetensors is neither beside the sweep file nor"),
        (["evaluate", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["evaluate", "small.yaml"], "small.yaml"),
        (["weights", "import", "small.yaml", "--out", "a.safetensors"], "small.yaml"),
        (["predict", "nowhere", "a.png", "--out", "x", "--set", "esp=1"], "--set esp: unknown setting"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here, arguments, line):
    code, text = run_sweep(*arguments, cwd=here, deadline_s=60)
    assert code == 2, text
    assert line in text
    assert len(text.strip().splitlines()) == 1
