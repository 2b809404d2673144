"""CutMix masks of XOR-ed boxes (French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC 2020)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def box_masks(
    generator: np.random.Generator | np.random.RandomState, count: int, height: int, width: int, *, boxes: int, area: tuple[float, float]
) -> NDArray[np.float32]:
    """Random masks (count, 1, height, width) of 0 and 1. Where a mask is 1, the mix has the pixel of the second image.

    Boxes lie within the image and have a random aspect ratio. They are XOR-ed: where two boxes overlap, the mask is 0.

    Args:
        count: number of masks.
        boxes: number of boxes in each mask.
        area: range from which a share of the image is drawn for each box; the box covers 1/boxes of its share.
    """
    masks = np.zeros((count, 1, height, width), np.float32)
    corners = _boxes(generator, (count, boxes), np.array((height, width)), area)
    for mask, rectangles in zip(masks[:, 0], corners, strict=True):
        for top, left, bottom, right in rectangles:
            mask[top:bottom, left:right] = 1 - mask[top:bottom, left:right]
    return masks


def _boxes(
    generator: np.random.Generator | np.random.RandomState, shape: tuple[int, int], size: NDArray[np.int_], area: tuple[float, float]
) -> NDArray[np.int_]:
    """Corners (count, boxes, 4) as top, left, bottom, right. The order of the draws is that of the released code."""
    share = generator.uniform(area[0], area[1], shape)
    # heights are log-uniform between `share` (full width) and 1 (full height); the guard keeps an empty box empty
    tall = np.maximum(share, np.finfo(float).tiny) ** generator.uniform(0.0, 1.0, shape)
    sides = np.stack([tall, share / tall], axis=2) / np.sqrt(shape[1])
    extent = np.round(sides * size)
    start = np.round((size - extent) * generator.uniform(0.0, 1.0, extent.shape))
    return np.concatenate([start, start + extent], axis=2).astype(int)
