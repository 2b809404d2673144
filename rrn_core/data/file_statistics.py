"""Statistics of image and label files. Each file is decoded completely and once, in several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rrn_core.data.dataset import Images
from rrn_core.data.files import ImageFiles, ImageRecord, Pixels, raw_label, read_image
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
    label_size: tuple[int, int] | None = None
    """Size of the label map; None if there is no file or it cannot be read."""
    kind: str = ""
    """How the label file stores its values: `grey`, `palette` or `mat`; empty if there is no file or it cannot be read."""
    counts: tuple[int, ...] = ()
    """Number of pixels with each of the 256 values of the label file; empty if there is no file or it cannot be read."""
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
            pending = {pool.submit(_file_statistics, record): record for record in uncached}
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
    return FileStatistics(images.names[index], size=(image.shape[1], image.shape[0]), counts=_counts(label))


def _file_statistics(record: ImageRecord) -> FileStatistics:
    size, kind, label_size, counts = None, "", None, tuple[int, ...]()
    image_fault = label_fault = None
    try:
        height, width = read_image(record.image).shape[:2]  # by the decoder of training
        size = width, height
    except (DataError, OSError) as error:
        image_fault = str(error)
    if record.label is not None:
        try:
            values = raw_label(record.label)
            kind, label_size, counts = _kind(record.label), (values.shape[1], values.shape[0]), _counts(values)
        except (DataError, OSError) as error:
            label_fault = str(error)
    return FileStatistics(record.name, record.label, size, label_size, kind, counts, image_fault, label_fault)


def _kind(file: Path) -> str:
    if file.suffix == ".mat":
        return "mat"
    with Image.open(file) as image:
        return "palette" if image.mode == "P" else "grey"


def _counts(values: Pixels) -> tuple[int, ...]:
    return tuple(np.bincount(values.ravel(), minlength=256).tolist())
