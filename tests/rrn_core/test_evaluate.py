"""Sliding windows, confusion matrices, and the evaluation of two branches."""

import math

import golden
import numpy as np
import pytest
import torch
from torch import nn

from rrn_core import ConfigError, configure
from rrn_core.config import TrainConfig
from rrn_core.data.batch import IMAGENET_MEAN, IMAGENET_STD
from rrn_core.evaluate import HEADS, confusion, confusions, evaluate, iou, metrics_of, miou, predict, slide, slide_all
from rrn_core.methods import build_networks
from rrn_core.presets import PRESETS

CASES = ("big_100x150", "wide_50x150", "small_40x60", "exact_64x64", "plus1_64x65", "tall_130x63")
CPU = torch.device("cpu")


class Probe:
    """The golden numbers' stand-in for a network; counts the windows that it sees."""

    def __init__(self) -> None:
        self.net = golden.load("slide")
        self.windows = 0

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        self.windows += len(windows)
        return torch.from_numpy(np.stack([self.score(w) for w in windows.double().numpy()])).float()

    def score(self, window: np.ndarray) -> np.ndarray:
        A, P, Q, R = (self.net[f"net.{name}"] for name in "APQR")
        y, x = np.mgrid[:64, :64] / 63
        colour = np.tanh(np.einsum("ck,kyx->cyx", A, window))
        return colour + P[:, None, None] * y + Q[:, None, None] * x + R[:, None, None] * window.mean()


