"""Label files: how their values and colours become classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from rrn_core.data.images import MOST_PIXELS, Pixels, orientation_of, turn
from rrn_core.data.lists import first_few
from rrn_core.errors import DataError

Colour = tuple[int, int, int]
"""Red, green and blue in 0..255."""
Kind = Literal["grey", "palette", "colour", "mat"]
"""How a label file stores its labels."""
VOID = 255
"""Label of pixels that are neither trained nor evaluated."""
REFUSED = -1
"""In a label table, a value that no label file may hold."""

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is that of web pages; `decode_label` has the limit of OpenCV
_BLOCK = 2**21
"""Pixels that are counted or mapped at once."""


@dataclass(frozen=True)
class Legend:
    """What the values and the colours of label files mean."""

    table: NDArray[np.int16]
    """The label table, (256,): for each value of a label file a class, 255 (void), or `REFUSED`."""
    colours: Mapping[Colour, int] = field(default_factory=dict)
    """The class, or 255, of each stated colour; empty if none is stated."""
    described: bool = False
    """Whether a dataset.yaml of the user's says all this."""
    assumed: int = 0
    """Number of classes if their values 0, 1, 2, ... are assumed, because dataset.yaml has no `values`; else 0."""

    def values_line(self, found: Collection[int]) -> str:
        """The line for dataset.yaml that makes the values found in masks those of the classes, if they look like that; else empty."""
        plain = sorted(set(found) - {VOID})
        if plain and plain[0] > 0 and plain[-1] == self.assumed:
            plain = list(range(1, self.assumed + 1))
        for values in (plain, sorted(set(found))):
            if self.assumed and len(values) == self.assumed and values != list(range(self.assumed)):
                return f"`values: {values}`"
        return ""


