"""Lays panels out in one picture: a row for each image, a column for each kind of panel, names around them and a key of colours below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rrn_core.data.images import Pixels
from rrn_core.data.labels import VOID, Colour

PANEL = 256
"""Maximum of a panel's longer side in pixels."""
RIGHT, WRONG, UNKNOWN = (204, 204, 204), (213, 94, 0), (0, 0, 0)
"""Colours of correct, wrong and void pixels of a prediction: grey, vermilion and black, which colour-blind people can tell apart."""
BLANK = (224, 224, 192)
"""Colour of void in a label map, as in PASCAL VOC."""
OUTLINE = (255, 255, 255)
"""Colour of the outline of selected regions."""

_GAP, _TEXT, _SWATCH = 6, 14, 12
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class GridRow:
    """The panels of one image, all of one size (H, W, 3)."""

    name: str
    panels: tuple[Pixels, ...]
    captions: Mapping[int, str] = field(default_factory=dict)
    """Text in the lower left corner of a panel, by column."""


Key = Sequence[tuple[str, Pixels]]
"""Explanations and their patches of colour."""


def sheet(rows: Sequence[GridRow], columns: Sequence[str], keys: Sequence[Key]) -> Pixels:
    """One picture (H, W, 3): the names of the columns above, the rows with their names at the left, and the keys below.

    Each key begins on a new line.
    """
    font = ImageFont.load_default(size=_TEXT)
    width = max(panel.shape[1] for row in rows for panel in row.panels) + _GAP
    left, top = _TEXT + 3 * _GAP, _TEXT + 3 * _GAP
    total = left + width * len(columns)
    lines = [line for key in keys for line in _wrapped(key, font, total - left)]
    bottoms = np.cumsum([top, *(row.panels[0].shape[0] + _GAP for row in rows)]).tolist()
    canvas = Image.new("RGB", (total, bottoms[-1] + (_TEXT + _GAP) * len(lines) + _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(columns):
        draw.text((left + width * i, _GAP), _shortened(name, font, width - _GAP), _INK, font)
    for row, y in zip(rows, bottoms, strict=False):
        canvas.paste(_upright(row.name, font, row.panels[0].shape[0]), (_GAP, y))
        for i, panel in enumerate(row.panels):
            canvas.paste(Image.fromarray(panel), (left + width * i, y))
        for i, caption in row.captions.items():
            _note(draw, caption, font, (left + width * i, y + row.panels[i].shape[0]))
    for i, line in enumerate(lines):
        _write(canvas, line, font, (left, bottoms[-1] + _GAP + (_TEXT + _GAP) * i))
    return np.asarray(canvas)


def fitted(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the panel for an image of `size` (H, W): no side exceeds `PANEL`; small images are enlarged by an integer."""
    longest = max(size)
    if longest <= PANEL:
        return size[0] * (PANEL // longest), size[1] * (PANEL // longest)
    return max(1, round(size[0] * PANEL / longest)), max(1, round(size[1] * PANEL / longest))


def photograph(image: Pixels) -> Pixels:
    """The panel of an RGB image (H, W, 3), resized as `fitted` says."""
    height, width = fitted(image.shape[:2])
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_NEAREST_EXACT
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.uint8)


def coloured(labels: NDArray[np.integer], palette: Sequence[Colour]) -> Pixels:
    """The panel of a label map (H, W) in the colours of `palette`, resized as `fitted` says."""
    colours = np.full((VOID + 1, 3), BLANK, np.uint8)
    colours[: len(palette)] = palette
    return colours[_nearest(labels.astype(np.uint8))]


def errors(predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> Pixels:
    """The panel that shows which predicted labels (H, W) are correct, wrong, or void in the ground truth."""
    kind = np.where(truth == VOID, 2, predicted != truth).astype(np.uint8)
    return np.array([RIGHT, WRONG, UNKNOWN], np.uint8)[_nearest(kind)]


def heat(shares: NDArray[np.floating], selected: NDArray[np.bool_] | None = None) -> Pixels:
    """The panel of a map (H, W) of values in 0..1, from dark blue to yellow. `selected`, (H, W), is outlined.

    Colour-blind people can tell these colours apart.
    """
    height, width = fitted((shares.shape[0], shares.shape[1]))
    interpolation = cv2.INTER_AREA if height < shares.shape[0] else cv2.INTER_LINEAR
    grey = cv2.resize(shares.astype(np.float32), (width, height), interpolation=interpolation)
    levels = (255 * np.asarray(grey).clip(0, 1)).round().astype(np.uint8)
    panel = np.array(cv2.applyColorMap(levels, cv2.COLORMAP_CIVIDIS)[..., ::-1], np.uint8)
    if selected is not None:
        inside = cv2.copyMakeBorder(_nearest(selected.astype(np.uint8)), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
        edge = (inside - cv2.erode(inside, np.ones((3, 3), np.uint8)))[1:-1, 1:-1]
        panel[edge.astype(bool)] = OUTLINE
    return panel


def swatch(colour: Colour) -> Pixels:
    """A patch of one colour for a key."""
    return np.full((_SWATCH, _SWATCH, 3), colour, np.uint8)


def heat_swatches() -> tuple[Pixels, Pixels]:
    """Patches for a key: the colours of `heat` from 0 to 1, and the outline."""
    ramp = heat(np.tile(np.linspace(0, 1, PANEL, dtype=np.float32), (_SWATCH, 1)))
    outlined = swatch((0, 0, 0))
    outlined[2:-2, 2:-2] = OUTLINE
    outlined[4:-4, 4:-4] = ramp[0, PANEL // 4]
    return np.ascontiguousarray(ramp[:, ::2]), outlined


def _nearest(labels: Pixels) -> Pixels:
    height, width = fitted((labels.shape[0], labels.shape[1]))
    return np.asarray(cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def _wrapped(key: Key, font: _Font, width: int) -> Iterator[list[tuple[str, Pixels]]]:
    """The entries of a key by line, each line as long as fits `width`."""
    line, used = list[tuple[str, Pixels]](), 0
    for text, patch in key:
        needed = _extent(text, patch, font)
        if line and used + needed > width:
            yield line
            line, used = [], 0
        line.append((text, patch))
        used += needed
    if line:
        yield line


def _extent(text: str, patch: Pixels, font: _Font) -> int:
    return int(patch.shape[1] + _GAP + font.getlength(text) + 2 * _GAP)


def _write(canvas: Image.Image, line: Sequence[tuple[str, Pixels]], font: _Font, corner: tuple[int, int]) -> None:
    """Draw a line of a key; its upper left is `corner`."""
    draw, (x, y) = ImageDraw.Draw(canvas), corner
    for text, patch in line:
        canvas.paste(Image.fromarray(patch), (x, y + 2))
        draw.rectangle((x, y + 2, x + patch.shape[1] - 1, y + 1 + patch.shape[0]), outline=_INK)
        draw.text((x + patch.shape[1] + _GAP, y), text, _INK, font)
        x += _extent(text, patch, font)


def _note(draw: ImageDraw.ImageDraw, text: str, font: _Font, corner: tuple[int, int]) -> None:
    """Draw the text in a box; its lower left is `corner`."""
    x, bottom = corner
    draw.rectangle((x, bottom - _TEXT - _GAP, x + font.getlength(text) + 2 * _GAP, bottom - 1), fill=_PAPER)
    draw.text((x + _GAP, bottom - _TEXT - _GAP), text, _INK, font)


def _upright(text: str, font: _Font, length: int) -> Image.Image:
    """The text, turned to be read from bottom to top."""
    strip = Image.new("RGB", (length, _TEXT + _GAP), _PAPER)
    ImageDraw.Draw(strip).text((0, 0), _shortened(text, font, length), _INK, font)
    return strip.transpose(Image.Transpose.ROTATE_90)


def _shortened(text: str, font: _Font, width: int) -> str:
    """The text, or its end if it is too long. Names of images differ at the end."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"
