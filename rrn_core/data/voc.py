"""PASCAL VOC 2012 with SBD's additional labels: VOC's own folders, or the copy of them that CPS published."""

from __future__ import annotations

from pathlib import Path

from rrn_core.data.files import DatasetLayout, ImageRecord, SplitName, listed_in, plain_table, present, voc_palette
from rrn_core.data.lists import read_list

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
    """The layout found at `root`: VOC2012, VOCdevkit or what holds it, CPS's pascal_voc or what holds it.

    Raises:
        ValueError: neither is there.
    """
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return _Devkit(folder, sbd=_find_sbd(root, folder))
    for folder in (root, root / "pascal_voc"):
        if any((folder / split / "image").is_dir() for split in ("train_aug", "val")):
            return _Cps(folder)
    raise ValueError(f"{root}: not VOC 2012; data_root must hold VOCdevkit/VOC2012/JPEGImages, or CPS's pascal_voc/train_aug/image")


class _Voc:
    classes = CLASSES
    palette = voc_palette(len(CLASSES))
    table = plain_table(len(CLASSES))

    def unlabeled_names(self) -> tuple[str, ...]:
        return ()


class _Devkit(_Voc):
    """JPEGImages beside SegmentationClass, SegmentationClassAug (grey or palette), and ImageSets; SBD as `_find_sbd` says.

    A training image takes its label from SegmentationClassAug, else VOC's own, else SBD's: where both have one, VOC's is finer and knows
    void borders. SBD labels validation images too, but evaluation must not use these.
    """

    def __init__(self, folder: Path, *, sbd: Path | None) -> None:
        self.list_folder = folder / "ImageSets" / "Segmentation"
        self._images = folder / "JPEGImages"
        self._own = folder / "SegmentationClass"
        self._augmented = folder / "SegmentationClassAug"
        self._sbd = sbd / "cls" if sbd else None

    def train_names(self) -> tuple[str, ...]:
        """The 10582 images of train_aug sorted, of which every k-th is a published partition (METHOD.md 0.6).

        They come from a list of that name, or are all images with a label but those of val.txt. SBD's train_noval.txt, as torchvision
        gives it, is another list: 5623 images of SBD's training list that VOC does not validate on, usable as `train_list`.
        """
        file = present(self.list_folder / name for name in ("train_aug.txt", "trainaug.txt"))
        if file:
            return tuple(sorted(read_list(file)))
        names = self._with_label() - set(self.val_names())
        plain = present([self.list_folder / "train.txt"])
        if not names or (plain and names <= set(read_list(plain))):
            raise ValueError(
                f"{self._images.parent}: has labels for {len(names)} training images, train_aug has 10582; add SegmentationClassAug or SBD "
                f"(data_root/sbd/cls), or set train_list: train.txt for VOC's own 1464 images"
            )
        return tuple(sorted(names))

    def val_names(self) -> tuple[str, ...]:
        return read_list(self.list_folder / "val.txt")

    def find(self, name: str, split: SplitName) -> ImageRecord:
        own, augmented = self._own / f"{name}.png", self._augmented / f"{name}.png"
        if split == "val":
            return _record(name, self._images, [own, augmented])
        return _record(name, self._images, [augmented, own, *([self._sbd / f"{name}.mat"] if self._sbd else [])])

    def _with_label(self) -> set[str]:
        additional = listed_in(self._sbd, ".mat") if self._sbd else ()
        return {*listed_in(self._augmented, ".png"), *listed_in(self._own, ".png"), *additional}


class _Cps(_Voc):
    """train_aug/image, train_aug/label, val/image and val/label; grey labels of all 10582 images (METHOD.md 3)."""

    def __init__(self, root: Path) -> None:
        self.list_folder = root

    def train_names(self) -> tuple[str, ...]:
        return self._named(self.list_folder / "train_aug")

    def val_names(self) -> tuple[str, ...]:
        file = self.list_folder / "val.txt"
        return read_list(file) if file.is_file() else self._named(self.list_folder / "val")

    def find(self, name: str, split: SplitName) -> ImageRecord:
        folder = self.list_folder / ("train_aug" if split == "train" else "val")
        return _record(name, folder / "image", [folder / "label" / f"{name}.png"])

    def _named(self, folder: Path) -> tuple[str, ...]:
        names = listed_in(folder / "image", ".jpg")
        if not names:
            raise ValueError(f"{folder / 'image'}: holds no ID.jpg; copy the {folder.name} images of CPS's pascal_voc there")
        return names


def _find_sbd(root: Path, folder: Path) -> Path | None:
    """The folder of SBD that holds cls/: within the root or VOC2012, beside that, or beside VOCdevkit; folders above the root count too."""
    names = ("sbd", "SBD", "benchmark_RELEASE/dataset")
    above = [folder.parent.parent] if folder.parent.name == "VOCdevkit" else []
    places = [base / name for base in (root, folder, folder.parent, *above) for name in names]
    return next((place for place in places if (place / "cls").is_dir()), None)


def _record(name: str, images: Path, labels: list[Path]) -> ImageRecord:
    image = present([images / f"{name}.jpg"])
    if image is None:
        raise ValueError(f"{images}: {name}.jpg is missing, a list names it")
    return ImageRecord(name, image, present(labels))
