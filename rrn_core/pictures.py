"""Pictures of a run: validation images with the branches' predictions and the regions that the discriminators select."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrn_core.config import TrainConfig
from rrn_core.data.dataset import Images, Pixels
from rrn_core.data.labels import VOID, Colour
from rrn_core.evaluate import HEADS, Forward, evaluating, heads, reported_head, slide_all
from rrn_core.losses import hard_labels
from rrn_core.methods import method_of
from rrn_core.methods.base import RegionMaps
from rrn_core.networks.quartet import Quartet
from rrn_core.picture_grid import RIGHT, UNKNOWN, WRONG, GridRow, Key, coloured, errors, heat, heat_swatches, photograph, sheet, swatch

_NAMES = {"branch1": "branch 1", "branch2": "branch 2", "ensemble": "ensemble"}


def panels(
    quartet: Quartet,
    images: Images,
    palette: Sequence[Colour],
    classes: Sequence[str],
    config: TrainConfig,
    device: torch.device,
    *,
    indices: Sequence[int],
) -> Pixels:
    """One picture (H, W, 3) with a row for each image of `indices`: image, truth, branch 1, branch 2, ensemble, D1, D2, errors.

    The columns D1 and D2 show the region maps of `views` with the selected regions outlined. Methods without discriminators have no such
    columns. The errors are those of the `reported_head`. Modes, statistics, gradients and random states do not change.
    """
    pairs = [images[i] for i in indices]
    predictions = views(quartet, [image for image, _ in pairs], config, device)
    rows = [_row(images.names[i], *pair, maps, palette, config) for i, pair, maps in zip(indices, pairs, predictions, strict=True)]
    region_maps = _region_maps(quartet, config)
    regions = ["region map of D1", "region map of D2"] if region_maps else []
    columns = ["image", "truth", *_NAMES.values(), *regions, f"errors of {_NAMES[reported_head(config)]}"]
    class_key = [(name, swatch(colour)) for name, colour in zip(classes, palette, strict=True)]
    return sheet(rows, columns, [_key(region_maps.legend(config) if region_maps else None), class_key])


def spread(count: int, total: int) -> list[int]:
    """`count` indices, at most `total`, spread evenly over 0..total - 1."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class PredictionMaps:
    """Predictions and region maps of one image."""

    labels: NDArray[np.uint8]
    """Predicted classes (3, H, W), one map for each of `HEADS`."""
    rc: NDArray[np.float32]
    """Region maps by D1 of branch 1 and by D2 of branch 2, (2, H, W) in 0..1; (0, H, W) without discriminators."""
    selected: NDArray[np.bool_]
    """Pixels that the region loss learns from, in the shape of `rc`."""


def views(quartet: Quartet, images: Iterable[Pixels], config: TrainConfig, device: torch.device) -> list[PredictionMaps]:
    """Predictions and region maps of every RGB image (H, W, 3), by networks in eval mode and the windows of the evaluation.

    A window has the size of a training crop. So a discriminator has the same input as in training: a crop, the softmax over the logits of
    its own branch, and pixels scaled by `discriminator_scaling`; the batch is that of one forward pass. Its map is up-sampled by
    `region_upsample`. Where windows overlap, `rc` is their mean, and `selected` holds the pixels that at least half of them select.
    """
    discriminators = quartet.discriminators() if quartet.D1 else ()
    with evaluating(quartet.branch1, quartet.branch2, *discriminators), torch.inference_mode():
        maps = slide_all(images, _all_maps(quartet, config, device), crop=config.crop, batch=config.eval_batch)
        return [_prediction_maps(of_image, len(discriminators)) for of_image in maps]


def _region_maps(quartet: Quartet, config: TrainConfig) -> RegionMaps | None:
    return method_of(config.method).REGION_MAPS if quartet.D1 else None


def _prediction_maps(maps: Tensor, discriminators: int) -> PredictionMaps:
    """From the result of `_all_maps` for a whole image, summed over windows."""
    scores, windows, regions = torch.split(maps, [len(maps) - 1 - 2 * discriminators, 1, 2 * discriminators])
    labels = hard_labels(torch.stack(scores.chunk(len(HEADS)))).to(torch.uint8)
    means = (regions / windows).cpu().numpy()
    return PredictionMaps(labels.cpu().numpy(), means[0::2], means[1::2] >= 1 / 2)


def _all_maps(quartet: Quartet, config: TrainConfig, device: torch.device) -> Forward:
    """Windows to (N, 3 K + 1 + 4, crop, crop): the scores of all heads, a 1 that counts the windows of a pixel, and the region maps."""
    head_scores, region_maps = heads(quartet, config, device), _region_maps(quartet, config)

    def forward(windows: Tensor) -> Tensor:
        windows = windows.to(device)
        scores = head_scores(windows)
        regions = [region_maps.of(quartet, windows, scores[:, :2], config)] if region_maps else []
        return torch.cat([scores.flatten(1, 2), torch.ones_like(windows[:, :1]), *regions], dim=1)

    return forward


def _row(name: str, image: Pixels, truth: Pixels, maps: PredictionMaps, palette: Sequence[Colour], config: TrainConfig) -> GridRow:
    reported = maps.labels[HEADS.index(reported_head(config))]
    before = [photograph(image), *(coloured(labels, palette) for labels in (truth, *maps.labels))]
    regions = [heat(rc, selected) for rc, selected in zip(maps.rc, maps.selected, strict=True)]
    captions = {len(before) + i: f"{rc.min():.2f} .. {rc.max():.2f}" for i, rc in enumerate(maps.rc)}
    if known := int((truth != VOID).sum()):
        captions[len(before) + len(regions)] = f"{100 * int((reported == truth).sum()) / known:.1f} % correct"
    return GridRow(name, (*before, *regions, errors(reported, truth)), captions)


def _key(selected: str | None) -> Key:
    ramp, outlined = heat_swatches()
    regions = [("region map from 0 to 1", ramp), (f"outlined: {selected}", outlined)] if selected else []
    return [*regions, ("correct", swatch(RIGHT)), ("wrong", swatch(WRONG)), ("void", swatch(UNKNOWN))]
