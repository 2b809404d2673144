"""failures.py and errors.py: the class of a failure follows from the exception's type, wherever it was raised."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_data import make_folder
from PIL import Image

from orchestration.errors import Preempted, StoreError, StoreUnavailable, SweepError, user_errors
from orchestration.failures import Failure, classify, classify_death, fingerprint, reason_of, traceback_of, where
from rrn_core import CheckpointError, ConfigError, DataError, Runtime, configure, train
from rrn_core.data.batches import loader
from rrn_core.partition import labeled_indices

CLASSES = [
    (Preempted("SIGTERM"), "lost"),
    (FloatingPointError("diverged: loss"), "diverged"),
    (StoreUnavailable("no answer"), "unavailable"),
    (DataError("a.png: not a readable image"), "data"),
    (ConfigError("device: must be auto, cpu, cuda or cuda:N, got x"), "data"),
    (CheckpointError("the checkpoint cannot be read"), "data"),
    (MemoryError(), "memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
    (RuntimeError("CUDA error: out of memory"), "memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "unavailable"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"), "data"),
    (ValueError("a bug"), "code"),
    (KeyError("a bug"), "code"),
    (AssertionError("a bug"), "code"),
]


@pytest.mark.parametrize(("error", "expected"), CLASSES, ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_the_type_of_an_exception_decides_its_class(error: BaseException, expected: Failure):
    assert classify(error) == expected


def test_a_plain_value_error_that_rrn_core_raises_is_a_bug():
    with pytest.raises(ValueError, match="got none") as caught:
        labeled_indices("1/4", 8, by="balanced", seed=0)
    assert where(traceback_of(caught.value)).startswith("partition.py:")
    assert classify(caught.value) == "code"


class Raising:
    """Batches that raise when a worker process prepares the first one."""

    def __init__(self, make: Callable[[], Exception]) -> None:
        self.make = make

    def __getitem__(self, iteration: int) -> Any:
        raise self.make()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: DataError("masks/a.png: not a readable image"), "data"),
        (lambda: ConfigError("crop: too large"), "data"),
        (lambda: ValueError("need at least one array to stack"), "code"),
        (lambda: MemoryError("cannot allocate"), "memory"),
        (lambda: FileNotFoundError("masks/a.png"), "data"),
    ],
    ids=["DataError", "ConfigError", "ValueError", "MemoryError", "FileNotFoundError"],
)
def test_an_exception_of_a_worker_process_keeps_its_class(make, expected):
    with pytest.raises(type(make())) as caught:
        next(loader(Raising(make), start=0, stop=2, workers=1, pin=False))
    assert type(caught.value) is type(make())
    assert "Original Traceback" in str(caught.value)
    assert classify(caught.value) == expected
    assert reason_of(caught.value) == f"{type(make()).__name__}: {make()}"


def test_a_bad_label_that_a_worker_process_finds_is_a_fault_of_the_data(tmp_path):
    data = make_folder(tmp_path / "data")
    for mask in (data / "masks").iterdir():
        if mask.stem not in (data / "val.txt").read_text().split():
            Image.new("L", Image.open(mask).size, 77).save(mask)
    config = configure("digits", dataset="folder", epochs=1, batch_size=2, warmup_epochs=0, partition="full")
    runtime = Runtime(device="cpu", threads=1, data_root=data, workers=1, cache_images=False)
    with pytest.raises(DataError, match="Caught DataError in DataLoader worker process 0") as caught:
        next(train(config, runtime))
    assert classify(caught.value) == "data"
    assert reason_of(caught.value).startswith(f"DataError: {data}/masks/")
    assert "labels must be 0..1 or 255, got 77" in reason_of(caught.value)


def test_a_death_is_out_of_memory_only_if_ray_says_so():
    assert classify_death("Task was killed due to the node running low on memory.") == "memory"
    assert classify_death("The worker died unexpectedly; possible reasons: the kernel's OOM killer, SIGKILL") == "lost"


def failing(number: int) -> Exception:
    try:
        raise RuntimeError(f"size {number}")
    except RuntimeError as error:
        return error


def test_the_fingerprint_of_a_fault_ignores_the_numbers_in_its_text():
    first, second = (traceback_of(failing(number)) for number in (3, 4))
    assert first != second
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(first.replace("RuntimeError", "KeyError"))
    assert where(first).startswith("test_failures.py:")


@pytest.mark.parametrize("kind", [DataError, ConfigError, CheckpointError, OSError])
def test_faults_that_a_user_can_fix_become_sweep_errors(kind):
    with pytest.raises(SweepError, match=r"^a fault$") as caught, user_errors():
        raise kind("a fault")
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError])
def test_a_bug_stays_what_it_is(kind):
    with pytest.raises(kind), user_errors():
        raise kind("a bug")


def test_memory_that_the_kernel_refuses_is_of_class_memory_also_in_the_store():
    refused = OSError(errno.ENOMEM, "Cannot allocate memory")
    in_the_store = StoreError("k: Cannot allocate memory")
    in_the_store.__cause__ = refused
    assert [classify(refused), classify(in_the_store)] == ["memory", "memory"]
