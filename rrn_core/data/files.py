"""Images and labels in files: what a layout on disk says about them, and how they are read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from rrn_core.data.lists import image_name

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
SplitName = Literal["train", "val"]
VOID = 255
REFUSED = -1
"""In a label table: a value that no label file may hold."""


@dataclass(frozen=True)
class ImageRecord:
    """One image and, where it has one, its label file."""

    name: str
    image: Path
    label: Path | None


class DatasetLayout(Protocol):
    """One way in which a data set lies on disk. Names are those of lists: without folder and suffix."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def palette(self) -> tuple[Colour, ...]:
        """RGB of each class."""
        ...

    @property
    def table(self) -> NDArray[np.int16]:
        """What each of the 256 values of a label file means: a class, 255 (void), or `REFUSED`."""
        ...

    @property
    def list_folder(self) -> Path:
        """Where the data set keeps lists of its own."""
        ...

    def train_names(self) -> tuple[str, ...]:
        """The training images that may be labelled, in their published order. Raises ValueError."""
        ...

    def unlabeled_names(self) -> tuple[str, ...]:
        """Training images that never have labels."""
        ...

    def val_names(self) -> tuple[str, ...]: ...

    def find(self, name: str, split: SplitName) -> ImageRecord:
        """The files of an image; `label` is None where there is none. Raises ValueError where the image is missing."""
        ...


class ImageFiles:
    """The images of some records, read when asked for; a label that is missing is void everywhere.

    Raises:
        ValueError: on access, a file that cannot be read, sizes that differ, or a label value that means nothing.
    """

    def __init__(self, records: Sequence[ImageRecord], table: NDArray[np.int16]) -> None:
        self.names = tuple(record.name for record in records)
        self.records = tuple(records)
        self.table = table

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        record = self.records[index]
        image = read_image(record.image)
        if record.label is None:
            return image, np.full(image.shape[:2], VOID, np.uint8)
        label = read_label(record.label, self.table)
        if label.shape != image.shape[:2]:
            raise ValueError(f"{record.label}: {_size(label)}, but {record.image.name} is {_size(image)}")
        return image, label


def read_image(file: Path) -> Pixels:
    """RGB (H, W, 3). Raises ValueError."""
    # imdecode, because imread would report an unreadable file on stderr and return None without a reason
    pixels = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR_RGB) if file.stat().st_size else None
    if pixels is None:
        raise ValueError(f"{file}: not a readable image")
    return np.asarray(pixels, np.uint8)


def read_label(file: Path, table: NDArray[np.int16]) -> Pixels:
    """Labels (H, W): classes and 255. Raises ValueError for a value that `table` refuses, or a file that holds colours."""
    values = raw_label(file)
    labels = table[values]
    if (labels == REFUSED).any():
        refused = np.unique(values[labels == REFUSED]).tolist()
        raise ValueError(f"{file}: labels must be {allowed(table)}, got {', '.join(map(str, refused[:5]))}{_hint(refused)}")
    return labels.astype(np.uint8)


def raw_label(file: Path) -> Pixels:
    """The values of a label file (H, W): grey levels, palette indices, or the segmentation of one of SBD's `.mat` files.

    Raises:
        ValueError: not an image of labels.
    """
    if file.suffix == ".mat":
        return _mat(file)
    try:
        with Image.open(file) as image:
            if image.mode not in ("L", "P", "1"):
                raise ValueError(f"{file}: expected an 8-bit grey or palette image of labels, got mode {image.mode}")
            factor = _grey_factor(image)  # asked first: decoding forgets it
            return np.array(image, np.uint8) // np.uint8(factor)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
        raise ValueError(f"{file}: not a readable image") from error


def label_table(meanings: Mapping[int, int]) -> NDArray[np.int16]:
    """A table that refuses every value but those of `meanings`."""
    table = np.full(256, REFUSED, np.int16)
    for value, meaning in meanings.items():
        table[value] = meaning
    return table


def plain_table(classes: int) -> NDArray[np.int16]:
    """Values are classes, 255 is void."""
    return label_table({**{k: k for k in range(classes)}, VOID: VOID})


def allowed(table: NDArray[np.int16]) -> str:
    """`0..20 or 255`: the values that a label file may hold."""
    values = np.flatnonzero(table != REFUSED).tolist()
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return " or ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def voc_palette(classes: int) -> tuple[Colour, ...]:
    """PASCAL VOC's colours: the bits of the class, dealt to red, green and blue from the highest bit down."""

    def colour(label: int) -> Colour:
        red, green, blue = (sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
        return red, green, blue

    return tuple(colour(label) for label in range(classes))


def present(candidates: Iterable[Path]) -> Path | None:
    """The first of some files that is there."""
    return next((file for file in candidates if file.is_file()), None)


def listed_in(folder: Path, *suffixes: str) -> tuple[str, ...]:
    """The images of a folder by name, sorted; none where there is no such folder. Hidden files do not count."""
    if not folder.is_dir():
        return ()
    files = (file for file in folder.iterdir() if file.suffix in suffixes and not file.name.startswith("."))
    return tuple(sorted(image_name(file.name) for file in files))


def _mat(file: Path) -> Pixels:
    from scipy.io import loadmat  # comes with scikit-learn, and is needed for SBD alone

    try:
        return np.asarray(loadmat(file)["GTcls"]["Segmentation"][0, 0], np.uint8)
    except Exception as error:  # the reader raises many kinds for a damaged file
        raise ValueError(f"{file}: not one of SBD's cls files") from error


def _grey_factor(image: ImageFile.ImageFile) -> int:
    """What Pillow multiplies the values of a grey PNG of 2 or 4 bits by, so that they span 0..255."""
    modes = {tile[3] for tile in image.tile} if image.format == "PNG" else set()
    return 85 if "L;2" in modes else 17 if "L;4" in modes else 1


def _hint(refused: Sequence[int]) -> str:
    """labelIds of Cityscapes end at 33, and are mistaken for its 19 classes more often than anything else."""
    if not 19 <= max(refused) <= 33:
        return ""
    return "; if these are Cityscapes' labelIds, give the files as downloaded (leftImg8bit, gtFine) to dataset: cityscapes"


def _size(pixels: NDArray[Any]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
