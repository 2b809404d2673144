"""ray_process.py and ray_tune.py: every way out of a trial, and of Ray's own process, on a real Ray."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from processes import Sweep, run_sweep, sweep
from servers import wait_until
from small_sweep import SMALL, outcomes, status, wait_for_an_epoch

from orchestration.plan.spec import Retention
from orchestration.record.manifest import read_manifest
from orchestration.record.stored_trials import restored_plan
from orchestration.record.trial_record import TrialRecord
from orchestration.store.open import open_store

pytestmark = pytest.mark.slow

FOUR = SMALL.replace("[0.4, 0.6]", "[0.3, 0.4, 0.6, 0.7]").replace("epochs: 4", "epochs: 8")


def ray_process(running: Sweep, *, other_than: Collection[int] = ()) -> int:
    """PID of the process in which the driver runs Ray."""
    found: list[int] = []

    def look() -> bool:
        for child in psutil.Process(running.process.pid).children():
            with suppress(psutil.Error):  # it ended just now
                if child.pid not in other_than and "ray_tune" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return bool(found)

    wait_until(look, deadline_s=60, what="the process of Ray")
    return found[0]


def test_a_trial_may_end_in_any_way_and_the_others_go_on(here: Path):
    (here / "small.yaml").write_text(FOUR)
    refused, removed, taken, _ = [trial["trial_id"] for trial in status(here).values()]
    store = here / "runs" / "store"
    (store / "small").mkdir(parents=True)
    (store / "small" / refused).touch()  # a file where the trial's folder must be
    with sweep("small.yaml", cwd=here) as running:

        def started(trial_id: str) -> bool:
            return (store / "small" / trial_id / "manifest.json").exists() or running.process.poll() is not None

        wait_until(lambda: started(removed), deadline_s=90, what="the trial whose folder is removed")
        shutil.rmtree(store / "small" / removed)
        wait_until(lambda: started(taken), deadline_s=90, what="the trial that is taken over")
        opened = open_store(str(store))
        found = read_manifest(opened, "small", taken)
        assert found
        TrialRecord.open(opened, restored_plan(found), retention=Retention(), driver=found.driver)
        assert running.wait(deadline_s=180) == 1, running.text
    text = running.text
    assert "Traceback" not in text
    assert f"FAILED {refused} eps=0.3: " in text
    assert f"FAILED {removed} eps=0.4: no manifest in " in text
    assert "eps=0.6: interrupted: another worker has taken this trial over" in text
    assert "eps=0.7: finished" in text
    assert "1 of 4 finished" in text


@pytest.mark.parametrize("deadly", [signal.SIGABRT, signal.SIGKILL], ids=lambda s: s.name)
def test_ray_may_end_its_process_and_the_sweep_goes_on(here: Path, deadly: signal.Signals):
    (here / "small.yaml").write_text(SMALL)
    with sweep("small.yaml", cwd=here) as running:
        wait_for_an_epoch(here, running)
        os.kill(ray_process(running), deadly)
        assert running.wait(deadline_s=180) == 0, running.text
    assert f"Ray ended its process with signal {deadly.name}" in running.text
    assert "resumed at epoch" in running.text
    assert "2 of 2 finished" in running.text
    assert outcomes(here) == {"interrupted", "finished"}


def test_ray_that_does_not_come_back_ends_the_sweep_in_order_and_the_same_command_resumes_it(here: Path):
    (here / "small.yaml").write_text(SMALL.replace("train_images: 96", "train_images: 4000"))
    with sweep("small.yaml", cwd=here) as running:
        running.wait_for("started", deadline_s=90)
        killed: list[int] = []
        for _ in range(3):
            killed.append(ray_process(running, other_than=killed))
            os.kill(killed[-1], signal.SIGKILL)
        assert running.wait(deadline_s=120) == 75, running.text
    assert "Ray ended 3 times without a commit in between; the same command resumes from the last checkpoints" in running.text
    assert outcomes(here) == {"interrupted"}
    assert "0 of 2 finished" in running.text


def test_ray_s_process_ends_with_its_driver(here: Path):
    (here / "small.yaml").write_text(SMALL)
    with sweep("small.yaml", cwd=here) as running:
        process = ray_process(running)
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait(10)
        wait_until(lambda: not psutil.pid_exists(process), deadline_s=20, what="its end")


def test_a_stop_while_ray_starts_ends_at_once(here: Path):
    (here / "small.yaml").write_text(SMALL)
    with sweep("small.yaml", cwd=here) as running:
        ray_process(running)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(deadline_s=30) == 75, running.text
    assert "started" not in running.text


def test_the_driver_does_not_import_ray_or_torch(here: Path):
    (here / "small.yaml").write_text(SMALL.replace("[0.4, 0.6]", "[0.4]").replace("epochs: 4", "epochs: 1"))
    command = [sys.executable, "-X", "importtime", "-m", "orchestration.cli", "small.yaml"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "orchestration.run.dispatch" in imported
    assert not imported & {"ray", "torch"}


def test_a_cluster_that_cannot_hold_a_trial_is_refused_in_one_line(here: Path):
    (here / "small.yaml").write_text(SMALL + "resources: {cpu: 4096}\n")
    code, text = run_sweep("small.yaml", cwd=here)
    assert code == 2
    assert "no node can hold a trial: resources ask for cpu 4096" in text
    assert "log:" not in text
