"""Trains one configuration: sets up or resumes, loops over iterations, and yields a report after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rrn_core.config import Runtime, TrainConfig
from rrn_core.data.batches import Batches, loader
from rrn_core.data.dataset import DataSet, open_dataset
from rrn_core.data.lists import find_file, roots
from rrn_core.errors import ConfigError
from rrn_core.evaluate import HEADS, confusions, metrics_of, reported_head
from rrn_core.methods import build_networks, method_of
from rrn_core.methods.base import train_step
from rrn_core.optimisation import AccumulationGroup, Optimisers, group_of, learning_rate
from rrn_core.state import TrainState, read_files, seed_everything
from rrn_core.weights import initialise

Metrics = dict[str, float]


@dataclass(frozen=True)
class Report:
    """The progress of a run."""

    iteration: int
    """Iterations done."""
    iterations: int
    """Iterations of the whole run. `accumulate` of them make one optimiser step."""
    epoch: int
    """Epochs completed."""
    loss: float
    """Mean of the total loss over the epoch so far."""
    metrics: Metrics | None
    """Metrics of the epoch; None within an epoch."""
    state: TrainState
    """The live state, which training changes further. Save it before the next report."""
    data: DataSet
    """The data set of the run."""
    confusion: Tensor | None = None
    """Confusion matrix of the validation images, (K, K) int64: true class (rows), class that `reported_head` predicts (columns), without
    void. None within an epoch."""


def train(
    config: TrainConfig,
    runtime: Runtime | None = None,
    *,
    resume_from: Path | Mapping[str, bytes] | None = None,
    init_weights: bytes | None = None,
) -> Iterator[Report]:
    """Train `config` from its start or from a checkpoint, and yield a report after every epoch.

    Reports within an epoch (`runtime.progress_every`) wait for the end of a group of accumulated gradients, so that no checkpoint holds
    half a group. On a CPU, a run that was interrupted and resumed equals the uninterrupted run bit for bit (same machine, same number of
    threads).

    Args:
        runtime: where to run. The defaults suit the embedded data.
        resume_from: directory that `report.state.save` has written, or the files of `report.state.to_files`.
        init_weights: contents of the file `config.init_weights`. Unset: the file is read.

    Raises:
        DataError: data or initial weights that cannot be used, that differ from those that `config` names by hash, or whose classes have
            other names or another order than those of `resume_from`.
        ConfigError: settings that do not fit the data, or a device that this machine does not have.
        CheckpointError: `resume_from` is damaged, or is a checkpoint of another run.
        FloatingPointError: a loss is no longer finite.
    """
    runtime = runtime or Runtime()
    device = set_up_torch(runtime)
    seed_everything(config.seed)
    data = open_dataset(config, runtime)
    batches = Batches(config, data)
    state = _fresh_state(config, data.classes, device)
    if resume_from is not None:
        state.load_files(read_files(resume_from) if isinstance(resume_from, Path) else resume_from)
    elif config.init_weights is not None:
        body = init_weights or find_file(config.init_weights, roots=roots(runtime)).read_bytes()
        initialise(state.quartet, body, classes=data.classes, sha256=config.init_sha256)
    yield from _loop(config, runtime, data, batches, state, device)


def device_of(runtime: Runtime) -> torch.device:
    """The device that `runtime.device` names.

    Raises:
        ConfigError: the name is unknown, or this machine does not have the device.
    """
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(runtime.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: must be auto, cpu, cuda or cuda:N, got {runtime.device}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {runtime.device}, but torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu, "
            "or check the GPU driver and CUDA_VISIBLE_DEVICES"
        )
    return device


def set_up_torch(runtime: Runtime) -> torch.device:
    """Set torch's threads and deterministic algorithms for a run, and return its device. Raises ConfigError as `device_of`."""
    device = device_of(runtime)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    # bilinear up-sampling has no deterministic backward pass on CUDA: only warn there
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def peak_memory_mb(device: torch.device) -> float:
    """MiB: the peak of allocated GPU memory or, on a CPU, the peak resident set of the process, including any earlier run in it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage would include the parent that this process was forked from
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _loop(
    config: TrainConfig, runtime: Runtime, data: DataSet, batches: Batches, state: TrainState, device: torch.device
) -> Iterator[Report]:
    per_epoch = batches.iterations_per_epoch
    total = config.epochs * per_epoch
    method = method_of(config.method)
    sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.sums.items()}
    since = state.iteration
    clock, counted_from = _Clock(state.seconds), state.iteration
    for batch in loader(batches, start=state.iteration, stop=total, workers=runtime.workers, pin=device.type == "cuda"):
        epoch = state.iteration // per_epoch
        lr = learning_rate(config, state.iteration, per_epoch)
        group = group_of(config, state.iteration, per_epoch)
        values = train_step(method, state.quartet, state.optimisers, batch.to(device), config, epoch=epoch, lr=lr, group=group)
        for name, value in values.items():
            sums[name] = sums[name] + value if name in sums else value.double()
        state.iteration += 1
        done = state.iteration % per_epoch
        if done and not _is_due(done, group, runtime.progress_every):
            continue
        state.sums = _finite(dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)), since + 1, state.iteration)
        since = state.iteration
        loss = state.sums["loss"] / (done or per_epoch)
        metrics = confusion = None
        if not done:
            trained_s = clock.lap()
            by_head = confusions(state.quartet, data.val, len(data.classes), config, device)
            confusion = by_head[HEADS.index(reported_head(config))]
            metrics = _epoch_metrics(state.sums, per_epoch) | {"train/lr": lr} | metrics_of(by_head, data.classes, config)
            metrics |= _costs(config, state.iteration - counted_from, trained_s, clock.lap(), device)
            counted_from = state.iteration
            sums, state.sums = {}, {}
        state.seconds = clock.total()
        yield Report(state.iteration, total, state.iteration // per_epoch, loss, metrics, state, data, confusion)
        clock.resume()


def _fresh_state(config: TrainConfig, classes: tuple[str, ...], device: torch.device) -> TrainState:
    quartet = build_networks(config, len(classes)).to(device)
    return TrainState(quartet, Optimisers(quartet, config), config, classes)


def _is_due(done: int, group: AccumulationGroup, every: int | None) -> bool:
    """Whether to report after `done` iterations of an epoch: at the end of the first group that reaches a multiple of `every`."""
    return every is not None and group.ends and done % every < group.size


def _finite(sums: dict[str, float], first: int, last: int) -> dict[str, float]:
    """The sums. Raises FloatingPointError if one is not finite: it was finite before the iteration `first`."""
    where = str(first) if first == last else f"{first} to {last}"
    bad = [name for name, value in sums.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"diverged: {', '.join(bad)} not finite at iteration {where}; lower lr or the lambdas")
    return sums


def _epoch_metrics(sums: dict[str, float], iterations: int) -> Metrics:
    """Means over the epoch, and accuracies of pseudo-labels as ratios of counted pixels."""
    counts = {name: value for name, value in sums.items() if name.startswith(("correct", "total"))}
    metrics = {f"train/{name}": value / iterations for name, value in sums.items() if name not in counts}
    for name, total in counts.items():
        if name.startswith("total") and total > 0:
            suffix = name.removeprefix("total")
            metrics[f"train/pseudo_accuracy{suffix}"] = counts[f"correct{suffix}"] / total
    return metrics


def _costs(config: TrainConfig, iterations: int, train_s: float, eval_s: float, device: torch.device) -> Metrics:
    streams = 1 + config.unlabeled_streams
    costs = {
        "perf/images_per_s": streams * config.batch_size * iterations / max(train_s, 1e-9),
        "perf/train_s": train_s,
        "perf/eval_s": eval_s,
    }
    return costs | {"perf/peak_memory_mb": peak_memory_mb(device)}


class _Clock:
    """Measures seconds of training and evaluation, without the time that the caller spends between two reports."""

    def __init__(self, before: float) -> None:
        """`before`: seconds of earlier attempts."""
        self._total = before
        self._mark = self._lap = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    def total(self) -> float:
        """Seconds since the start, including earlier attempts."""
        now = time.perf_counter()
        self._total += now - self._mark
        self._mark = now
        return self._total

    def resume(self) -> None:
        """Leave out the time since the last `total`."""
        paused = time.perf_counter() - self._mark
        self._mark += paused
        self._lap += paused
