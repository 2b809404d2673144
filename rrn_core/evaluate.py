"""Evaluation: sliding windows over whole images, the ensemble of both branches, and mIoU (see docs/method.md, Evaluation)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rrn_core.config import TrainConfig
from rrn_core.data.augment import normalise, pad
from rrn_core.data.dataset import Images, Pixels
from rrn_core.errors import ConfigError
from rrn_core.losses import hard_labels
from rrn_core.networks.quartet import Quartet, branches

Forward = Callable[[Tensor], Tensor]
"""Normalised windows (N, 3, crop, crop) to scores (N, ..., crop, crop)."""

Head = Literal["branch1", "branch2", "ensemble"]
HEADS: tuple[Head, ...] = get_args(Head)
"""The predictions that are evaluated, in the order of all results."""


def evaluate(
    quartet: Quartet, images: Images, classes: Sequence[str], config: TrainConfig, device: torch.device, *, stride: int | None = None
) -> dict[str, float]:
    """Metrics of the networks on `images`: `metrics_of` the `confusions`. Raises ConfigError as `slide_all`."""
    return metrics_of(confusions(quartet, images, len(classes), config, device, stride=stride), classes, config)


def confusions(
    quartet: Quartet, images: Images, num_classes: int, config: TrainConfig, device: torch.device, *, stride: int | None = None
) -> Tensor:
    """Confusion matrices (3, K, K) int64 on the CPU, one for each of `HEADS`, from one forward pass of each branch per window.

    The train or eval mode of the branches is restored. Each image is read once, in order, when it is needed.

    Args:
        stride: distance of the windows in pixels, as in `slide_all`.

    Raises:
        ConfigError: as `slide_all`.
        DataError: an image or a label that cannot be read.
    """
    counts = torch.zeros(len(HEADS), num_classes, num_classes, dtype=torch.int64, device=device)
    pairs = (images[i] for i in range(len(images)))
    labels: deque[Pixels] = deque()
    with evaluating(quartet.branch1, quartet.branch2), torch.inference_mode():
        forward = heads(quartet, config, device)
        for scores in slide_all(_without_labels(pairs, labels), forward, crop=config.crop, stride=stride, batch=config.eval_batch):
            gt = torch.from_numpy(labels.popleft()).to(device)
            counts += torch.stack([confusion(gt, pred, num_classes) for pred in hard_labels(scores)])
    return counts.cpu()


def metrics_of(by_head: Tensor, classes: Sequence[str], config: TrainConfig) -> dict[str, float]:
    """mIoU and IoU per class, in 0..1, from confusion matrices (3, K, K), one for each of `HEADS`.

    `val/miou` is the mIoU of the `reported_head`. With `ensemble: none`, `val/miou_ensemble` is that of the mean logits. A class that
    neither occurs nor is predicted has no IoU, and without a labelled pixel there is no mIoU; their keys are left out.
    """
    counts_of = dict(zip(HEADS, by_head, strict=True))
    means = {head: miou(counts) for head, counts in counts_of.items()}
    named = {f"val/miou_{head}": value for head, value in means.items()} | {"val/miou": means[reported_head(config)]}
    metrics = {name: value for name, value in named.items() if value is not None}
    for head, counts in counts_of.items():
        by_class = zip(classes, iou(counts).tolist(), strict=True)
        metrics |= {f"val/iou_{head}/{name}": value for name, value in by_class if not math.isnan(value)}
    return metrics


def reported_head(config: TrainConfig) -> Head:
    """The prediction whose mIoU is the result of a run: the ensemble, or branch 1 with `ensemble: none`."""
    return "branch1" if config.ensemble == "none" else "ensemble"


def predict(quartet: Quartet, image: Pixels, config: TrainConfig, device: torch.device, *, stride: int | None = None) -> Pixels:
    """Predicted class of every pixel (H, W) of an RGB image (H, W, 3), by the `reported_head`, which `val/miou` measures.

    Raises ConfigError as `slide_all`.
    """
    head = HEADS.index(reported_head(config))
    with evaluating(quartet.branch1, quartet.branch2), torch.inference_mode():
        scores = slide(image, heads(quartet, config, device), crop=config.crop, stride=stride, batch=config.eval_batch)
        return hard_labels(scores[head : head + 1])[0].to(torch.uint8).cpu().numpy()


def slide(image: Pixels, forward: Forward, *, crop: int, stride: int | None = None, batch: int = 1) -> Tensor:
    """Scores (..., H, W) of one RGB image (H, W, 3): `slide_all` for a single image."""
    return next(slide_all([image], forward, crop=crop, stride=stride, batch=batch))


def slide_all(images: Iterable[Pixels], forward: Forward, *, crop: int, stride: int | None = None, batch: int = 1) -> Iterator[Tensor]:
    """Scores (..., H, W) of every RGB image (H, W, 3), summed over the windows that cover a pixel, as in the released CPS code.

    If the longer side of an image is at most `crop`, the normalised image is padded with 0 to one window, and the scores are cropped to the
    image. Any other image is covered by several windows; the last one of a row or column ends at the border.

    Args:
        crop: side of a window in pixels.
        stride: distance of the windows in pixels. Unset: two thirds of `crop`, rounded up.
        batch: windows per forward pass. A pass may hold windows of several images.

    Raises:
        ConfigError: a stride outside 1..crop.
    """
    if stride is not None and not 1 <= stride <= crop:
        raise ConfigError(f"stride: must be 1..{crop}, the crop, got {stride}")
    grids: deque[_WindowGrid] = deque()
    windows = _windows(images, grids, crop, stride or default_stride(crop))
    scores = (score for chunk in _chunks(windows, batch) for score in forward(torch.from_numpy(np.stack(chunk))))
    for first in scores:
        grid = grids.popleft()
        rest = islice(scores, len(grid.corners) - 1)
        yield grid.assemble(first, rest)


def default_stride(crop: int) -> int:
    """Two thirds of the side of a window, rounded up, in pixels."""
    return -(-2 * crop // 3)


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows of a row or column of `length` >= `crop` pixels. The last window ends at the border."""
    return [*range(0, length - crop, stride), length - crop]