class Constant(nn.Module):
    """Scores each class by a fixed map of the pixel's red value: class 1 where it is high; `shift` moves the border."""

    def __init__(self, shift: float, classes: int = 3) -> None:
        super().__init__()
        self.shift, self.classes = shift, classes
        self.dropout, self.batches = nn.Dropout(), []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.batches.append(len(images))
        red = images[:, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
        scores = [-(red - self.shift), red - self.shift, *[torch.full_like(red, -9.0)] * (self.classes - 2)]
        return torch.stack(scores, dim=1)


class Pair(nn.Module):
    def __init__(self, shift1: float, shift2: float) -> None:
        super().__init__()
        self.branch1, self.branch2 = Constant(shift1), Constant(shift2)


class Grey:
    """Two images, black, grey and white thirds; white alone is class 1, one column is void."""

    names = ("a", "b")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        value = np.repeat(np.array([0, 128, 255], np.uint8), 30 + index)
        label = (value > 200).astype(np.uint8)
        label[0] = 255
        rows = 70
        return np.tile(value[None, :, None], (rows, 1, 3)), np.tile(label, (rows, 1))


def settings(**changes) -> TrainConfig:
    values = {**PRESETS["digits"], "scales": (1.0,), **changes}
    return configure(**values)


CLASSES = ("zero", "one", "two")


@pytest.mark.parametrize("case", CASES)
def test_sliding_windows_equal_the_release(case):
    reference, probe = golden.load("slide"), Probe()
    scores = slide(reference[f"{case}.img"], probe, crop=64)
    assert probe.windows == reference[f"{case}.calls"]
    expected = reference[f"{case}.score"].transpose(2, 0, 1)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert np.array_equal(scores.argmax(0), reference[f"{case}.pred"])


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_windows_of_several_images_share_a_batch_without_changing_a_number(batch):
    reference = golden.load("slide")
    images = [reference[f"{case}.img"] for case in CASES]
    alone = [slide(image, Probe(), crop=64) for image in images]
    sizes = []

    def forward(windows):
        sizes.append(len(windows))
        return Probe()(windows)

    together = list(slide_all(images, forward, crop=64, batch=batch))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(size == batch for size in sizes[:-1])


def test_images_are_read_only_as_far_as_the_batch_needs():
    read = []

    def images():
        for i in range(10):
            read.append(i)
            yield np.zeros((64, 64, 3), np.uint8)

    next(slide_all(images(), lambda w: w, crop=64, batch=2))
    assert read == [0, 1]


def test_another_stride_is_obeyed():
    probe = Probe()
    slide(np.zeros((64, 128, 3), np.uint8), probe, crop=64, stride=16)
    assert probe.windows == 5


@pytest.mark.parametrize(("case", "classes"), [("a", 21), ("b", 21), ("c19", 19)])
def test_confusion_and_iou_equal_the_release(case, classes):
    reference = golden.load("metric")
    counts = confusion(*(torch.from_numpy(reference[f"{case}.{name}"]) for name in ("gt", "pred")), classes)
    assert counts.dtype == torch.int64
    assert np.array_equal(counts, reference[f"{case}.hist"])
    assert counts.sum() == reference[f"{case}.labeled"]
    np.testing.assert_allclose(iou(counts), reference[f"{case}.iu"], rtol=1e-7)
    assert miou(counts) == pytest.approx(reference[f"{case}.miou"].item(), rel=1e-12)


def test_miou_is_of_the_sum_of_confusions_not_the_mean_of_mious():
    reference = golden.load("metric")
    pooled = torch.from_numpy(reference["a.hist"] + reference["b.hist"])
    assert miou(pooled) == pytest.approx(reference["ab.miou"].item(), rel=1e-12)


def test_rows_are_ground_truth_and_void_is_skipped():
    counts = confusion(torch.tensor([0, 0, 1, 2, 255]), torch.tensor([1, 0, 1, 1, 1]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_every_branch_and_the_ensemble_are_measured():
    metrics = evaluate(Pair(0.2, 0.7), Grey(), CLASSES, settings(crop=64), CPU)
    # branch 1 takes grey for class 1, branch 2 does not; the mean border is 0.45, below grey
    assert metrics["val/miou_branch2"] == 1.0
    assert metrics["val/iou_branch1/one"] == pytest.approx(0.5, abs=1e-6)
    assert metrics["val/miou_ensemble"] == metrics["val/miou_branch1"] == metrics["val/miou"]
    assert "val/iou_branch1/two" not in metrics
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())


def test_the_weight_of_the_ensemble_moves_it():
    metrics = evaluate(Pair(0.2, 0.7), Grey(), CLASSES, settings(crop=64, ensemble_weight=0.1), CPU)
    assert metrics["val/miou_ensemble"] == metrics["val/miou_branch2"] == 1.0


def test_without_an_ensemble_branch_one_is_the_result_and_the_ensemble_is_still_reported():
    metrics = evaluate(Pair(0.7, 0.2), Grey(), CLASSES, settings(crop=64, ensemble="none", ensemble_weight=0.1), CPU)
    assert metrics["val/miou"] == metrics["val/miou_branch1"] == 1.0
    assert metrics["val/miou_ensemble"] < 1.0


def test_probabilities_are_averaged_where_asked():
    class Sure(Constant):
        def forward(self, images):
            return super().forward(images) * 100

    pair = Pair(0.2, 0.7)
    pair.branch2 = Sure(0.55)  # for class 1 at grey: logits -4.8 against +0.3, probabilities 0 against 0.65
    by_logits = evaluate(pair, Grey(), CLASSES, settings(crop=64, ensemble_weight=0.8), CPU)
    by_prob = evaluate(pair, Grey(), CLASSES, settings(crop=64, ensemble="prob", ensemble_weight=0.8), CPU)
    assert by_logits["val/miou"] == 1.0
    assert by_prob["val/miou"] < 1.0


def test_the_number_of_windows_a_pass_changes_no_metric_and_each_branch_runs_once_a_pass():
    results = []
    for batch in (1, 3, 32):
        pair = Pair(0.2, 0.7)
        results.append(evaluate(pair, Grey(), CLASSES, settings(crop=64, eval_batch=batch), CPU))
        assert pair.branch1.batches == pair.branch2.batches
        assert sum(pair.branch1.batches) == 8  # 2 x 2 windows an image
    assert results[0] == results[1] == results[2]


def test_real_networks_give_the_same_numbers_whatever_the_number_of_windows_a_pass():
    quartet = build_networks(settings(seed=3), 3)
    results = [evaluate(quartet, Grey(), CLASSES, settings(crop=64, eval_batch=batch), CPU) for batch in (1, 3, 32)]
    assert results[0] == results[1] == results[2]


def test_a_smaller_stride_takes_more_windows_and_one_with_gaps_is_refused():
    pair = Pair(0.2, 0.7)
    evaluate(pair, Grey(), CLASSES, settings(crop=64), CPU, stride=16)
    assert sum(pair.branch1.batches) == 2 * 2 * 3  # images of 70 x 90 and 70 x 93
    with pytest.raises(ConfigError, match=r"stride: must be 1\.\.64, the crop, got 65$"):
        evaluate(pair, Grey(), CLASSES, settings(crop=64), CPU, stride=65)


@pytest.mark.parametrize(("ensemble", "weight", "head"), [("logits", 0.1, "ensemble"), ("prob", 0.5, "ensemble"), ("none", 0.1, "branch1")])
def test_a_prediction_is_what_the_evaluation_scores(ensemble, weight, head):
    c, pair, images = settings(crop=64, ensemble=ensemble, ensemble_weight=weight), Pair(0.2, 0.7), Grey()
    counts = sum(confusion(*map(torch.from_numpy, (images[i][1], predict(pair, images[i][0], c, CPU))), 3) for i in range(2))
    metrics = evaluate(pair, images, CLASSES, c, CPU)
    assert miou(counts) == metrics["val/miou"] == metrics[f"val/miou_{head}"]


def test_the_metrics_follow_from_one_confusion_matrix_a_head():
    c, pair = settings(crop=64, ensemble_weight=0.1), Pair(0.7, 0.2)
    counts = confusions(pair, Grey(), 3, c, CPU)
    assert counts.shape == (3, 3, 3)
    assert len({int(matrix.sum()) for matrix in counts}) == 1
    metrics = metrics_of(counts, CLASSES, c)
    assert metrics == evaluate(pair, Grey(), CLASSES, c, CPU)
    assert [miou(matrix) for matrix in counts] == [metrics[f"val/miou_{head}"] for head in HEADS]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_modes_gradients_and_random_state_as_they_were(training):
    pair = Pair(0.2, 0.7).train(training)
    pair.branch1.dropout.eval()
    state = torch.get_rng_state()
    evaluate(pair, Grey(), CLASSES, settings(crop=64), CPU)
    assert [pair.training, pair.branch1.training, pair.branch2.dropout.training] == [training] * 3
    assert not pair.branch1.dropout.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_restored_after_a_failure():
    pair = Pair(0.2, 0.7).train()
    pair.branch2.forward = None
    with pytest.raises(TypeError):
        evaluate(pair, Grey(), CLASSES, settings(crop=64), CPU)
    assert pair.branch1.training
    assert pair.branch2.training


def test_bfloat16_runs_the_networks_under_autocast():
    class Records(Constant):
        def forward(self, images):
            self.autocast = torch.is_autocast_enabled("cpu")
            return super().forward(images).bfloat16()

    pair = Pair(0.2, 0.7)
    pair.branch1 = Records(0.2)
    metrics = evaluate(pair, Grey(), CLASSES, settings(crop=64, precision="bfloat16"), CPU)
    assert pair.branch1.autocast
    assert metrics["val/miou_branch2"] == 1.0


def test_metrics_without_a_labelled_pixel_or_of_a_class_without_any_are_absent():
    nothing = torch.zeros(3, 2, 2, dtype=torch.int64)
    assert miou(nothing[0]) is None
    assert metrics_of(nothing, ("a", "b"), configure("digits")) == {}
    nothing[1, 0, 0] = 5
    assert metrics_of(nothing, ("a", "b"), configure("digits")) == {"val/miou_branch2": 1.0, "val/iou_branch2/a": 1.0}
