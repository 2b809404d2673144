"""What survives Ctrl-C, SIGTERM and kill -9 of a driver, a trial, a node: with a directory store, SQLite and a local Ray."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from processes import run_sweep, sweep
from small_sweep import SMALL, mlflow_points, mlflow_statuses, outcomes, status, wait_for_an_epoch, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sweep ran from start to end without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "small.yaml").write_text(SMALL)
    code, text = run_sweep("small.yaml", cwd=folder)
    assert code == 0, text
    return folder


@pytest.mark.parametrize("deadly", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_stopped_sweep_goes_on_to_the_same_weights(here, undisturbed, deadly):
    with sweep("small.yaml", cwd=here) as running:
        wait_for_an_epoch(here, running)
        os.kill(running.process.pid, deadly)
        code = running.wait(deadline_s=90)
        assert code == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGINT: 130}[deadly], running.text
        if deadly != signal.SIGKILL:
            assert f"stopped by {deadly.name}: the trials commit a last checkpoint and end" in running.text
            assert "the same command resumes" in running.text
            assert "RUNNING" not in mlflow_statuses(here)
            assert outcomes(here) <= {"interrupted", "finished"}
        resumed_code, resumed_text = run_sweep("small.yaml", cwd=here)

    assert resumed_code == 0, resumed_text
    assert "resumed at epoch" in resumed_text or "skipped, finished" in resumed_text
    ours, theirs = status(here), status(undisturbed)
    assert {label: weights(trial) for label, trial in ours.items()} == {label: weights(trial) for label, trial in theirs.items()}
    assert mlflow_statuses(here) == ["FINISHED"] * 3
    points = mlflow_points(here)
    assert sorted(point[1:] for point in points) == sorted(point[1:] for point in mlflow_points(undisturbed))


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_trial_process_that_ends_is_started_again_and_goes_on(here, deadly):
    with sweep("small.yaml", "--set", "epochs=8", cwd=here) as running:
        wait_for_an_epoch(here, running)
        ended = running.trial_processes()
        assert ended
        for pid in ended:
            os.kill(pid, deadly)
        assert running.wait(deadline_s=180) == 0, running.text
        assert "restarting from the last checkpoint" in running.text
        assert "resumed at epoch" in running.text
    attempts = [trial["attempts"] for trial in status(here, "--set", "epochs=8").values()]
    broken = [attempt for trial in attempts for attempt in trial[:-1]]
    assert {attempt["outcome"] for attempt in broken} == {"lost"}
    assert all(trial[-1]["outcome"] == "finished" for trial in attempts)
    if deadly == signal.SIGTERM:
        assert {attempt["reason"] for attempt in broken} == {"Preempted: its process received SIGTERM"}
        steps = {trial[-1]["first_step"] for trial in attempts if len(trial) > 1}
        assert steps == {trial[0]["last_step"] for trial in attempts if len(trial) > 1}


def test_a_sweep_that_loses_its_only_node_starts_ray_again_and_goes_on(here):
    with sweep("small.yaml", "--set", "epochs=10", cwd=here) as running:
        wait_for_an_epoch(here, running)
        for pid in (running.pid_of("raylet/raylet"), *running.trial_processes()):  # all of a node's, as when its machine goes
            os.kill(pid, signal.SIGKILL)
        assert running.wait(deadline_s=180) == 0, running.text
    assert "resumed at epoch" in running.text
    assert mlflow_statuses(here) == ["FINISHED"] * 3
