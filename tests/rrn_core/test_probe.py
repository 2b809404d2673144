"""probe.py: what a run costs is measured by running it, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rrn_core import Runtime, TrainConfig, configure, train
from rrn_core.evaluate import slide_all
from rrn_core.probe import Cost, Task, checkpoint_bytes, probe, task_of

ONE_THREAD = Runtime(device="cpu", threads=1)


def config(**settings: Any) -> TrainConfig:
    return configure("digits", **settings)


def test_a_probe_measures_something_of_everything():
    cost = probe(config(), ONE_THREAD, num_classes=11, iterations=1)
    assert cost.seconds_per_iteration > 0
    assert cost.seconds_per_window > 0
    assert cost.peak_memory_mb > 0


def test_the_whole_method_costs_more_than_supervision_alone():
    supervised, rrn = (probe(config(method=method), ONE_THREAD, num_classes=11, iterations=5) for method in ("supervised", "rrn"))
    assert supervised.seconds_per_iteration < rrn.seconds_per_iteration


def test_a_probe_predicts_a_real_run_within_a_factor_of_four():
    short = config(train_images=64, val_images=16, epochs=2, partition="1/4")
    *_, last = train(short, ONE_THREAD)
    cost, windows = probe(short, ONE_THREAD, num_classes=11), task_of(short, ONE_THREAD).windows(short.crop)
    estimated_s = cost.trial_s(iterations=last.iterations, epochs=short.epochs, windows=windows)
    assert last.state.seconds / 4 < estimated_s < last.state.seconds * 4


def test_a_probe_leaves_torch_as_it_was():
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    probe(config(method="supervised"), Runtime(device="cpu", threads=threads + 1), num_classes=11, iterations=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("size", [(64, 64), (40, 50), (90, 64), (65, 130), (40, 100)])
def test_windows_are_counted_as_evaluation_cuts_them(size):
    cut = []

    def forward(windows: torch.Tensor) -> torch.Tensor:
        cut.append(len(windows))
        return windows

    list(slide_all([np.zeros((*size, 3), np.uint8)] * 3, forward, crop=64))
    assert Task(11, 3, size).windows(64) == sum(cut)


def test_a_whole_cityscapes_image_takes_eight_windows_of_800():
    assert Task(19, 500, (1024, 2048)).windows(800) == 4000


@pytest.mark.parametrize("method", ["supervised", "rrn"])
def test_the_size_of_a_checkpoint_is_known_before_there_is_one(method):
    wide = {"discriminator_width": 32} if method == "rrn" else {}
    short = config(method=method, train_images=16, val_images=1, epochs=1, **wide)
    (report,) = train(short, ONE_THREAD)
    real = sum(map(len, report.state.to_files().values()))
    assert checkpoint_bytes(short, 11) == pytest.approx(real, rel=0.1)


def test_a_trial_takes_its_iterations_and_its_evaluations():
    assert Cost(0.5, 0.25, 0, 0).trial_s(iterations=10, epochs=2, windows=4) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_on_a_gpu_grows_with_the_batch():
    peaks = [probe(config(batch_size=size), Runtime(device="cuda"), num_classes=11).peak_memory_mb for size in (4, 16)]
    assert 0 < peaks[0] < peaks[1]
