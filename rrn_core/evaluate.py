"""Evaluation: sliding windows over whole images, the ensemble of both branches, a confusion matrix each, mIoU (METHOD.md 1.5)."""

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
from rrn_core.losses import hard_labels
from rrn_core.networks.quartet import Quartet

Forward = Callable[[Tensor], Tensor]
"""Windows (N, 3, crop, crop), normalised, to scores (N, ..., crop, crop)."""

Head = Literal["branch1", "branch2", "ensemble"]
HEADS: tuple[Head, ...] = get_args(Head)


def evaluate(
    quartet: Quartet, images: Images, classes: Sequence[str], config: TrainConfig, device: torch.device, *, stride: int | None = None
) -> dict[str, float]:
    """`metrics_of` the `confusions`."""
    return metrics_of(confusions(quartet, images, len(classes), config, device, stride=stride), classes, config)


def confusions(
    quartet: Quartet, images: Images, num_classes: int, config: TrainConfig, device: torch.device, *, stride: int | None = None
) -> Tensor:
    """Confusion matrices (3, K, K) int64 on the CPU, one for each of `HEADS`, from one forward pass of each branch per window.

    The train or eval mode of the branches is restored. Each image is read once, in order, when its turn comes.

    Args:
        stride: of the windows, as in `slide_all`.
    """
    counts = torch.zeros(len(HEADS), num_classes, num_classes, dtype=torch.int64, device=device)
    pairs = (images[i] for i in range(len(images)))
    labels: deque[Pixels] = deque()
    with evaluating(quartet.branch1, quartet.branch2), torch.inference_mode():
        forward = heads(quartet, config, device)
        for scores in slide_all(_parted(pairs, labels), forward, crop=config.crop, stride=stride, batch=config.eval_batch):
            gt = torch.from_numpy(labels.popleft()).to(device)
            counts += torch.stack([confusion(gt, pred, num_classes) for pred in hard_labels(scores)])
    return counts.cpu()


def metrics_of(by_head: Tensor, classes: Sequence[str], config: TrainConfig) -> dict[str, float]:
    """mIoU and IoU per class, in 0..1, of counts (3, K, K), one for each of `HEADS`; `val/miou` is that of the `reported_head`.

    With `ensemble: none`, `val/miou_ensemble` is still there, of logits. A class that neither occurs nor is predicted has no IoU: its
    key is left out.
    """
    counted = dict(zip(HEADS, by_head, strict=True))
    metrics = {f"val/miou_{head}": miou(counts) for head, counts in counted.items()}
    metrics["val/miou"] = metrics[f"val/miou_{reported_head(config)}"]
    for head, counts in counted.items():
        named = zip(classes, iou(counts).tolist(), strict=True)
        metrics |= {f"val/iou_{head}/{name}": value for name, value in named if not math.isnan(value)}
    return metrics


def reported_head(config: TrainConfig) -> Head:
    """Whose predictions the result of a run are."""
    return "branch1" if config.ensemble == "none" else "ensemble"


def predict(quartet: Quartet, image: Pixels, config: TrainConfig, device: torch.device, *, stride: int | None = None) -> Pixels:
    """Class of every pixel (H, W) of an RGB image (H, W, 3), by the `reported_head`: what `evaluate` scores as `val/miou`."""
    head = HEADS.index(reported_head(config))
    with evaluating(quartet.branch1, quartet.branch2), torch.inference_mode():
        scores = slide(image, heads(quartet, config, device), crop=config.crop, stride=stride, batch=config.eval_batch)
        return hard_labels(scores[head : head + 1])[0].to(torch.uint8).cpu().numpy()


def slide(image: Pixels, forward: Forward, *, crop: int, stride: int | None = None, batch: int = 1) -> Tensor:
    """Scores (..., H, W) of one RGB image (H, W, 3): `slide_all` of a single image."""
    return next(slide_all([image], forward, crop=crop, stride=stride, batch=batch))


def slide_all(images: Iterable[Pixels], forward: Forward, *, crop: int, stride: int | None = None, batch: int = 1) -> Iterator[Tensor]:
    """Scores (..., H, W) of every image, summed over the windows that see a pixel.

    An image whose long side fits is normalised, padded with 0 to one window, and cut back. Any other is cut into windows `stride`
    apart (default two thirds of `crop`, rounded up), the last of a row or column flush with the end.

    Args:
        batch: windows per forward pass; a pass takes windows of as many images as it needs to be full.

    Raises:
        ValueError: a stride that would leave gaps.
    """
    if stride is not None and not 1 <= stride <= crop:
        raise ValueError(f"stride: must be 1..{crop}, the crop, got {stride}")
    layouts: deque[_WindowGrid] = deque()
    windows = _windows(images, layouts, crop, stride or default_stride(crop))
    scores = (score for chunk in _chunks(windows, batch) for score in forward(torch.from_numpy(np.stack(chunk))))
    for first in scores:
        layout = layouts.popleft()
        rest = islice(scores, len(layout.corners) - 1)
        yield layout.assemble(first, rest)


