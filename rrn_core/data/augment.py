"""Weak augmentation as in the released code: mirror, resize, crop and normalise."""

from __future__ import annotations

from typing import TypedDict, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from rrn_core.config import TrainConfig
from rrn_core.data.batch import IMAGENET_MEAN, IMAGENET_STD
from rrn_core.data.images import Pixels
from rrn_core.data.labels import VOID

T = TypeVar("T", bound=np.generic)

_NORMALISED = ((np.arange(256)[:, None] / 255.0 - IMAGENET_MEAN) / np.array(IMAGENET_STD)).astype(np.float32)
"""Normalised value of every pixel value and channel, (256, 3)."""


class Decisions(TypedDict):
    """The random decisions about one image."""

    flip: bool
    """Whether to mirror it."""
    scale: float
    """Factor to resize it by."""
    start: tuple[int, int]
    """Top and left of the crop in the resized image."""


def augment(
    image: Pixels, label: Pixels, *, flip: bool, scale: float, start: tuple[int, int], crop: int
) -> tuple[NDArray[np.float32], Pixels]:
    """Mirror, resize, crop at `start` and normalise one image. If the crop is larger than the image, both sides are padded equally.

    Args:
        image: RGB (H, W, 3).
        label: (H, W).

    Returns:
        The normalised image (3, crop, crop), padded with 0, which is the mean colour; the label (crop, crop), padded with 255.
    """
    if flip:
        image, label = image[:, ::-1], label[:, ::-1]
    size = _resized(label.shape, scale)
    part = _crop(_resize(image, size, cv2.INTER_LINEAR), start, crop)
    part_label = _crop(_resize(label, size, cv2.INTER_NEAREST), start, crop)
    # normalising after the crop gives the same numbers for fewer pixels
    return pad(normalise(part), crop, crop, value=0), pad(part_label, crop, crop, value=VOID)


def draw(generator: np.random.Generator, shape: tuple[int, ...], config: TrainConfig) -> Decisions:
    """Draw the decisions about an image of `shape` (H, W).

    The last possible start is one pixel past the end, as in the released code; such a crop is padded by one pixel.
    """
    flip = bool(generator.random() < config.hflip)
    scale = config.scales[generator.integers(len(config.scales))]
    top, left = (int(generator.integers(side - config.crop + 2)) if side > config.crop else 0 for side in _resized(shape, scale))
    return Decisions(flip=flip, scale=scale, start=(top, left))


def size_fault(shape: tuple[int, ...], config: TrainConfig) -> str:
    """Why an image of `shape` (H, W) is too small for the smallest scale; empty if it is not."""
    smallest = min(config.scales)
    if min(_resized(shape, smallest)) > 0:
        return ""
    return (
        f"{shape[1]} x {shape[0]} pixels are less than one after scaling by {smallest:g}; remove the image, or raise the smallest of scales"
    )


def normalise(image: Pixels) -> NDArray[np.float32]:
    """RGB uint8 (H, W, 3) to float32 (3, H, W), normalised by ImageNet's mean and standard deviation."""
    return np.stack([_NORMALISED[:, c][image[..., c]] for c in range(3)])


def pad(array: NDArray[T], height: int, width: int, *, value: float | NDArray[T]) -> NDArray[T]:
    """Centre (..., h, w) on a canvas (..., max(h, height), max(w, width)) filled with `value`. An odd pixel of padding goes to the end.

    `value` may be an array that broadcasts to the canvas.
    """
    h, w = array.shape[-2:]
    down, right = max(height - h, 0), max(width - w, 0)
    if not (down or right):
        return array
    canvas = np.full((*array.shape[:-2], h + down, w + right), value, array.dtype)
    canvas[..., down // 2 : down // 2 + h, right // 2 : right // 2 + w] = array
    return canvas


def _resized(shape: tuple[int, ...], scale: float) -> tuple[int, int]:
    return int(shape[0] * scale), int(shape[1] * scale)


def _resize(array: Pixels, size: tuple[int, int], interpolation: int) -> Pixels:
    if array.shape[:2] == size:
        return array
    return np.asarray(cv2.resize(np.ascontiguousarray(array), size[::-1], interpolation=interpolation), np.uint8)


def _crop(array: Pixels, start: tuple[int, int], crop: int) -> Pixels:
    top, left = start
    return array[top : top + crop, left : left + crop]
