"""Measures the cost of a run: a few training steps and one evaluation batch on random images, and the extrapolation to a trial."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rrn_core.config import Runtime, TrainConfig
from rrn_core.data.batch import Batch
from rrn_core.data.dataset import Pixels, open_validation
from rrn_core.evaluate import default_stride, evaluate, window_starts
from rrn_core.methods import build_networks, method_of
from rrn_core.methods.base import train_step
from rrn_core.networks.quartet import Quartet
from rrn_core.optimisation import ALONE, Optimisers
from rrn_core.training import peak_memory_mb, set_up_torch


@dataclass(frozen=True)
class Cost:
    """The measured cost on one device, without the preparation of batches. Without enough workers that time adds to it."""

    seconds_per_iteration: float
    """Seconds of one training iteration."""
    seconds_per_window: float
    """Seconds of one evaluation window, both branches together."""
    peak_memory_mb: float
    """MiB. On CUDA the peak of allocated memory; on a CPU `host_memory_mb`."""
    host_memory_mb: float
    """MiB of main memory: the peak of the process's resident set, including libraries."""

    def trial_s(self, *, iterations: int, epochs: int, windows: int) -> float:
        """Seconds of a whole trial. `windows` is the number of windows of one evaluation."""
        return iterations * self.seconds_per_iteration + epochs * windows * self.seconds_per_window


@dataclass(frozen=True)
class Task:
    """The properties of a data set that decide the cost."""

    num_classes: int
    val_images: int
    """Number of validation images."""
    val_size: tuple[int, int]
    """Height and width of a typical validation image, in pixels."""

    def windows(self, crop: int) -> int:
        """Number of windows of one evaluation over all validation images."""
        rows, columns = (len(window_starts(max(side, crop), crop, default_stride(crop))) for side in self.val_size)
        return self.val_images * rows * columns


PUBLISHED = {
    "camvid": Task(11, 101, (360, 480)),
    "voc": Task(21, 1449, (375, 500)),
    "cityscapes": Task(19, 500, (1024, 2048)),
}
"""Data sets whose properties are known without their files."""


def task_of(config: TrainConfig, runtime: Runtime) -> Task:
    """The task of `config`. Only dataset `folder` is opened; its first validation image counts as typical.

    Raises:
        DataError: as `open_validation`.
    """
    if config.dataset == "digits":
        return Task(11, config.val_images, (config.image_size, config.image_size))
    if config.dataset in PUBLISHED:
        known = PUBLISHED[config.dataset]
        return Task(known.num_classes, config.split.val if config.split else known.val_images, known.val_size)
    data = open_validation(config, runtime)
    height, width = data.val[0][1].shape
    return Task(len(data.classes), len(data.val), (height, width))


def probe(config: TrainConfig, runtime: Runtime, *, num_classes: int, iterations: int = 3) -> Cost:
    """Measure the cost of `config` on random images: `iterations` training steps after one for warm-up, and one evaluation batch.

    All terms of the loss are computed. Torch's settings and global random state are restored.

    Raises:
        torch.OutOfMemoryError: the run does not fit the memory of the device.
        ConfigError: this machine has no such device.
    """
    with _as_in_training(runtime) as device:
        _reset_peak(device)
        method = method_of(config.method)
        quartet = build_networks(config, num_classes).to(device)
        optimisers = Optimisers(quartet, config)
        batch = _random_batch(config, num_classes).to(device)

        def step() -> None:
            # learning rate 0 has the same cost and cannot diverge; in a late epoch every term of the loss is computed
            train_step(method, quartet, optimisers, batch, config, epoch=sys.maxsize, lr=0.0, group=ALONE)

        per_iteration = _seconds(step, iterations, device)
        per_window = _evaluation_s(quartet, config, num_classes, device) / config.eval_batch
        return Cost(per_iteration, per_window, peak_memory_mb(device), peak_memory_mb(torch.device("cpu")))


def checkpoint_bytes(config: TrainConfig, num_classes: int) -> int:
    """Size of a checkpoint of `config` in bytes: the networks and the state of the optimisers."""
    with torch.device("meta"):
        quartet = build_networks(config, num_classes)
    weights: int = sum(tensor.nbytes for tensor in quartet.state_dict().values())
    slots = Optimisers(quartet, config).expected_slots()
    return weights + sum(tensor.nbytes for optimiser in slots.values() for state in optimiser.values() for tensor in state.values())


def _random_batch(config: TrainConfig, num_classes: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, side = config.batch_size, config.crop

    def images() -> Tensor:
        return torch.randn(size, 3, side, side, generator=generator)

    def labels() -> Tensor:
        return torch.randint(num_classes, (size, side, side), generator=generator)

    mask = torch.randint(2, (size, 1, side, side), generator=generator).float()
    return Batch(x=images(), y=labels(), u0=images(), u1=images(), mask=mask, hidden0=labels(), hidden1=labels())


class _RandomImages:
    """Images of one window each."""

    def __init__(self, count: int, crop: int, num_classes: int) -> None:
        generator = np.random.default_rng(0)
        self.names: Sequence[str] = [str(i) for i in range(count)]
        self._image = generator.integers(256, size=(crop, crop, 3), dtype=np.uint8)
        self._label = generator.integers(num_classes, size=(crop, crop), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        return self._image, self._label


def _evaluation_s(quartet: Quartet, config: TrainConfig, num_classes: int, device: torch.device) -> float:
    """Seconds of one full evaluation batch, after one window for warm-up."""
    classes = [str(k) for k in range(num_classes)]
    evaluate(quartet, _RandomImages(1, config.crop, num_classes), classes, config, device)
    full = _RandomImages(config.eval_batch, config.crop, num_classes)
    return _timed(lambda: evaluate(quartet, full, classes, config, device), device)


def _seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Median seconds of `times` runs, after one run for warm-up."""
    run()
    return float(np.median([_timed(run, device) for _ in range(times)]))


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _as_in_training(runtime: Runtime) -> Iterator[torch.device]:
    """Within, torch is set up as for training; afterwards its settings are restored."""
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # about operations that are not deterministic on CUDA
            yield set_up_torch(runtime)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    """Reset the measured peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # only Linux has this file; elsewhere the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
