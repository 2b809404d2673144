"""resource_usage.py: use of CPU, memory and GPU, and the description of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time

import psutil
import pytest
from servers import wait_until

from orchestration.run import resource_usage
from orchestration.run.resource_usage import Usage, machine
from rrn_core import Runtime

ONE = Runtime(device="cpu", threads=1)
CPU, MEMORY = "system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"


def work(seconds: float) -> None:
    """CPU seconds of this thread."""
    started = time.thread_time()
    while time.thread_time() - started < seconds:
        pass


def test_the_names_are_mlflow_s_own():
    with Usage(ONE) as used:
        names = used.means().keys()
    assert names == {CPU, MEMORY, "system/system_memory_usage_percentage"}


def test_work_counts_as_the_share_of_what_the_trial_may_use():
    with Usage(ONE, every_s=0.05) as used:
        started, spent = time.monotonic(), time.process_time()
        work(0.5)
        expected = 100 * (time.process_time() - spent) / (time.monotonic() - started)
        assert used.means()[CPU] == pytest.approx(expected, abs=15)
    with Usage(ONE.model_copy(update={"threads": 64})) as used:
        assert used._cpus == len(psutil.Process().cpu_affinity())


def test_each_call_covers_the_time_since_the_previous_one():
    with Usage(ONE, every_s=0.05) as used:
        work(0.3)
        assert used.means()[CPU] > 10
        time.sleep(0.5)
        assert used.means()[CPU] < 10


def test_child_processes_count_too():
    with Usage(ONE, every_s=0.05) as used, subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            wait_until(lambda: sum(psutil.Process(child.pid).cpu_times()[:2]) > 0.5, deadline_s=60, what="half a second of work")
            elapsed, spent = used._since_s, sum(psutil.Process(child.pid).cpu_times()[:2])
            assert used.means()[CPU] >= 80 * spent / (time.monotonic() - elapsed)
        finally:
            child.kill()


def test_memory_is_the_machine_s():
    with Usage(ONE) as used:
        assert used.means()[MEMORY] == pytest.approx(psutil.virtual_memory().used / 1e6, rel=0.2)


def test_its_thread_ends_with_it():
    with Usage(ONE, every_s=0.05):
        assert "usage" in [thread.name for thread in threading.enumerate()]
    wait_until(lambda: "usage" not in [thread.name for thread in threading.enumerate()], deadline_s=10, what="its end")


@pytest.mark.parametrize("error", [psutil.AccessDenied(), OSError("no /proc")])
def test_what_cannot_be_measured_is_left_out(monkeypatch, error):
    def refuse():
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    with Usage(ONE, every_s=0.01) as used:
        time.sleep(0.1)
        assert used.means().keys() == {CPU}
        assert used._thread.is_alive()


def test_a_gpu_that_does_not_answer_is_left_out(monkeypatch):
    monkeypatch.setattr(resource_usage, "_cuda_index", lambda runtime: 0)  # as if there were one, without a driver
    with Usage(ONE) as used:
        assert MEMORY in used.means()


def test_the_machine_is_described_as_text():
    facts = machine(ONE)
    assert facts.keys() == {"python", "torch", "platform", "cpus", "memory", "device"}
    assert all(facts.values())
    assert facts["python"] == platform.python_version()
    assert facts["memory"].endswith("GB")


def test_a_missing_gpu_is_no_error_here_because_the_training_reports_it():
    assert "cuda" not in machine(Runtime(device="cuda:7"))
