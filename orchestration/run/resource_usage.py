"""Sample CPU, memory and GPU use of a trial while it trains, and describe its machine."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from orchestration.formatting import bytes_shown
from rrn_core.config import Runtime
from rrn_core.errors import ConfigError

EVERY_S = 2.0
"""Between two samples."""

_MB = 1e6


class Usage:
    """Samples in a background thread while its context is open; `means` returns the use since the previous call.

    `system/cpu_utilization_percentage`: CPU time of this process and its children, relative to the CPUs that the operating system
    grants it or to the runtime's threads and workers, whichever is less. Memory: of the whole machine, like MLflow's system metrics.
    `gpu_0`: the GPU that the trial computes on, including other processes on it. A value that cannot be measured is left out.
    """

    def __init__(self, runtime: Runtime, *, every_s: float = EVERY_S) -> None:
        self._cpus, self._every_s = _cpus(runtime), every_s
        self._gpu = _gpu_reader(runtime)
        self._lock, self._end = threading.Lock(), threading.Event()
        self._cpu = _CpuClock()
        self._samples: list[dict[str, float]] = []
        self._spent_s = 0.0
        self._since_s = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="usage", daemon=True)

    def __enter__(self) -> Usage:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()

    def means(self) -> dict[str, float]:
        """Means since the previous call (or the start), by MLflow's metric names."""
        self._sample()
        with self._lock:
            samples, spent_s, since_s = self._samples, self._spent_s, self._since_s
            self._samples, self._spent_s, self._since_s = [], 0.0, time.monotonic()
        used = {"cpu_utilization_percentage": 100 * spent_s / self._cpus / max(self._since_s - since_s, 1e-9)}
        for name in sorted({name for sample in samples for name in sample}):
            values = [sample[name] for sample in samples if name in sample]
            used[name] = sum(values) / len(values)
        return {f"system/{name}": round(value, 1) for name, value in used.items()}

    def _work(self) -> None:
        while not self._end.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        with self._lock, suppress(psutil.Error, OSError):  # a failed measurement must not end a training
            self._spent_s += self._cpu.lap()
            self._samples.append(_memory() | self._gpu())


def machine(runtime: Runtime) -> dict[str, str]:
    """Versions, CPUs, memory and device of this machine, as text."""
    import torch

    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": str(_granted()),
        "memory": bytes_shown(psutil.virtual_memory().total),
        "device": _cpu_name(),
    }
    if (index := _cuda_index(runtime)) is not None:
        facts |= {"device": torch.cuda.get_device_name(index), "cuda": str(torch.version.cuda)}
    return facts


class _CpuClock:
    """CPU seconds of this process and its descendants."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self.lap()

    def lap(self) -> float:
        """Seconds since the previous call. A process that ended in between contributes nothing after its last sample."""
        now = dict(self._times())
        spent_s = sum(seconds - self._seen.get(process, 0.0) for process, seconds in now.items())
        self._seen = now
        return max(0.0, spent_s)

    def _times(self) -> Iterator[tuple[tuple[int, float], float]]:
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.Error):  # it ended just now
                times = process.cpu_times()
                yield (process.pid, process.create_time()), times.user + times.system


def _memory() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "system_memory_usage_megabytes": memory.used / _MB,
        "system_memory_usage_percentage": 100 * memory.used / memory.total,
    }


def _gpu_reader(runtime: Runtime) -> Callable[[], dict[str, float]]:
    """A function that reads use and memory of the trial's GPU; it returns nothing without a GPU or NVML."""
    index = _cuda_index(runtime)
    if index is None:
        return dict
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except Exception:  # several libraries, many causes: no driver, no permission, a MIG slice
        return dict
    return lambda: _gpu(pynvml, handle)


def _gpu(pynvml: Any, handle: Any) -> dict[str, float]:
    used = {}
    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        used["gpu_0_memory_usage_megabytes"] = memory.used / _MB
        used["gpu_0_memory_usage_percentage"] = 100 * memory.used / memory.total
    with suppress(pynvml.NVMLError):
        used["gpu_0_utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return used


def _cuda_index(runtime: Runtime) -> int | None:
    """torch's index of the GPU that the trial computes on; None for a CPU, or if there is no such GPU."""
    import torch

    from rrn_core.training import device_of

    with suppress(ConfigError):  # the training reports it
        device = device_of(runtime)
        return (torch.cuda.current_device() if device.index is None else device.index) if device.type == "cuda" else None
    return None


def _cpus(runtime: Runtime) -> int:
    return min(_granted(), runtime.threads + runtime.workers) if runtime.threads else _granted()


def _granted() -> int:
    process = psutil.Process()
    return len(process.cpu_affinity() or []) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def _cpu_name() -> str:
    """From /proc/cpuinfo on Linux; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
