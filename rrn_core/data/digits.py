"""The embedded data: scenes of scikit-learn's handwritten digits on cluttered colour backgrounds, computed on access."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from rrn_core.data.images import Pixels
from rrn_core.data.labels import VOID

Canvas = NDArray[np.float32]
"""Values in 0..1."""

CLASSES = ("background", *(f"digit_{n}" for n in range(10)))

Split = Literal["train", "val"]

_SPLIT_SEEDS = {"train": 1, "val": 2}
_VAL_EVERY = 5
"""Every fifth handwritten digit occurs in validation scenes only."""
_UNIT_SIDE = 64
"""Lengths in this file are pixels of a scene with this side. They scale with the scene."""


class Digits:
    """Scenes of one split: RGB (side, side, 3) and labels (side, side), which are 0..10 and 255.

    Scene `i` is a function of (split, i, image_size). It has 3 or 4 coloured digits with a side of 22 to 34 px (of 64), slightly rotated
    and overlapping, among strokes and blobs. Label 1 + n is digit n. A contour about 1 px wide around every digit is void. The 1797 scans
    of 8 x 8 px (Alpaydin and Kaynak, UCI) are real handwriting. No scan is in both `train` and `val`.
    """

    def __init__(self, split: Split, images: int, image_size: int) -> None:
        self.names = tuple(f"{split}_{i:05d}" for i in range(images))
        self._seed = _SPLIT_SEEDS[split]
        self._side = image_size
        self._glyphs = _glyphs(split)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return _scene(np.random.default_rng([self._seed, index]), self._side, self._glyphs)


def _glyphs(split: Split) -> tuple[list[Canvas], list[int]]:
    """The scans of a split, (8, 8) with ink in 0..1, and the digit that each one shows."""
    data = load_digits()
    chosen = (np.arange(len(data.target)) % _VAL_EVERY == 0) == (split == "val")
    return list((data.images[chosen] / 16).astype(np.float32)), data.target[chosen].tolist()


def _scene(generator: np.random.Generator, side: int, glyphs: tuple[list[Canvas], list[int]]) -> tuple[Pixels, Pixels]:
    scans, digits = glyphs
    canvas = _background(generator, side)
    label = np.zeros((side, side), np.uint8)
    for centre in _centres(generator, side, int(generator.integers(3, 5))):
        which = int(generator.integers(len(scans)))
        ink = _placed(generator, scans[which], centre, side)
        # always brighter than the background, so that recognising the digit is harder than finding it
        colour = _colour(generator, generator.uniform(0.7, 0.95))
        canvas += ink[..., None] * (colour - canvas)
        _write_label(label, ink > 0.5, 1 + digits[which])
    canvas += generator.standard_normal(canvas.shape, np.float32) * np.float32(0.02)
    return np.clip(canvas * 255, 0, 255).astype(np.uint8), label


def _background(generator: np.random.Generator, side: int) -> Canvas:
    """Two octaves of smooth colour noise, then blobs and thin strokes; (side, side, 3) in 0..1."""
    base = _colour(generator, generator.uniform(0.15, 0.35), saturation=0.3)
    canvas = np.full((side, side, 3), base, np.float32)
    for cells, strength in ((3, 0.08), (9, 0.05)):
        noise = generator.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
        canvas += cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    for _ in range(generator.integers(2, 5)):
        _blob(generator, canvas, base)
    for _ in range(generator.integers(2, 6)):
        _stroke(generator, canvas)
    return canvas


def _blob(generator: np.random.Generator, canvas: Canvas, base: Canvas) -> None:
    """Draw a filled ellipse of about the colour `base`."""
    unit = len(canvas) / _UNIT_SIDE
    centre = tuple(generator.integers(0, len(canvas), 2).tolist())
    axes = tuple(int(r * unit) for r in generator.uniform(3, 11, 2))
    colour = base + generator.uniform(-0.15, 0.15, 3)
    cv2.ellipse(canvas, centre, axes, generator.uniform(0, 180), 0, 360, colour.tolist(), cv2.FILLED)


def _stroke(generator: np.random.Generator, canvas: Canvas) -> None:
    """Draw an arc of any brightness that is thinner than the lines of a digit."""
    unit = len(canvas) / _UNIT_SIDE
    centre = tuple(generator.integers(0, len(canvas), 2).tolist())
    axes = tuple(int(r * unit) for r in generator.uniform(4, 24, 2))
    begin, span = generator.uniform(0, 360), generator.uniform(30, 120)
    colour = _colour(generator, generator.uniform(0.1, 0.9))
    cv2.ellipse(canvas, centre, axes, generator.uniform(0, 180), begin, begin + span, colour.tolist(), max(1, round(unit)))


def _colour(generator: np.random.Generator, brightness: float, *, saturation: float = 0.35) -> Canvas:
    """A random colour (3,) in 0..1 with the mean `brightness`."""
    tint = generator.uniform(-0.5, 0.5, 3)
    colour: Canvas = np.clip(brightness + saturation * (tint - tint.mean()), 0, 1).astype(np.float32)
    return colour


def _centres(generator: np.random.Generator, side: int, count: int) -> list[NDArray[np.float64]]:
    """Centres (x, y) of digits. Each is the candidate of four that is farthest from the earlier ones, so that digits overlap little."""
    margin = 10 / _UNIT_SIDE
    chosen = [generator.uniform(margin, 1 - margin, 2) * side]
    while len(chosen) < count:
        candidates = generator.uniform(margin, 1 - margin, (4, 2)) * side
        distances = [min(float(np.hypot(*(c - o))) for o in chosen) for c in candidates]
        chosen.append(candidates[int(np.argmax(distances))])
    return chosen


def _placed(generator: np.random.Generator, scan: Canvas, centre: NDArray[np.float64], side: int) -> Canvas:
    """Opacity (side, side) in 0..1 of a scan that is enlarged smoothly, rotated, sheared and moved to `centre`."""
    scale = generator.uniform(22, 34) / 8 * side / _UNIT_SIDE
    angle, shear = np.radians(generator.uniform(-5, 5)), generator.uniform(-0.05, 0.05)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array([[1, shear], [0, 1]]) * scale
    move = centre - turn @ np.array([3.5, 3.5])
    ink = cv2.warpAffine(scan, np.column_stack([turn, move]), (side, side), flags=cv2.INTER_CUBIC)
    # raises the contrast around the ink level at the edge of a line; the level is low enough to keep faint lines
    opacity: Canvas = np.clip((ink - 0.4) * 3 + 0.5, 0, 1)
    return opacity


def _write_label(label: Pixels, shape: NDArray[np.bool_], value: int) -> None:
    """Write a digit of the given shape into the label, and void around it."""
    reach = 2 * max(1, round(len(label) / _UNIT_SIDE)) + 1
    grown = cv2.dilate(shape.astype(np.uint8), np.ones((reach, reach), np.uint8))
    label[grown > 0] = VOID
    label[shape] = value
