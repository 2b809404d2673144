"""PASCAL VOC 2012 with the additional labels of SBD, in VOC's own folders or in the copy that CPS published."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rrn_core.data.files import DatasetLayout, ImageRecord, SplitName, files_in, first_existing, names_in, unused_in, without_image
from rrn_core.data.labels import VOID, Legend, colour_meanings, plain_table, voc_palette
from rrn_core.data.lists import read_list
from rrn_core.errors import DataError

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def open_voc(root: Path) -> DatasetLayout:
    """The layout found at `root`, which is VOC2012, VOCdevkit, CPS's pascal_voc, or a folder that holds VOCdevkit or pascal_voc.

    Raises:
        DataError: none of them is there.
    """
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return _Devkit(folder, sbd=_find_sbd(root, folder))
    for folder in (root, root / "pascal_voc"):
        if any((folder / split / "image").is_dir() for split in ("train_aug", "val")):
            return _Cps(folder)
    raise DataError(f"{root}: not VOC 2012; data_root must hold VOCdevkit/VOC2012/JPEGImages, or CPS's pascal_voc/train_aug/image")


class _Voc:
    """Both layouts."""

    classes = CLASSES
    palette = voc_palette(len(CLASSES))
    legend = Legend(plain_table(len(CLASSES)), colour_meanings(palette, void=[voc_palette(256)[VOID]]))
    bits = None

    def __init__(self) -> None:
        self._files = cache(files_in)

    def unlabeled_names(self) -> tuple[str, ...]:
        return ()

    def _record(self, name: str, images: Path, labels: list[tuple[Path, str]]) -> ImageRecord:
        """The image, and its label in the first of some folders that has one; each folder with the suffix of its labels."""
        image = self._files(images, ".jpg").get(name)
        if image is None:
            raise DataError(f"{images}: {name}.jpg is missing, but a list names it")
        candidates = (self._files(folder, suffix).get(name) for folder, suffix in labels)
        return ImageRecord(name, image, next((file for file in candidates if file), None))


class _Devkit(_Voc):
    """JPEGImages, SegmentationClass, SegmentationClassAug (grey or palette) and ImageSets, and SBD in a folder that `_find_sbd` finds.

    The label of a training image is that of SegmentationClassAug, else VOC's own, else SBD's: VOC's own labels are finer than SBD's and
    mark void borders. SBD also labels validation images, but evaluation must not use these labels.
    """

    def __init__(self, folder: Path, *, sbd: Path | None) -> None:
        super().__init__()
        self.list_folder = folder / "ImageSets" / "Segmentation"
        self._images = folder / "JPEGImages"
        self._own = folder / "SegmentationClass"
        self._augmented = folder / "SegmentationClassAug"
        self._sbd = sbd / "cls" if sbd else None

    def train_names(self) -> tuple[str, ...]:
        """The 10582 images of train_aug, sorted. Every k-th of them is a partition that CPS published.

        They come from a list of that name, or are all images with a label except those of val.txt. SBD's train_noval.txt, which torchvision
        uses, is another list: the 5623 images of SBD's training list that VOC does not validate on. It can be set as `train_list`.
        """
        file = first_existing(self.list_folder / name for name in ("train_aug.txt", "trainaug.txt"))
        if file:
            return tuple(sorted(read_list(file)))
        names = self._with_label() - set(self.val_names())
        plain = first_existing([self.list_folder / "train.txt"])
        if not names or (plain and names <= set(read_list(plain))):
            raise DataError(
                f"{self._images.parent}: has labels for {len(names)} training images, train_aug has 10582; add SegmentationClassAug or SBD "
                f"(data_root/sbd/cls), or set train_list: train.txt for VOC's own 1464 images"
            )
        return tuple(sorted(names))

    def val_names(self) -> tuple[str, ...]:
        return read_list(self.list_folder / "val.txt")

    def find(self, name: str, split: SplitName) -> ImageRecord:
        own, augmented = (self._own, ".png"), (self._augmented, ".png")
        if split == "val":
            return self._record(name, self._images, [own, augmented])
        return self._record(name, self._images, [augmented, own, *([(self._sbd, ".mat")] if self._sbd else [])])

    def unused(self) -> Iterator[str]:
        yield from unused_in(self._images, ".jpg")
        for folder in (self._own, self._augmented):
            yield from unused_in(folder, ".png")
            yield from without_image(folder, names_in(folder, ".png"), self._files(self._images, ".jpg"))

    def _with_label(self) -> set[str]:
        additional = names_in(self._sbd, ".mat") if self._sbd else ()
        return {*names_in(self._augmented, ".png"), *names_in(self._own, ".png"), *additional}


class _Cps(_Voc):
    """CPS's train_aug/image, train_aug/label, val/image and val/label, with grey labels of all 10582 training images."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.list_folder = root

    def train_names(self) -> tuple[str, ...]:
        return self._names_of(self.list_folder / "train_aug")

    def val_names(self) -> tuple[str, ...]:
        file = self.list_folder / "val.txt"
        return read_list(file) if file.is_file() else self._names_of(self.list_folder / "val")

    def find(self, name: str, split: SplitName) -> ImageRecord:
        folder = self.list_folder / ("train_aug" if split == "train" else "val")
        return self._record(name, folder / "image", [(folder / "label", ".png")])

    def unused(self) -> Iterator[str]:
        for folder in (self.list_folder / "train_aug", self.list_folder / "val"):
            images, masks = folder / "image", folder / "label"
            yield from unused_in(images, ".jpg")
            yield from unused_in(masks, ".png")
            yield from without_image(masks, names_in(masks, ".png"), names_in(images, ".jpg"))

    def _names_of(self, folder: Path) -> tuple[str, ...]:
        names = names_in(folder / "image", ".jpg")
        if not names:
            raise DataError(f"{folder / 'image'}: holds no ID.jpg; copy the {folder.name} images of CPS's pascal_voc there")
        return names


def _find_sbd(root: Path, folder: Path) -> Path | None:
    """The folder of SBD that holds cls/: in the root or in VOC2012, or beside VOC2012 or VOCdevkit, even if that is above the root."""
    names = ("sbd", "SBD", "benchmark_RELEASE/dataset")
    above = [folder.parent.parent] if folder.parent.name == "VOCdevkit" else []
    candidates = [base / name for base in (root, folder, folder.parent, *above) for name in names]
    return next((candidate for candidate in candidates if (candidate / "cls").is_dir()), None)
