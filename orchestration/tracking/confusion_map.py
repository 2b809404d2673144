"""Draws a confusion matrix: truth down, prediction across, the percentage as a colour and, while there is room, as a number."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# matplotlib's colour scale at 0, 10, ... 100 percent: it stays in order for the colour-blind and in grey
_CODES = ("00224e", "0c3470", "35456c", "4f576c", "666970", "7d7c78", "948e77", "ada272", "c8b866", "e5cf52", "fee838")
_CIVIDIS = tuple(tuple(bytes.fromhex(code)) for code in _CODES)
_NUMBERED = 16  # classes up to which every cell has its number
_INK, _PAPER, _ABSENT = (40, 40, 40), (255, 255, 255), (225, 225, 225)
_TEXT, _GAP, _SCALE, _LONGEST_NAME = 14, 8, 16, 160  # pixels: height of text, space between parts, widths of the scale and of a name
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

Shares = Sequence[Sequence[float | None]]
"""A row for each true class: the percentages that were predicted as each class; None where the class does not occur."""


def confusion_map(classes: Sequence[str], shares: Shares, title: str) -> bytes:
    """A PNG. A line break in `title` starts a new line; the row of a class that does not occur is grey."""
    font = ImageFont.load_default(size=_TEXT)
    names = [_shortened(name, font) for name in classes]
    margin = math.ceil(max(font.getlength(name) for name in names))
    cell = max(40 if len(names) <= _NUMBERED else 28, min(80, 320 // len(names)))
    side, left, top = cell * len(names), margin + _TEXT + 3 * _GAP, (title.count("\n") + 2) * (_TEXT + _GAP)
    right = left + side + 2 * _GAP
    width = max(right + _SCALE + font.getlength(" 100"), *(_GAP + font.getlength(line) for line in title.splitlines()))
    canvas = Image.new("RGB", (math.ceil(width) + _GAP, top + side + margin + _TEXT + 3 * _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((_GAP, _GAP), title, _INK, font, spacing=_GAP - 3)
    canvas.paste(_upright("truth", font, side, _TEXT + _GAP, anchor="mm"), (_GAP, top))
    draw.text((left + side // 2, top + side + margin + 2 * _GAP), "prediction", _INK, font, anchor="ma")
    for i, (name, row) in enumerate(zip(names, shares, strict=True)):
        draw.text((left - _GAP, top + cell * i + cell // 2), name, _INK, font, anchor="rm")
        canvas.paste(_upright(name, font, margin, cell, anchor="rm"), (left + cell * i, top + side + _GAP))
        for j, share in enumerate(row):
            _draw_cell(draw, share, (left + cell * j, top + cell * i), cell, font if len(names) <= _NUMBERED else None)
    _draw_scale(draw, (right, top), side, font)
    body = io.BytesIO()
    canvas.save(body, "PNG")
    return body.getvalue()


def _shortened(name: str, font: _Font) -> str:
    shown = name
    while shown and font.getlength(shown) > _LONGEST_NAME:
        name = name[:-1]
        shown = f"{name}…"
    return shown


def _upright(text: str, font: _Font, length: int, height: int, *, anchor: str) -> Image.Image:
    """The text, read from below, centred in its strip or against its upper end."""
    strip = Image.new("RGB", (length, height), _PAPER)
    ImageDraw.Draw(strip).text((length if anchor == "rm" else length // 2, height // 2), text, _INK, font, anchor=anchor)
    return strip.transpose(Image.Transpose.ROTATE_90)


def _draw_cell(draw: ImageDraw.ImageDraw, share: float | None, corner: tuple[int, int], size: int, font: _Font | None) -> None:
    x, y = corner
    draw.rectangle((x, y, x + size - 2, y + size - 2), fill=_ABSENT if share is None else _colour(share))
    if share is not None and font:
        draw.text((x + size // 2, y + size // 2), f"{share:.0f}", (0, 0, 0) if share > 50 else _PAPER, font, anchor="mm")


def _draw_scale(draw: ImageDraw.ImageDraw, corner: tuple[int, int], height: int, font: _Font) -> None:
    x, y = corner
    for i in range(height):
        draw.line((x, y + i, x + _SCALE - 1, y + i), fill=_colour(100 - 100 * i / (height - 1)))
    for percent in (0, 25, 50, 75, 100):
        draw.text((x + _SCALE + _GAP // 2, y + (height - 1) * (100 - percent) // 100), str(percent), _INK, font, anchor="lm")


def _colour(percent: float) -> tuple[int, ...]:
    """Linear between the entries of the scale."""
    i = min(int(percent / 10), len(_CIVIDIS) - 2)
    share = percent / 10 - i
    return tuple(round(low + share * (high - low)) for low, high in zip(_CIVIDIS[i], _CIVIDIS[i + 1], strict=True))