def confusion(gt: Tensor, pred: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix (K, K) int64: counts of pixels by true class `gt` (rows) and predicted class `pred` (columns).

    Pixels with gt >= K (void) are not counted. `gt` and `pred` may have any equal shape.
    """
    void = num_classes**2  # void has its own bin: selecting the other pixels would make the CPU wait for the GPU
    gt = gt.long()
    cell = torch.where(gt < num_classes, gt * num_classes + pred.long(), void)
    return torch.bincount(cell.flatten(), minlength=void + 1)[:void].view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class (..., K) float64 of counts (..., K, K); NaN if a class neither occurs nor is predicted."""
    counts = confusion.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)


def miou(confusion: Tensor) -> float | None:
    """Mean of `iou` over the classes that have one, including background; in 0..1. None if no pixel was counted."""
    return iou(confusion).nanmean().item() if bool(confusion.any()) else None


def heads(quartet: Quartet, config: TrainConfig, device: torch.device) -> Forward:
    """The function from windows to the scores of each of `HEADS`, (N, 3, K, crop, crop) float32 on `device`.

    The scores of the branches are logits. Those of the ensemble are weighted means of logits or of probabilities.
    """
    both, weight = branches(quartet, config), config.ensemble_weight

    def forward(windows: Tensor) -> Tensor:
        windows = windows.to(device)
        logits = torch.stack([branch(windows) for branch in both], dim=1).float()
        parts = logits.softmax(dim=2) if config.ensemble == "prob" else logits
        mean = weight * parts[:, :1] + (1 - weight) * parts[:, 1:]
        return torch.cat([logits, mean], dim=1)

    return forward


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Within, the networks are in eval mode; afterwards the mode of every module is restored."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _without_labels(pairs: Iterable[tuple[Pixels, Pixels]], labels: deque[Pixels]) -> Iterator[Pixels]:
    """The images. Their labels are appended to `labels`, to be used when the scores are computed."""
    for image, label in pairs:
        labels.append(label)
        yield image


@dataclass(frozen=True)
class _WindowGrid:
    """The positions of one image and its windows on the padded canvas."""

    canvas: tuple[int, int]
    """Height and width of the canvas."""
    size: tuple[int, int]
    """Height and width of the image, which lies at the centre of the canvas."""
    crop: int
    """Side of a window in pixels."""
    corners: list[tuple[int, int]]
    """Top and left of each window."""

    def assemble(self, first: Tensor, rest: Iterable[Tensor]) -> Tensor:
        """Sum of the windows' scores (..., crop, crop), cropped to the image: (..., H, W)."""
        total = first.new_zeros(*first.shape[:-2], *self.canvas)
        for (top, left), score in zip(self.corners, (first, *rest), strict=True):
            total[..., top : top + self.crop, left : left + self.crop] += score
        height, width = self.size
        top, left = (self.canvas[0] - height) // 2, (self.canvas[1] - width) // 2
        return total[..., top : top + height, left : left + width]


def _windows(images: Iterable[Pixels], grids: deque[_WindowGrid], crop: int, stride: int) -> Iterator[NDArray[np.float32]]:
    """Windows (3, crop, crop) of all images in turn. The grid of each image is appended to `grids` before its first window."""
    for image in images:
        canvas = _canvas(image, crop)
        height, width = canvas.shape[1:]
        corners = list(product(window_starts(height, crop, stride), window_starts(width, crop, stride)))
        grids.append(_WindowGrid((height, width), (image.shape[0], image.shape[1]), crop, corners))
        for top, left in corners:
            yield canvas[:, top : top + crop, left : left + crop]


def _canvas(image: Pixels, crop: int) -> NDArray[np.float32]:
    """The normalised image (3, H, W), padded to at least crop x crop: with the mean colour if it fits into one window, else with black."""
    if max(image.shape[:2]) <= crop:
        return pad(normalise(image), crop, crop, value=0)
    return pad(normalise(image), crop, crop, value=normalise(np.zeros((1, 1, 3), np.uint8)))


def _chunks(windows: Iterator[NDArray[np.float32]], size: int) -> Iterator[list[NDArray[np.float32]]]:
    while chunk := list(islice(windows, size)):
        yield chunk
