"""Statistics of image and label files. Each file is decoded completely and once, in several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rrn_core.data.dataset import Images
from rrn_core.data.files import ImageFiles, ImageRecord
from rrn_core.data.images import DecodedImage, Pixels, decode_image
from rrn_core.data.labels import REFUSED, Colour, DecodedLabel, Legend, decode_label
from rrn_core.data.palettes import used_colours
from rrn_core.errors import DataError

Progress = Callable[[int, int], None]
"""Is called with the number of images that are done, and the number of all images."""

_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class FileStatistics:
    """Properties of one image and its label file. Sizes are (width, height)."""

    name: str
    label: Path | None = None
    """The label file; None if there is none."""
    size: tuple[int, int] | None = None
    """Size of the image; None if it cannot be read."""
    orientation: int = 1
    """EXIF orientation of the image, 1..8."""
    bits: int | None = None
    """Bits that the values of a 16-bit image need; None for one of 8 bits."""
    brightness: int = 255
    """Value that 99 % of the image's values in 0..255 do not exceed."""
    label_size: tuple[int, int] | None = None
    """Size of the label map; None if there is no file or it cannot be read."""
    kind: str = ""
    """How the label file stores its labels: a `Kind`; empty if there is no file or it cannot be read."""
    counts: tuple[int, ...] = ()
    """Number of pixels with each label, (256,), without refused values; empty if there is no file or it cannot be read."""
    values: frozenset[int] = frozenset()
    """Values that occur in the label file; empty if it is mapped by colour."""
    refused: bool = False
    """Whether a value of the label file has no meaning."""
    palette: tuple[Colour, ...] = ()
    """The palette of a label file that is read by its indices."""
    colours: dict[int, Colour] = field(default_factory=dict, hash=False)
    """The colours in this palette of the values that occur, without void."""
    image_fault: str | None = None
    """Why the image cannot be read."""
    label_fault: str | None = None
    """Why the label file cannot be read."""


StatisticsCache = dict[ImageRecord, FileStatistics]
"""Statistics of files that are already read."""


class StatisticsReader:
    """Reads the statistics of many images in threads, and reports progress. Files in the cache are not read again."""

    def __init__(self, cache: StatisticsCache, progress: Progress | None) -> None:
        self._cache, self._progress = cache, progress
        self._done = self._total = 0

    def expect(self, total: int) -> None:
        """Set the number of images that will be read, for the progress."""
        self._total = total

    def read(self, images: Images, indices: Sequence[int]) -> list[FileStatistics]:
        """The statistics of the images at `indices`, in this order."""
        if not isinstance(images, ImageFiles):
            return [self._counted(_scene_statistics(images, index)) for index in indices]
        records = [images.records[index] for index in indices]
        uncached = [record for record in records if record not in self._cache]
        self._advance(len(records) - len(uncached))
        with ThreadPoolExecutor(_THREADS) as pool:
            pending = {pool.submit(_file_statistics, record, images.legend, images.bits): record for record in uncached}
            for done in as_completed(pending):
                self._cache[pending[done]] = self._counted(done.result())
        return [self._cache[record] for record in records]

    def _counted(self, statistics: FileStatistics) -> FileStatistics:
        """Count one image as done."""
        self._advance(1)
        return statistics

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress and count:
            self._progress(self._done, self._total)


def _scene_statistics(images: Images, index: int) -> FileStatistics:
    """The statistics of an image that has no file."""
    image, label = images[index]
    counts = tuple(np.bincount(label.ravel(), minlength=256).tolist())
    return FileStatistics(images.names[index], size=(image.shape[1], image.shape[0]), counts=counts)


def _file_statistics(record: ImageRecord, legend: Legend, bits: int | None) -> FileStatistics:
    found: dict[str, object] = {}
    image = None
    try:
        image = decode_image(record.image, bits=bits)
        height, width = image.pixels.shape[:2]
        found |= {"size": (width, height), "orientation": image.orientation, "bits": image.bits, "brightness": _brightness(image.pixels)}
    except DataError as error:
        found["image_fault"] = str(error)
    if record.label is not None:
        try:
            found |= _label_statistics(decode_label(record.label, legend), image)
        except DataError as error:
            found["label_fault"] = str(error)
    return FileStatistics(record.name, record.label, **found)  # type: ignore[arg-type]


def _label_statistics(label: DecodedLabel, image: DecodedImage | None) -> dict[str, object]:
    pixels = label.counts
    used = np.flatnonzero(pixels).tolist()
    counts = np.zeros(256, np.int64)
    for value in used:
        if label.table[value] != REFUSED:
            counts[label.table[value]] += pixels[value]
    height, width = (image.align(label.values) if image and not label.oriented else label.values).shape
    return {
        "label_size": (width, height),
        "kind": label.kind,
        "counts": tuple(counts.tolist()),
        "values": frozenset() if label.by_colour else frozenset(used),
        "refused": any(label.table[value] == REFUSED for value in used),
        "palette": label.palette,
        "colours": used_colours(label),
    }


def _brightness(pixels: Pixels) -> int:
    """The value that 99 % of the pixel values of every fourth row and column do not exceed."""
    counts = np.bincount(pixels[::4, ::4].ravel(), minlength=256)
    return int(np.searchsorted(counts.cumsum(), 0.99 * counts.sum()))
