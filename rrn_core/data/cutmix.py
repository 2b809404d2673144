"""CutMix masks: boxes XOR-ed together, after French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations"."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def box_masks(
    generator: np.random.Generator | np.random.RandomState, count: int, height: int, width: int, *, boxes: int, area: tuple[float, float]
) -> NDArray[np.float32]:
    """Random masks (count, 1, height, width) of 0 and 1; 1 takes the pixel of the second image.

    Boxes lie within the image, have a random aspect ratio, and are XOR-ed: where two overlap, the mask is 0 again.

    Args:
        area: range of the share of the image that the boxes of one mask are drawn for; each box covers 1/boxes of its draw.
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
    """Corners (count, boxes, 4) as top, left, bottom, right. The order of the draws is that of the released generator."""
    share = generator.uniform(area[0], area[1], shape)
    # log-uniform between `share` (full width) and 1 (full height); an empty box stays empty
    tall = np.maximum(share, np.finfo(float).tiny) ** generator.uniform(0.0, 1.0, shape)
    sides = np.stack([tall, share / tall], axis=2) / np.sqrt(shape[1])
    extent = np.round(sides * size)
    start = np.round((size - extent) * generator.uniform(0.0, 1.0, extent.shape))
    return np.concatenate([start, start + extent], axis=2).astype(int)
