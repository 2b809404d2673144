"""The data sets: what one looks like to the rest, and which one a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rrn_core.config import Runtime, TrainConfig
from rrn_core.data import camvid, digits

Pixels = NDArray[np.uint8]

__all__ = ["DataSet", "Images", "Pixels", "open_dataset"]


class Images(Protocol):
    """An ordered list of images with labels."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        """RGB (H, W, 3) and labels (H, W), both uint8; label 255 is void."""
        ...


@dataclass(frozen=True)
class DataSet:
    """Class names in the order of the label values, and the two lists of images."""

    classes: tuple[str, ...]
    train: Images
    val: Images


def open_dataset(config: TrainConfig, runtime: Runtime) -> DataSet:
    """The data set that `config.dataset` names, decoded into memory where `runtime.cache_images`.

    Raises:
        ValueError: no data root, or a missing or unusable file; one line that names the place.
    """
    if config.dataset == "camvid":
        data = DataSet(camvid.CLASSES, *(camvid.CamVid(runtime.data_root, split) for split in ("train", "val")))
    else:
        train = digits.Digits("train", config.train_images, config.image_size)
        data = DataSet(digits.CLASSES, train, digits.Digits("val", config.val_images, config.image_size))
    return DataSet(data.classes, _Decoded(data.train), _Decoded(data.val)) if runtime.cache_images else data


class _Decoded:
    """Images held in memory. All are decoded at once: a bad file shows before training, and forked workers share the pages."""

    def __init__(self, images: Images) -> None:
        self.names = images.names
        self._pairs = [images[i] for i in range(len(images))]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        return self._pairs[index]
