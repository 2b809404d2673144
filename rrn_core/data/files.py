"""Images and labels in files: how a layout on disk describes them, and how they are read and checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rrn_core.data.images import Pixels, decode_image
from rrn_core.data.labels import VOID, Colour, Legend, decode_label
from rrn_core.data.lists import first_few, image_name
from rrn_core.errors import DataError

SplitName = Literal["train", "val"]

_SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """The files of one image; `label` is None if it has no label file."""

    name: str
    image: Path
    label: Path | None


class DatasetLayout(Protocol):
    """How a data set is stored on disk. Names of images are those of lists, without folder and suffix."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels."""
        ...

    @property
    def palette(self) -> tuple[Colour, ...]:
        """RGB of each class."""
        ...

    @property
    def legend(self) -> Legend:
        """What the values and colours of the label files mean."""
        ...

    @property
    def bits(self) -> int | None:
        """Bits of a pixel value of 16-bit images; None if each file's own range counts."""
        ...

    @property
    def list_folder(self) -> Path:
        """The folder of the data set's own lists."""
        ...

    def train_names(self) -> tuple[str, ...]:
        """The training images that may be labelled, in their published order. Raises DataError."""
        ...

    def unlabeled_names(self) -> tuple[str, ...]:
        """Training images that never have labels. Raises DataError."""
        ...

    def val_names(self) -> tuple[str, ...]:
        """The validation images. Raises DataError."""
        ...

    def find(self, name: str, split: SplitName) -> ImageRecord:
        """The files of an image; `label` is None if it has no label file. Raises DataError if the image is missing."""
        ...

    def unused(self) -> Iterable[str]:
        """A line for each folder that holds files which are not used: another suffix, a sub-folder, a mask without an image."""
        ...


class ImageFiles:
    """The images of some records, read on access. An image without a label file is void everywhere.

    Args:
        unneeded: indices of images whose labels only diagnostics read. Such a label that cannot be used is void, with a warning.

    Raises:
        DataError: on access: a file that cannot be read, a label of another size than its image, or a label value that is not allowed.
    """

    def __init__(
        self, records: Sequence[ImageRecord], legend: Legend, *, bits: int | None = None, unneeded: Collection[int] = frozenset()
    ) -> None:
        self.names = tuple(record.name for record in records)
        self.records = tuple(records)
        self.legend, self.bits = legend, bits
        self._unneeded, self._warned = set(unneeded), set[int]()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        record = self.records[index]
        image = decode_image(record.image, bits=self.bits)
        void = np.full(image.pixels.shape[:2], VOID, np.uint8)
        if record.label is None:
            return image.pixels, void
        try:
            label = decode_label(record.label, self.legend)
            labels = label.labels(self.legend)
            labels = labels if label.oriented else image.align(labels)
            if labels.shape != void.shape:
                raise DataError(f"{record.label}: {_size(labels)}, but {record.image.name} is {_size(void)}")
        except DataError as error:
            if index not in self._unneeded:
                raise
            if index not in self._warned:
                _log.warning("%s; unlabelled in this partition, so only diagnostics lack it", error)
            self._warned.add(index)
            return image.pixels, void
        return image.pixels, labels

    def needed_labels(self) -> list[Path]:
        """The label files that not only diagnostics read."""
        return [record.label for index, record in enumerate(self.records) if record.label and index not in self._unneeded]

    def only_needing(self, labels: Collection[int]) -> ImageFiles:
        """The same images, of which only those at the indices `labels` need their label."""
        return ImageFiles(self.records, self.legend, bits=self.bits, unneeded=set(range(len(self))).difference(labels))


def files_in(folder: Path, *suffixes: str) -> dict[str, Path]:
    """The image files of a folder by name, in the order of the names; none if there is no such folder.

    Of two files of one name, that with the earlier suffix counts.
    """
    found = matching(folder, *suffixes)
    found.sort(key=lambda file: (image_name(file.name), -suffixes.index(file.suffix.lower())))
    return {image_name(file.name): file for file in found}


def matching(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder with these suffixes, in upper or lower case, sorted. Hidden files and sub-folders are skipped."""
    return [file for file, is_folder in _entries(folder) if not is_folder and file.suffix.lower() in suffixes]


def names_in(folder: Path, *suffixes: str) -> tuple[str, ...]:
    """The names of the images in a folder, sorted; none if there is no such folder. Hidden files are skipped."""
    return tuple(files_in(folder, *suffixes))


def unused_in(folder: Path, *suffixes: str) -> Iterator[str]:
    """A line about the files of a folder that `files_in` leaves out, if there are any."""
    used = set(files_in(folder, *suffixes).values())
    left = [(file, is_folder) for file, is_folder in _entries(folder) if file not in used]
    inside = {file: sum(inner.is_file() for inner in file.rglob("*")) for file, is_folder in left if is_folder}
    if count := sum(inside.get(file, 1) for file, _ in left):
        shown = (file for file, _ in left if inside.get(file, 1))
        names = first_few(f"{file.name}/ ({inside[file]} files)" if file in inside else file.name for file in shown)
        yield f"{folder}: {count} files are not used: {names}; expected {', '.join(suffixes)} files that lie in the folder itself"


def without_image(folder: Path, masks: Iterable[str], images: Collection[str]) -> Iterator[str]:
    """A line about the masks of a folder that have no image, if there are any."""
    if left := sorted(set(masks).difference(images)):
        yield f"{folder}: {len(left)} masks have no image of the same name and are not used: {first_few(left)}"


def first_existing(candidates: Iterable[Path]) -> Path | None:
    """The first of some files that exists; None if none does."""
    return next((file for file in candidates if file.is_file()), None)


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """The files and sub-folders of a folder, sorted, each with whether it is a folder; without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _SYSTEM_FILES]
            return sorted((folder / entry.name, entry.is_dir()) for entry in shown)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(pixels: NDArray[Any]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
