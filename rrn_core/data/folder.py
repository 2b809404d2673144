"""Your own data set as a folder: images/, masks/ with the same names, optionally unlabeled/, and dataset.yaml that describes the masks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rrn_core.data.files import VOID, Colour, ImageRecord, SplitName, label_table, voc_palette
from rrn_core.data.lists import first_few, image_name, read_list, repeated
from rrn_core.errors import DataError
from rrn_core.yaml12 import YamlError, parse

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASKS = (".png",)

EXAMPLE = "classes: [background, cat, dog]"

_KEYS = ("classes", "values", "void")


class Folder:
    """An image of images/ is labelled if masks/ has a PNG of the same name, else unlabelled. Images of unlabeled/ are always unlabelled.

    val.txt lists the validation images. train.txt is optional and lists the images of images/ to train on, in order. Without it these are
    all images that val.txt does not list, sorted.

    dataset.yaml has these keys:
        classes: names of the classes in the order of their values in the masks, or a mapping from names to colours [r, g, b] for pictures.
        values: optional; the values of the classes in the masks, if not 0, 1, 2, ... (a binary mask: [0, 255]).
        void: optional; a value or a list of values that are neither trained nor evaluated, if not 255.

    Raises:
        DataError: a folder, a list or dataset.yaml that is missing or wrong, two files of one name, or a mask without an image.
    """

    def __init__(self, root: Path) -> None:
        self.list_folder = root
        self.classes, self.palette, self.table = _description(root / "dataset.yaml")
        self._images = _by_name(root / "images", IMAGES)
        self._masks = _by_name(root / "masks", MASKS)
        self._unlabeled = _by_name(root / "unlabeled", IMAGES) if (root / "unlabeled").is_dir() else {}
        if unmatched := sorted(set(self._masks) - set(self._images)):
            raise DataError(f"{root / 'masks'}: no image of the same name in images/: {first_few(unmatched)}; rename or remove the masks")
        if both := sorted(set(self._images).intersection(self._unlabeled)):
            raise DataError(f"{root / 'unlabeled'}: also in images/: {first_few(both)}; remove one of the files")

    def train_names(self) -> tuple[str, ...]:
        names = tuple(name for name in self._training() if name in self._masks)
        if not names:
            raise DataError(f"{self.list_folder / 'masks'}: no training image has a mask; a mask has the name of its image with .png")
        return names

    def unlabeled_names(self) -> tuple[str, ...]:
        return (*(name for name in self._training() if name not in self._masks), *sorted(self._unlabeled))

    def val_names(self) -> tuple[str, ...]:
        file = self.list_folder / "val.txt"
        if not file.is_file():
            raise DataError(f"{file}: no such list; write into it the names of the validation images, one per line; each needs a mask")
        return read_list(file)

    def find(self, name: str, split: SplitName) -> ImageRecord:
        image = self._images.get(name) or self._unlabeled.get(name)
        if image is None:
            raise DataError(f"{self.list_folder / 'images'}: has no image {name}, but the {split} list names it")
        return ImageRecord(name, image, self._masks.get(name))

    def _training(self) -> tuple[str, ...]:
        file = self.list_folder / "train.txt"
        if file.is_file():
            return read_list(file)
        return tuple(sorted(set(self._images) - set(self.val_names())))


def _by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by the names of their images, as lists name them."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; data_root must hold images/, masks/, dataset.yaml and val.txt")
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    names = [image_name(file.name) for file in files]
    if duplicates := repeated(names):
        raise DataError(f"{folder}: more than one file of the same name: {first_few(duplicates)}; keep one")
    if not files and folder.name != "unlabeled":
        raise DataError(f"{folder}: holds no {', '.join(suffixes)} files")
    return dict(zip(names, files, strict=True))


def _description(file: Path) -> tuple[tuple[str, ...], tuple[Colour, ...], NDArray[np.int16]]:
    """Class names, colours and the label table of a dataset.yaml. Raises DataError with every fault of the file on one line."""
    document = _read(file)
    if faults := list(_faults(document)) or list(_contradictions(document)):
        raise DataError(f"{file}: {'; '.join(faults)}")
    classes, values = document["classes"], _values(document)
    table = label_table({**dict.fromkeys(_void(document), VOID), **{value: k for k, value in enumerate(values)}})
    colours = [(red, green, blue) for red, green, blue in classes.values()] if isinstance(classes, dict) else voc_palette(len(classes))
    return tuple(classes), tuple(colours), table


def _read(file: Path) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; write into it, for example, `{EXAMPLE}`") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not valid YAML: {error}") from error
    except YamlError as error:
        raise DataError(f"{file}: {error}") from error


def _faults(document: Any) -> Iterator[str]:
    """The faults of each key by itself."""
    if not isinstance(document, dict):
        yield f"must be a mapping with classes, for example `{EXAMPLE}`, got {document}"
        return
    for key in document:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, 1)
            yield f"{key}: unknown key{f', did you mean {close[0]}?' if close else ''} (known: {', '.join(_KEYS)})"
    if "classes" in document:
        yield from _class_faults(document["classes"])
    else:
        yield f"classes: missing; write, for example, `{EXAMPLE}`"
    for key in ("values", "void"):
        yield from _value_faults(key, document.get(key, []))


def _class_faults(classes: Any) -> Iterator[str]:
    if not isinstance(classes, list | dict) or not 2 <= len(classes) <= 255:
        yield f"classes: must be 2 to 255 names, including the background if it has a value, got {classes}"
        return
    for name in classes:
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
            yield f"classes: a name must consist of letters, digits and _, because metrics contain it; got {name!r}"
    if duplicates := repeated(map(str, classes)):
        yield f"classes: named more than once: {first_few(duplicates)}"
    for name, colour in classes.items() if isinstance(classes, dict) else ():
        if not isinstance(colour, list) or len(colour) != 3 or not all(map(_is_byte, colour)):
            yield f"classes.{name}: must be a colour [r, g, b] of 0..255, got {colour}"


def _value_faults(key: str, values: Any) -> Iterator[str]:
    if not all(map(_is_byte, values if isinstance(values, list) else [values])) or (key == "values" and not isinstance(values, list)):
        yield f"{key}: must be {'a list of values' if key == 'values' else 'a value or a list of values'} in 0..255, got {values}"


def _contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    """The faults between keys that have no fault by themselves."""
    values, void = _values(document), _void(document)
    if len(values) != len(document["classes"]):
        yield f"values: must be one for each of the {len(document['classes'])} classes, got {len(values)}"
    if duplicates := repeated(map(str, values)):
        yield f"values: given more than once: {first_few(duplicates)}"
    for value in void:
        if value in values:
            name = list(document["classes"])[values.index(value)]
            yield f"void: {value} is the value of class {name}; remove it, or set other values of the classes by values: [...]"


def _values(document: Mapping[str, Any]) -> list[int]:
    return list(document.get("values", range(len(document["classes"]))))


def _void(document: Mapping[str, Any]) -> list[int]:
    if "void" not in document:
        return [] if VOID in _values(document) else [VOID]
    return document["void"] if isinstance(document["void"], list) else [document["void"]]


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255  # not isinstance, which accepts bool
