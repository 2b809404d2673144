"""Looks at image and label files: each once, decoded to its end, many at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rrn_core.data.dataset import Images
from rrn_core.data.files import ImageFiles, ImageRecord, Pixels, raw_label

Progress = Callable[[int, int], None]
"""Called with the number of files looked at so far, and of all of them."""

_THREADS = min(8, os.cpu_count() or 1)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class FileStatistics:
    """What one image and its label file show. Sizes are (width, height)."""

    name: str
    label: Path | None = None
    size: tuple[int, int] | None = None
    label_size: tuple[int, int] | None = None
    kind: str = ""
    """How the label file stores its values: `grey`, `palette`, `mat`; empty where there is none or it is broken."""
    counts: tuple[int, ...] = ()
    """Pixels of each of the 256 values in the label file."""
    broken_image: str | None = None
    broken_label: str | None = None


Looks = dict[ImageRecord, FileStatistics]
"""What was seen, by files."""


class StatisticsReader:
    """Looks at many images in threads, at each once, and tells how far it is."""

    def __init__(self, looks: Looks, progress: Progress | None) -> None:
        self._looks, self._progress = looks, progress
        self._done = self._total = 0

    def expect(self, total: int) -> None:
        self._total = total

    def look(self, images: Images, indices: Sequence[int]) -> list[FileStatistics]:
        if not isinstance(images, ImageFiles):
            return [self._told(_scene_look(images, index)) for index in indices]
        wanted = [images.records[index] for index in indices]
        fresh = [record for record in wanted if record not in self._looks]
        self._advance(len(wanted) - len(fresh))
        with ThreadPoolExecutor(_THREADS) as pool:
            pending = {pool.submit(_file_look, record): record for record in fresh}
            for done in as_completed(pending):
                self._looks[pending[done]] = self._told(done.result())
        return [self._looks[record] for record in wanted]

    def _told(self, look: FileStatistics) -> FileStatistics:
        self._advance(1)
        return look

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress and count:
            self._progress(self._done, self._total)


def _scene_look(images: Images, index: int) -> FileStatistics:
    """Of an image that has no file."""
    image, label = images[index]
    return FileStatistics(images.names[index], size=(image.shape[1], image.shape[0]), counts=_counts(label))


def _file_look(record: ImageRecord) -> FileStatistics:
    size, kind, label_size, counts = None, "", None, tuple[int, ...]()
    broken_image = broken_label = None
    try:
        size = _decoded_size(record.image)
    except ValueError as error:
        broken_image = str(error)
    if record.label is not None:
        try:
            values = raw_label(record.label)
            kind, label_size, counts = _kind(record.label), (values.shape[1], values.shape[0]), _counts(values)
        except (ValueError, OSError) as error:
            broken_label = str(error)
    return FileStatistics(record.name, record.label, size, label_size, kind, counts, broken_image, broken_label)


def _decoded_size(file: Path) -> tuple[int, int]:
    """As training decodes it: a photograph is turned as its header says. Raises ValueError for a file that ends too early."""
    try:
        with Image.open(file) as image:
            image.load()  # first: of a TIFF it turns the pixels, and forgets that they were to be turned
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            return (image.height, image.width) if turned else (image.width, image.height)
    except Exception as error:  # the decoders raise many kinds for a damaged file
        raise ValueError(f"{file}: not a readable image, or not a whole one") from error


def _kind(file: Path) -> str:
    if file.suffix == ".mat":
        return "mat"
    with Image.open(file) as image:
        return "palette" if image.mode == "P" else "grey"


def _counts(values: Pixels) -> tuple[int, ...]:
    return tuple(np.bincount(values.ravel(), minlength=256).tolist())
