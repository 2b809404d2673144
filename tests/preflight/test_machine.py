"""machine.py: CPUs and memory of this process under real limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from orchestration.preflight.machine import granted_cpus

SHOW = """
import json, os
from orchestration.preflight.machine import free_memory, granted_cpus, granted_memory
print(json.dumps([granted_cpus(os.environ), granted_memory(), free_memory()]))
"""


def granted(before: Callable[[], None] = lambda: None, **environment: str) -> list[int]:
    """CPUs, memory and free memory of a new process for which `before` was called."""
    command = [sys.executable, "-c", SHOW]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True, timeout=30, preexec_fn=before)
    return json.loads(done.stdout)


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A new control group of version 1."""
    folder = Path("/sys/fs/cgroup", request.param, f"rrn-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"a control group needs root and cgroups of version 1: {error}")
    yield folder
    with suppress(OSError):
        folder.rmdir()


def test_an_affinity_limits_the_cpus():
    first = min(os.sched_getaffinity(0))
    assert granted(lambda: os.sched_setaffinity(0, {first}))[0] == 1


@pytest.mark.parametrize("group", ["cpu"], indirect=True)
def test_a_quota_limits_the_cpus(group):
    (group / "cpu.cfs_period_us").write_text("100000")
    (group / "cpu.cfs_quota_us").write_text("150000")
    assert granted(lambda: (group / "cgroup.procs").write_text("0"))[0] == 1


@pytest.mark.parametrize("group", ["memory"], indirect=True)
def test_a_group_limits_the_memory(group):
    (group / "memory.limit_in_bytes").write_text(str(2**30))
    _, memory, free = granted(lambda: (group / "cgroup.procs").write_text("0"))
    assert (memory, free <= 0.95 * 2**30) == (2**30, True)


@pytest.mark.parametrize(
    ("environment", "most"),
    [
        ({"SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"SLURM_CPUS_PER_TASK": "4096"}, 2**20),
        ({"SLURM_CPUS_PER_TASK": "0", "SLURM_CPUS_ON_NODE": "2(x2)"}, 2**20),
        ({"NCPUS": "1"}, 1),
    ],
)
def test_a_batch_system_limits_the_cpus(environment, most):
    assert granted_cpus(environment) == min(most, granted_cpus({}))


def test_without_a_limit_all_of_the_machine_is_granted():
    cpus, memory, free = granted()
    assert (cpus, memory) == (len(os.sched_getaffinity(0)), psutil.virtual_memory().total)
    assert 0 < free < memory