def default_stride(crop: int) -> int:
    """Two thirds of the window, rounded up."""
    return -(-2 * crop // 3)


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where the windows of a row or column of `length` >= `crop` pixels begin; the last one is flush with the end."""
    return [*range(0, length - crop, stride), length - crop]


def confusion(gt: Tensor, pred: Tensor, num_classes: int) -> Tensor:
    """Counts of pixels (K, K) int64, rows by `gt`, columns by `pred`; pixels with gt >= K (void) are skipped. Any equal shapes."""
    void = num_classes**2  # a bin of its own: to select the others would make a GPU wait
    gt = gt.long()
    cell = torch.where(gt < num_classes, gt * num_classes + pred.long(), void)
    return torch.bincount(cell.flatten(), minlength=void + 1)[:void].view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class (..., K) float64 of counts (..., K, K); NaN where a class neither occurs nor is predicted."""
    counts = confusion.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)


def miou(confusion: Tensor) -> float:
    """Mean of `iou` over the classes that have one, background included."""
    return iou(confusion).nanmean().item()


def heads(quartet: Quartet, config: TrainConfig, device: torch.device) -> Forward:
    """Windows to the scores of each of `HEADS`, (N, 3, K, crop, crop) float32 on `device`; the branches' are logits."""
    weight = config.ensemble_weight

    def forward(windows: Tensor) -> Tensor:
        windows = windows.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = torch.stack([quartet.branch1(windows), quartet.branch2(windows)], dim=1).float()
        parts = logits.softmax(dim=2) if config.ensemble == "prob" else logits
        mean = weight * parts[:, :1] + (1 - weight) * parts[:, 1:]
        return torch.cat([logits, mean], dim=1)

    return forward


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Within, the networks are in eval mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _parted(pairs: Iterable[tuple[Pixels, Pixels]], labels: deque[Pixels]) -> Iterator[Pixels]:
    """The images; their labels are queued in `labels` until the scores come out."""
    for image, label in pairs:
        labels.append(label)
        yield image


@dataclass(frozen=True)
class _WindowGrid:
    """Where the windows of one image lie on its padded canvas, and where the image does."""

    canvas: tuple[int, int]
    size: tuple[int, int]
    crop: int
    corners: list[tuple[int, int]]

    def assemble(self, first: Tensor, rest: Iterable[Tensor]) -> Tensor:
        """Sum of the windows' scores (..., crop, crop), cut back to the image: (..., H, W)."""
        total = first.new_zeros(*first.shape[:-2], *self.canvas)
        for (top, left), score in zip(self.corners, (first, *rest), strict=True):
            total[..., top : top + self.crop, left : left + self.crop] += score
        height, width = self.size
        top, left = (self.canvas[0] - height) // 2, (self.canvas[1] - width) // 2
        return total[..., top : top + height, left : left + width]


def _windows(images: Iterable[Pixels], layouts: deque[_WindowGrid], crop: int, stride: int) -> Iterator[NDArray[np.float32]]:
    """Windows (3, crop, crop) of all images in turn; the layout of each image is queued before its first window."""
    for image in images:
        canvas = _canvas(image, crop)
        height, width = canvas.shape[1:]
        corners = list(product(window_starts(height, crop, stride), window_starts(width, crop, stride)))
        layouts.append(_WindowGrid((height, width), (image.shape[0], image.shape[1]), crop, corners))
        for top, left in corners:
            yield canvas[:, top : top + crop, left : left + crop]


def _canvas(image: Pixels, crop: int) -> NDArray[np.float32]:
    """The image, normalised, on at least crop x crop: padded with the mean colour if it fits into one window, else with black."""
    if max(image.shape[:2]) <= crop:
        return pad(normalise(image), crop, crop, value=0)
    return pad(normalise(image), crop, crop, value=normalise(np.zeros((1, 1, 3), np.uint8)))


def _chunks(windows: Iterator[NDArray[np.float32]], size: int) -> Iterator[list[NDArray[np.float32]]]:
    while chunk := list(islice(windows, size)):
        yield chunk
