"""What this process may use of its machine: CPUs and memory, as limited by affinity, control groups (cgroups) and a batch system."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

CPU_COUNTS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NCPUS", "NSLOTS")
"""Environment variables in which Slurm, PBS and Grid Engine name the CPUs of a job."""

RAY_KILLS_ABOVE = 0.95
"""Ray's memory monitor kills workers when this share of the memory is used."""

_CGROUPS = Path("/sys/fs/cgroup")


def granted_cpus(environment: Mapping[str, str]) -> int:
    """CPUs that this process may use, at least 1."""
    counts = [float(environment[name]) for name in CPU_COUNTS if environment.get(name, "").isdecimal() and int(environment[name])]
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([affinity, *counts, *_cpu_quotas()])))


def granted_memory() -> int:
    """Bytes of main memory that this process and its children may use."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """Bytes of main memory that trials may take before Ray's memory monitor kills one."""
    machine = psutil.virtual_memory()
    limits = [(machine.total, machine.total - machine.available), *_memory_limits()]
    return int(max(0.0, min(RAY_KILLS_ABOVE * limit - used for limit, used in limits)))


def _cpu_quotas() -> Iterator[float]:
    """CPUs that each control group of this process grants."""
    for folder in _cgroups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):
            if (quota_us := int((folder / "cpu.cfs_quota_us").read_text())) > 0:
                yield quota_us / int((folder / "cpu.cfs_period_us").read_text())


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Bytes that each control group of this process grants, and those that it uses. The cache of files does not count: it is given up."""
    versions = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _cgroups("memory"):
        for limit, current, cache in versions:
            with suppress(OSError, ValueError):
                counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / current).read_text()) - int(counters.get(cache, 0))
                yield int((folder / limit).read_text()), used


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process, of both versions, and of all groups above them.

    Inside a container the groups above its own are not mounted, and its own is the root.
    """
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            for root in {_CGROUPS / controllers, _CGROUPS / controller} if controllers else {_CGROUPS, _CGROUPS / "unified"}:
                own = PurePosixPath(path.lstrip("/"))
                yield from (root / folder for folder in (own, *own.parents))
