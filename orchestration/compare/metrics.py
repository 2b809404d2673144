"""Metrics in words: which are shares, for which higher is better, and on which images they are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from orchestration.record.manifest import EpochMetrics

NONE = "-"
"""Text of a value that does not exist."""
PLUS_MINUS = "+-"
"""Of plain text; the other formats have a sign for it."""
_SHARES = ("val/miou", "val/iou", "train/pseudo_accuracy", "train/selected", "train/d1_", "train/d2_")
"""Prefixes of metrics that lie in 0..1 and are shown in percent; all others are shown as they are stored."""
_LOWER_IS_BETTER = ("train/loss", "perf/train_s", "perf/eval_s", "perf/peak_memory_mb", "system/")
_PERCENTAGE = "_percentage"
"""Suffix of metrics that are stored in percent."""


def scale(metric: str) -> tuple[float, str]:
    """Factor from a stored value to the shown one, and its unit."""
    if metric.startswith(_SHARES):
        return 100.0, "%"
    return 1.0, "%" if metric.endswith(_PERCENTAGE) else ""


def higher_is_better(metric: str) -> bool:
    """Whether a higher value counts as better; also true of metrics that are neither good nor bad, such as a learning rate."""
    return not metric.startswith(_LOWER_IS_BETTER)


def metric_name(metric: str) -> str:
    """`mIoU`, `mIoU of branch 1`, `IoU of car (ensemble)`; else the metric's own name."""
    if metric in ("val/miou", "val/miou_ensemble"):
        return "mIoU" if metric == "val/miou" else "mIoU of the ensemble"
    if metric.startswith("val/miou_branch"):
        return f"mIoU of branch {metric.removeprefix('val/miou_branch')}"
    if metric.startswith("val/iou_"):
        head, _, name = metric.removeprefix("val/iou_").partition("/")
        return f"IoU of {name} ({head})"
    return metric


def axis_title(metric: str) -> str:
    """`mIoU (%)`."""
    unit = scale(metric)[1]
    return f"{metric_name(metric)} ({unit})" if unit else metric_name(metric)


def shown_value(entry: EpochMetrics | None, metric: str) -> float | None:
    """A metric of an epoch as it is shown: in percent where it is a share; None where the epoch does not have it."""
    return scale(metric)[0] * entry.metrics[metric] if entry and metric in entry.metrics else None


def number(value: float | None, metric: str) -> str:
    """`71.20`, without the unit."""
    if value is None:
        return NONE
    return f"{value:.2f}" if scale(metric)[1] else f"{value:.4g}"


def signed(difference: float | None, metric: str) -> str:
    """`+0.42`."""
    if difference is None:
        return NONE
    return f"{difference:+.2f}" if scale(metric)[1] else f"{difference:+.3g}"


def mean_and_sd(values: Sequence[float], metric: str) -> str:
    """`71.20 +- 0.31`."""
    spread = f" {PLUS_MINUS} {number(stdev(values), metric)}" if len(values) > 1 else ""
    return f"{number(mean(values), metric)}{spread}" if values else NONE


def measured_on(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each split: `measured on the validation list of voc of 1449 images, labelled images by partition_by: every_kth`."""
    configs = list(configs)
    lines = dict.fromkeys(map(_measured_on, configs))
    drawn = dict.fromkeys(filter(None, map(_split, configs)))
    return [*lines, *([f"lists: {'; '.join(drawn)}"] if drawn else [])]


def _measured_on(config: Mapping[str, Any]) -> str:
    split, by = config.get("split"), config["partition_by"]
    count = split["val"] if split else config["val_images"] if config["dataset"] == "digits" else None
    images = f" of {count} images" if count else ""
    drawn = f" {config['partition_seed']}" if by in ("seeded", "balanced") else ""
    return f"measured on the validation list of {config['dataset']}{images}, labelled images by partition_by: {by}{drawn}"


def _split(config: Mapping[str, Any]) -> str | None:
    """`1/8 with 1323 labelled, 9259 unlabelled images, sha256 0f3a...`."""
    if not (split := config.get("split")):
        return None
    return f"{config['partition']} with {split['labeled']} labelled, {split['unlabeled']} unlabelled images, sha256 {split['sha256'][:12]}"
