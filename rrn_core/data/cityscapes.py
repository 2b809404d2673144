"""Cityscapes as downloaded, or in the flat layout with trainIds that CPS published."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rrn_core.data.files import DatasetLayout, ImageRecord, SplitName, files_in, first_existing, names_in, unused_in
from rrn_core.data.labels import VOID, Legend, colour_meanings, label_table, plain_table
from rrn_core.data.lists import read_list
from rrn_core.errors import DataError

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic_light",
    "traffic_sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)

PALETTE = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Values of the 19 classes in the labelIds files of the download. The other ids of 0..33 are void."""


def _label_ids() -> NDArray[np.int16]:
    # 255 is refused: labelIds files never hold it, but files that were overwritten with trainIds do
    return label_table({**dict.fromkeys(range(34), VOID), **{value: k for k, value in enumerate(LABEL_IDS)}})


def _legend(table: NDArray[np.int16]) -> Legend:
    return Legend(table, colour_meanings(PALETTE, void=[(0, 0, 0)]))


def open_cityscapes(root: Path) -> DatasetLayout:
    """The layout found at `root`.

    Raises:
        DataError: neither layout is there, or gtFine holds no label files.
    """
    if (root / "leftImg8bit").is_dir():
        return _Download(root)
    if any((root / "images" / split).is_dir() for split in ("train", "val")):
        return _Flat(root)
    raise DataError(f"{root}: not Cityscapes; data_root must hold leftImg8bit/ and gtFine/, or CPS's images/ and segmentation/")


class _Cityscapes:
    """Both layouts.

    Every k-th image gives the partitions that CPS published only in the order of CPS's `train.txt`. That list is used if it is in the root
    or in config_new/. Without it the training images are sorted by name, and the partitions differ from the published ones.
    """

    classes = CLASSES
    palette = PALETTE
    bits = None

    def __init__(self, root: Path) -> None:
        lists = root / "config_new"
        self.list_folder = lists if lists.is_dir() else root
        self._root = root
        self._files = cache(files_in)

    def train_names(self) -> tuple[str, ...]:
        file = first_existing([self._root / "train.txt", self.list_folder / "train.txt"])
        return read_list(file) if file else self._sorted("train")

    def unlabeled_names(self) -> tuple[str, ...]:
        return ()

    def val_names(self) -> tuple[str, ...]:
        return self._sorted("val")

    def unused(self) -> Iterator[str]:
        splits: tuple[SplitName, ...] = ("train", "val")
        for folder in (folder for split in splits for folder in sorted(self._image_folders(split)) if folder.is_dir()):
            yield from unused_in(folder, ".png")

    def _image_folders(self, split: SplitName) -> list[Path]:
        raise NotImplementedError

    def _sorted(self, split: SplitName) -> tuple[str, ...]:
        folders = self._image_folders(split)
        names = sorted(name for folder in folders for name in names_in(folder, ".png"))
        if not names:
            raise DataError(f"{self._root}: no {split} images; copy those of leftImg8bit_trainvaltest.zip there")
        return tuple(names)


class _Download(_Cityscapes):
    """leftImg8bit and gtFine by city. Labels are labelIds or, if there are no labelIds at all, trainIds."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        # decided once for all files: both kinds share most values, so a mixture would not be noticed
        choices = [(split, kind) for split in ("train", "val") for kind in ("labelIds", "labelTrainIds")]
        self._kind = next((kind for split, kind in choices if self._has_labels(root / "gtFine" / split, kind)), None)
        if self._kind is None:
            raise DataError(f"{root / 'gtFine'}: no *_gtFine_labelIds.png in train/CITY or val/CITY; unpack gtFine_trainvaltest.zip there")
        self.legend = _legend(_label_ids() if self._kind == "labelIds" else plain_table(len(CLASSES)))

    def find(self, name: str, split: SplitName) -> ImageRecord:
        city = name.partition("_")[0]
        folder, labels = self._root / "leftImg8bit" / split / city, self._root / "gtFine" / split / city
        image = self._files(folder, ".png").get(name)
        if image is None:
            raise DataError(f"{folder}: {name}_leftImg8bit.png is missing, but a list names {name}")
        return ImageRecord(name, image, self._files(labels, ".png").get(f"{name}_gtFine_{self._kind}"))

    def _has_labels(self, folder: Path, kind: str) -> bool:
        return any(name.endswith(f"_gtFine_{kind}") for city in folder.glob("*") for name in self._files(city, ".png"))

    def _image_folders(self, split: SplitName) -> list[Path]:
        return list((self._root / "leftImg8bit" / split).glob("*"))


class _Flat(_Cityscapes):
    """CPS's images/SPLIT/x.png and segmentation/SPLIT/x_gtFine.png. Labels are trainIds."""

    legend = _legend(plain_table(len(CLASSES)))

    def find(self, name: str, split: SplitName) -> ImageRecord:
        folder = self._root / "images" / split
        image = self._files(folder, ".png").get(name)
        if image is None:
            raise DataError(f"{folder}: {name}.png is missing, but a list names {name}")
        return ImageRecord(name, image, self._files(self._root / "segmentation" / split, ".png").get(name))

    def _image_folders(self, split: SplitName) -> list[Path]:
        return [self._root / "images" / split]