@dataclass(frozen=True)
class DecodedLabel:
    """The content of one label file."""

    file: Path
    values: Pixels
    """Grey levels or palette indices, (H, W). For an RGB file its labels."""
    table: NDArray[np.int16]
    """The label table of this file."""
    kind: Kind
    palette: tuple[Colour, ...] = ()
    """The colours of a palette that is read by its indices; empty if the file has none, or grey levels, or is mapped by colour."""
    by_colour: bool = False
    """Whether the stated colours decide, not the values."""
    oriented: bool = False
    """Whether `values` are turned by an EXIF orientation of the label file."""

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of pixels of each value, (256,)."""
        flat = self.values.reshape(-1)
        blocks = (np.bincount(flat[start : start + _BLOCK], minlength=256) for start in range(0, flat.size, _BLOCK))
        return sum(blocks, np.zeros(256, np.int64))

    def labels(self, legend: Legend) -> Pixels:
        """Classes and 255, (H, W). Raises DataError if the table refuses a value."""
        found = np.flatnonzero(self.counts).tolist()
        if refused := [value for value in found if self.table[value] == REFUSED]:
            raise DataError(_refusal(self.file, self.table, legend, found, refused))
        return np.asarray(cv2.LUT(self.values, self.table.astype(np.uint8)), np.uint8)


def read_label(file: Path, legend: Legend) -> Pixels:
    """The labels (H, W) of a label file: classes and 255.

    Raises:
        DataError: a value or a colour without a meaning, a palette that contradicts the stated colours, or a file that cannot be read.
    """
    return decode_label(file, legend).labels(legend)


def decode_label(file: Path, legend: Legend) -> DecodedLabel:
    """Read a label file: grey levels, palette indices, stated colours, or the segmentation in a `.mat` file of SBD.

    Raises:
        DataError: the file cannot be read, is not an image of labels, or its colours cannot be mapped to classes.
    """
    if file.suffix.lower() == ".mat":
        return DecodedLabel(file, _mat(file), legend.table, "mat")
    try:
        with Image.open(file) as image:
            return _decoded(file, image, legend)
    except (DataError, MemoryError):
        raise
    except OSError as error:
        raise DataError(f"{file}: not a readable image{f': {error.strerror}' if error.strerror else ''}") from error
    except Exception as error:  # for a damaged file the decoders raise exceptions of many kinds
        raise DataError(f"{file}: not a readable image") from error


def palette_of(file: Path) -> tuple[Colour, ...]:
    """The palette in the header of an image file; empty if it has none or cannot be read. The pixels are not decoded."""
    try:
        with Image.open(file) as image:
            return _palette(image)
    except MemoryError:
        raise
    except Exception:  # what cannot be opened is reported where it is decoded
        return ()


def label_table(meanings: Mapping[int, int]) -> NDArray[np.int16]:
    """A label table (256,) from values to classes or 255. It refuses all other values."""
    table = np.full(256, REFUSED, np.int16)
    for value, meaning in meanings.items():
        table[value] = meaning
    return table


def plain_table(classes: int) -> NDArray[np.int16]:
    """The label table of files whose values are the classes, and 255 for void."""
    return label_table({**{k: k for k in range(classes)}, VOID: VOID})


def colour_meanings(palette: Sequence[Colour], *, void: Collection[Colour] = ()) -> dict[Colour, int]:
    """The class of each colour of a palette, and 255 for the colours of void. A colour that two of them share has no meaning."""
    stated = [*((colour, k) for k, colour in enumerate(palette)), *((colour, VOID) for colour in void)]
    shared = [colour for colour, _ in stated]
    return {colour: label for colour, label in stated if shared.count(colour) == 1}


def allowed_values(table: NDArray[np.int16]) -> str:
    """The values that a label file may hold, as text: `0..20 or 255`."""
    values = np.flatnonzero(table != REFUSED).tolist()
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return " or ".join(texts) if len(texts) <= 8 else f"one of {len(values)} values ({first_few(texts, 8)})"


def voc_palette(classes: int) -> tuple[Colour, ...]:
    """PASCAL VOC's colours: the bits of the class go to red, green and blue in turn, to the highest free bit of each."""

    def colour(label: int) -> Colour:
        red, green, blue = (sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
        return red, green, blue

    return tuple(colour(label) for label in range(classes))


def _decoded(file: Path, image: ImageFile.ImageFile, legend: Legend) -> DecodedLabel:
    if image.width * image.height > MOST_PIXELS:
        raise DataError(f"{file}: {image.width} x {image.height} pixels; at most {MOST_PIXELS // 10**6} megapixels are read; split it")
    palette, orientation = _palette(image), orientation_of(image)
    factor = _grey_factor(image)  # read first, because decoding changes it
    pixels = np.asarray(image)
    if pixels.ndim == 3 and image.mode in ("RGBA", "LA"):
        if (pixels[..., -1] != 255).any():
            raise DataError(f"{file}: has transparent pixels, which have no label; save the mask without an alpha channel")
        pixels = pixels[..., :-1]
    if image.mode not in ("L", "P", "1", "RGB", "RGBA", "LA"):
        raise DataError(f"{file}: expected an 8-bit image of labels (grey, palette or RGB), got mode {image.mode}")
    pixels = turn(pixels.astype(np.uint8, copy=False), orientation)
    if image.mode in ("RGB", "RGBA"):
        return replace(_of_colours(file, pixels, legend), oriented=orientation > 1)
    values = pixels.reshape(pixels.shape[:2])
    if factor > 1:
        values = values // np.uint8(factor)
    label = DecodedLabel(file, values, legend.table, "palette" if image.mode == "P" else "grey", palette, oriented=orientation > 1)
    return _by_palette(label, legend) if palette else label


def _palette(image: ImageFile.ImageFile) -> tuple[Colour, ...]:
    """The colours of a palette image; empty for any other, and for a palette of the grey levels, which says nothing."""
    if image.mode != "P" or image.palette is None:
        return ()
    return _colours(image.palette.tobytes(), len(image.palette.mode))


@lru_cache(maxsize=256)
def _colours(palette: bytes, channels: int) -> tuple[Colour, ...]:
    """The colours of a palette, shared by all files that have the same one; empty for a palette of the grey levels."""
    colours = np.frombuffer(palette, np.uint8).reshape(-1, channels)[:, :3]
    found = tuple((red, green, blue) for red, green, blue in colours.tolist())
    return found if len(found) < 2 or found != tuple((k, k, k) for k in range(len(found))) else ()


def _by_palette(label: DecodedLabel, legend: Legend) -> DecodedLabel:
    """The label, mapped by its palette if a value has the stated colour of another class.

    Raises:
        DataError: such a palette has a colour without a meaning, or one colour for two classes.
    """
    palette, table = label.palette, legend.table
    found = np.flatnonzero(label.counts).tolist()
    stated = {value: legend.colours.get(palette[value]) for value in found if value < len(palette)}
    for value in found:
        if table[value] == VOID and value in stated and _repeats(value, palette, range(value)):
            stated[value] = None  # the void value lies in the part of the palette that is filled up
    moved = [value for value, meaning in stated.items() if meaning not in (None, table[value])]
    if not moved:
        return label
    classes = np.flatnonzero((table != REFUSED) & (table != VOID)).tolist()
    mapping = {value: VOID if stated.get(value) is None and table[value] == VOID else stated.get(value) for value in found}
    if wrong := [v for v in found if mapping[v] is None or (stated.get(v) is not None and _repeats(v, palette, classes))]:
        raise DataError(
            f"{label.file}: its palette gives value {moved[0]} the colour {list(palette[moved[0]])} of another class, and value {wrong[0]} "
            f"a colour that is not stated or not unique; {_advice(legend)}"
        )
    by_colour = label_table({value: meaning for value, meaning in mapping.items() if meaning is not None})
    return replace(label, table=by_colour, palette=(), by_colour=True)


def _repeats(value: int, palette: Sequence[Colour], others: Collection[int]) -> bool:
    """Whether a value has the same colour as one of the others."""
    return any(palette[other] == palette[value] for other in others if other != value and other < len(palette))


def _of_colours(file: Path, pixels: Pixels, legend: Legend) -> DecodedLabel:
    """The labels of RGB pixels (H, W, 3): classes of the stated colours, else the grey levels if all pixels are grey.

    Raises:
        DataError: a colour that is not stated, or grey levels of which one has the stated colour of another class.
    """
    height, width = pixels.shape[:2]
    meanings = _colour_table(tuple(legend.colours.items()))
    labels, unknown, grey = np.empty((height, width), np.uint8), set[int](), True
    for start in range(0, height, rows := max(1, _BLOCK // max(1, width))):
        red, green, blue = np.moveaxis(pixels[start : start + rows], -1, 0)
        codes = red.astype(np.int32) << 16 | green.astype(np.int32) << 8 | blue
        block = meanings[codes]
        labels[start : start + rows] = block
        if len(unknown) < 256 and (missing := codes[block == REFUSED]).size:
            unknown.update(np.unique(missing).tolist())
        grey = grey and bool((red == green).all() and (green == blue).all())
    if not unknown:
        return DecodedLabel(file, labels, np.arange(256, dtype=np.int16), "colour", by_colour=True)
    if not grey:
        raise DataError(f"{file}: {_unknown_colours(unknown, legend)}; {_advice(legend)}")
    levels = DecodedLabel(file, np.ascontiguousarray(pixels[..., 0]), legend.table, "colour")
    for level in np.flatnonzero(levels.counts).tolist():
        if legend.table[level] != REFUSED and legend.colours.get((level, level, level), VOID) not in (VOID, legend.table[level]):
            raise DataError(
                f"{file}: a grey RGB mask whose value {level} has the colour of another class, while others have none; {_advice(legend)}"
            )
    return levels


@lru_cache(maxsize=4)
def _colour_table(meanings: tuple[tuple[Colour, int], ...]) -> NDArray[np.int16]:
    """The class, 255 or `REFUSED` of each colour red << 16 | green << 8 | blue."""
    table = np.full(2**24, REFUSED, np.int16)
    for (red, green, blue), meaning in meanings:
        table[red << 16 | green << 8 | blue] = meaning
    return table


def _unknown_colours(codes: Collection[int], legend: Legend) -> str:
    names = first_few(str([code >> 16, code >> 8 & 255, code & 255]) for code in sorted(codes))
    return (
        f"an RGB mask with colours that are not stated: {names}" if legend.colours else f"an RGB mask, but no colours are stated: {names}"
    )


def _advice(legend: Legend) -> str:
    if legend.described:
        example = "`classes: {background: [0, 0, 0], cat: [255, 0, 0]}`"
        return f"state the colour of every class in dataset.yaml, as {example}, and `void_colours`, or save the masks as grey values"
    return "save the mask in the data set's own colours, or as grey values"


def _mat(file: Path) -> Pixels:
    from scipy.io import loadmat  # only for SBD; scikit-learn installs it

    try:
        return np.asarray(loadmat(file)["GTcls"]["Segmentation"][0, 0], np.uint8)
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file the reader raises exceptions of many kinds
        raise DataError(f"{file}: not one of SBD's cls files") from error


def _grey_factor(image: ImageFile.ImageFile) -> int:
    """The factor by which Pillow multiplies the values of a grey PNG of 2 or 4 bits, so that they span 0..255."""
    modes = {tile[3] for tile in image.tile} if image.format == "PNG" else set()
    return 85 if "L;2" in modes else 17 if "L;4" in modes else 1


def _refusal(file: Path, table: NDArray[np.int16], legend: Legend, found: Sequence[int], refused: Sequence[int]) -> str:
    text = f"{file}: labels must be {allowed_values(table)}, got {first_few(map(str, refused), 5)}"
    if line := legend.values_line(found):
        return f"{text}; if these are the values of the classes in order, write {line} into dataset.yaml"
    if 19 <= max(refused) <= 33:  # the most frequent mistake: labelIds of Cityscapes, which end at 33, where its 19 classes are expected
        return f"{text}; if these are Cityscapes' labelIds, use dataset: cityscapes with the files as downloaded (leftImg8bit, gtFine)"
    return text
