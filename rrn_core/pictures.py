"""What a run looks like: validation images beside what the branches make of them, and the regions that the discriminators trust."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrn_core.config import TrainConfig
from rrn_core.data.dataset import Images, Pixels
from rrn_core.data.files import VOID, Colour
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
    """One picture (H, W, 3) of the images at `indices`, a row each: image, truth, branch 1, branch 2, ensemble, D1, D2, errors.

    D1 and D2 stand for the region maps of `views`, with what each selects outlined; methods without discriminators lack them. Errors
    are those of the `reported_head`. Nothing is changed: no mode, statistic, gradient or random state.
    """
    pairs = [images[i] for i in indices]
    seen = views(quartet, [image for image, _ in pairs], config, device)
    rows = [_row(images.names[i], *pair, view, palette, config) for i, pair, view in zip(indices, pairs, seen, strict=True)]
    shown = _region_maps(quartet, config)
    regions = ["region map of D1", "region map of D2"] if shown else []
    columns = ["image", "truth", *_NAMES.values(), *regions, f"errors of {_NAMES[reported_head(config)]}"]
    named = [(name, swatch(colour)) for name, colour in zip(classes, palette, strict=True)]
    return sheet(rows, columns, [_key(shown.legend(config) if shown else None), named])


def spread(count: int, total: int) -> list[int]:
    """`count` indices, or `total` where that is less, evenly spread over 0..total - 1."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class PredictionMaps:
    """What the networks say of one image."""

    labels: NDArray[np.uint8]
    """Predicted classes (3, H, W), one map for each of `HEADS`."""
    rc: NDArray[np.float32]
    """Region maps of D1 and D2, each of its own branch's prediction, (2, H, W) in 0..1; (0, H, W) where there are no discriminators."""
    selected: NDArray[np.bool_]
    """Where `eps` lets the region loss learn, shaped like `rc`."""


def views(quartet: Quartet, images: Iterable[Pixels], config: TrainConfig, device: torch.device) -> list[PredictionMaps]:
    """What the networks, in eval mode, say of every RGB image (H, W, 3); by the windows of the evaluation, which are of training's size.

    So a discriminator sees what it sees in training: a crop, the softmax over its own branch's logits of it, and pixels scaled as
    `discriminator_scaling` says, where the batch is that of the windows of one forward pass. Its map is brought to pixels as
    `region_upsample` says. Where windows overlap, `rc` is their mean, and `selected` what most of them select.
    """
    judges = quartet.discriminators() if quartet.D1 else ()
    with evaluating(quartet.branch1, quartet.branch2, *judges), torch.inference_mode():
        maps = slide_all(images, _judged(quartet, config, device), crop=config.crop, batch=config.eval_batch)
        return [_view(of_image, len(judges)) for of_image in maps]


def _region_maps(quartet: Quartet, config: TrainConfig) -> RegionMaps | None:
    return method_of(config.method).REGION_MAPS if quartet.D1 else None


def _view(maps: Tensor, judges: int) -> PredictionMaps:
    """What `_judged` says of a whole image, summed over windows."""
    scores, windows, regions = torch.split(maps, [len(maps) - 1 - 2 * judges, 1, 2 * judges])
    labels = hard_labels(torch.stack(scores.chunk(len(HEADS)))).to(torch.uint8)
    means = (regions / windows).cpu().numpy()
    return PredictionMaps(labels.cpu().numpy(), means[0::2], means[1::2] >= 1 / 2)


def _judged(quartet: Quartet, config: TrainConfig, device: torch.device) -> Forward:
    """Windows to the scores of all heads, a one, which counts the windows of a pixel, and the region maps: (N, 3 K + 1 + 4, crop, crop)."""
    see, shown = heads(quartet, config, device), _region_maps(quartet, config)

    def forward(windows: Tensor) -> Tensor:
        windows = windows.to(device)
        scores = see(windows)
        regions = [shown.of(quartet, windows, scores[:, :2], config)] if shown else []
        return torch.cat([scores.flatten(1, 2), torch.ones_like(windows[:, :1]), *regions], dim=1)

    return forward


def _row(name: str, image: Pixels, truth: Pixels, view: PredictionMaps, palette: Sequence[Colour], config: TrainConfig) -> GridRow:
    reported = view.labels[HEADS.index(reported_head(config))]
    before = [photograph(image), *(coloured(labels, palette) for labels in (truth, *view.labels))]
    regions = [heat(rc, selected) for rc, selected in zip(view.rc, view.selected, strict=True)]
    captions = {len(before) + i: f"{rc.min():.2f} .. {rc.max():.2f}" for i, rc in enumerate(view.rc)}
    if known := int((truth != VOID).sum()):
        captions[len(before) + len(regions)] = f"{100 * int((reported == truth).sum()) / known:.1f} % right"
    return GridRow(name, (*before, *regions, errors(reported, truth)), captions)


def _key(selected: str | None) -> Key:
    ramp, outlined = heat_swatches()
    judged = [("region map from 0 to 1", ramp), (f"outlined: {selected}", outlined)] if selected else []
    return [*judged, ("right", swatch(RIGHT)), ("wrong", swatch(WRONG)), ("void", swatch(UNKNOWN))]
