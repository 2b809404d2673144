"""Images and labels in files: how a layout on disk describes them, and how they are read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from rrn_core.data.lists import image_name
from rrn_core.errors import DataError

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
"""Red, green and blue in 0..255."""
SplitName = Literal["train", "val"]
VOID = 255
"""Label of pixels that are neither trained nor evaluated."""
REFUSED = -1
"""In a label table, a value that no label file may hold."""


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
    def table(self) -> NDArray[np.int16]:
        """The label table, (256,): for each value of a label file a class, 255 (void), or `REFUSED`."""
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


class ImageFiles:
    """The images of some records, read on access. An image without a label file is void everywhere.

    Raises:
        DataError: on access: a file that cannot be read, a label of another size than its image, or a label value that is not allowed.
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
            raise DataError(f"{record.label}: {_size(label)}, but {record.image.name} is {_size(image)}")
        return image, label


def read_image(file: Path) -> Pixels:
    """The RGB pixels (H, W, 3) of an image file. Raises DataError if it cannot be decoded, OSError if it cannot be opened."""
    # imdecode, because for an unreadable file imread prints to stderr and returns None without a reason
    try:
        pixels = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR_RGB) if file.stat().st_size else None
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"{file}: out of memory while decoding") from error
        raise DataError(f"{file}: not a readable image ({error.err})") from error  # such as more pixels than OpenCV decodes
    if pixels is None:
        raise DataError(f"{file}: not a readable image, or truncated")
    return np.asarray(pixels, np.uint8)


def read_label(file: Path, table: NDArray[np.int16]) -> Pixels:
    """The labels (H, W) of a label file: classes and 255.

    Raises:
        DataError: a value that `table` refuses, an image of colours, or a file that cannot be read.
    """
    values = raw_label(file)
    labels = table[values]
    if (labels == REFUSED).any():
        refused = np.unique(values[labels == REFUSED]).tolist()
        raise DataError(f"{file}: labels must be {allowed_values(table)}, got {', '.join(map(str, refused[:5]))}{_hint(refused)}")
    return labels.astype(np.uint8)


def raw_label(file: Path) -> Pixels:
    """The values of a label file (H, W): grey levels, palette indices, or the segmentation in a `.mat` file of SBD.

    Raises:
        DataError: the file cannot be read, or is not an image of labels.
    """
    if file.suffix == ".mat":
        return _mat(file)
    try:
        with Image.open(file) as image:
            if image.mode not in ("L", "P", "1"):
                raise DataError(f"{file}: expected an 8-bit grey or palette image of labels, got mode {image.mode}")
            factor = _grey_factor(image)  # read first, because decoding changes it
            return np.array(image, np.uint8) // np.uint8(factor)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # for a damaged file the decoders raise exceptions of many kinds
        raise DataError(f"{file}: not a readable image") from error


def label_table(meanings: Mapping[int, int]) -> NDArray[np.int16]:
    """A label table (256,) from values to classes or 255. It refuses all other values."""
    table = np.full(256, REFUSED, np.int16)
    for value, meaning in meanings.items():
        table[value] = meaning
    return table


def plain_table(classes: int) -> NDArray[np.int16]:
    """The label table of files whose values are the classes, and 255 for void."""
    return label_table({**{k: k for k in range(classes)}, VOID: VOID})


def allowed_values(table: NDArray[np.int16]) -> str:
    """The values that a label file may hold, as text: `0..20 or 255`."""
    values = np.flatnonzero(table != REFUSED).tolist()
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return " or ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def voc_palette(classes: int) -> tuple[Colour, ...]:
    """PASCAL VOC's colours: the bits of the class go to red, green and blue in turn, to the highest free bit of each."""

    def colour(label: int) -> Colour:
        red, green, blue = (sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
        return red, green, blue

    return tuple(colour(label) for label in range(classes))


def first_existing(candidates: Iterable[Path]) -> Path | None:
    """The first of some files that exists; None if none does."""
    return next((file for file in candidates if file.is_file()), None)


def names_in(folder: Path, *suffixes: str) -> tuple[str, ...]:
    """The names of the images in a folder, sorted; none if there is no such folder. Hidden files are skipped."""
    if not folder.is_dir():
        return ()
    files = (file for file in folder.iterdir() if file.suffix in suffixes and not file.name.startswith("."))
    return tuple(sorted(image_name(file.name) for file in files))


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


def _hint(refused: Sequence[int]) -> str:
    """Advice for the most frequent mistake: labelIds of Cityscapes, which end at 33, where its 19 classes are expected."""
    if not 19 <= max(refused) <= 33:
        return ""
    return "; if these are Cityscapes' labelIds, use dataset: cityscapes with the files as downloaded (leftImg8bit, gtFine)"


def _size(pixels: NDArray[Any]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
