"""Any data set as a folder: images/ and masks/ of the same names, perhaps unlabeled/, and dataset.yaml that says what the masks mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rrn_core.data.files import VOID, Colour, ImageRecord, SplitName, label_table, voc_palette
from rrn_core.data.lists import image_name, read_list, repeated, some

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MASKS = (".png",)

EXAMPLE = "classes: [background, cat, dog]"

_KEYS = ("classes", "values", "void")


class Folder:
    """Images are labelled where masks/ has a PNG of the same name, and unlabelled otherwise; those of unlabeled/ always are.

    val.txt names the validation images. train.txt, where it is there, names all other images of images/ that take part, in their order;
    without it, they are all that val.txt does not name, sorted.

    dataset.yaml has `classes`: their names in the order of their values in the masks, or a mapping of names to colours [r, g, b] for
    pictures; perhaps `values`: what the classes are in the masks, if not 0, 1, 2, ... (a binary mask: [0, 255]); and perhaps `void`: a
    value or values that are neither trained nor evaluated, if not 255.

    Raises:
        ValueError: a folder or dataset.yaml that is missing or wrong, two files of one name, or a mask without an image.
    """

    def __init__(self, root: Path) -> None:
        self.list_folder = root
        self.classes, self.palette, self.table = _described(root / "dataset.yaml")
        self._images = _by_name(root / "images", IMAGES)
        self._masks = _by_name(root / "masks", MASKS)
        self._unlabeled = _by_name(root / "unlabeled", IMAGES) if (root / "unlabeled").is_dir() else {}
        if lonely := sorted(set(self._masks) - set(self._images)):
            raise ValueError(f"{root / 'masks'}: {some(lonely)}: no image of that name in images/; give both the same name")
        if both := sorted(set(self._images).intersection(self._unlabeled)):
            raise ValueError(f"{root / 'unlabeled'}: {some(both)} is in images/ too; remove one of them")

    def train_names(self) -> tuple[str, ...]:
        names = tuple(name for name in self._training() if name in self._masks)
        if not names:
            raise ValueError(f"{self.list_folder / 'masks'}: no training image has a mask; a mask is called like its image, with .png")
        return names

    def unlabeled_names(self) -> tuple[str, ...]:
        return (*(name for name in self._training() if name not in self._masks), *sorted(self._unlabeled))

    def val_names(self) -> tuple[str, ...]:
        file = self.list_folder / "val.txt"
        if not file.is_file():
            raise ValueError(f"{file}: no such list; write into it the names of the validation images, one a line, out of those in masks/")
        return read_list(file)

    def find(self, name: str, split: SplitName) -> ImageRecord:
        image = self._images.get(name) or self._unlabeled.get(name)
        if image is None:
            raise ValueError(f"{self.list_folder / 'images'}: no image is called {name}, {split} lists it")
        return ImageRecord(name, image, self._masks.get(name))

    def _training(self) -> tuple[str, ...]:
        file = self.list_folder / "train.txt"
        if file.is_file():
            return read_list(file)
        return tuple(sorted(set(self._images) - set(self.val_names())))


def _by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by the name that lists give them."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; data_root must hold images/, masks/, dataset.yaml and val.txt")
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    names = [image_name(file.name) for file in files]
    if twice := repeated(names):
        raise ValueError(f"{folder}: {some(twice)}: more than one file of that name; keep one")
    if not files and folder.name != "unlabeled":
        raise ValueError(f"{folder}: holds no {', '.join(suffixes)}")
    return dict(zip(names, files, strict=True))


def _described(file: Path) -> tuple[tuple[str, ...], tuple[Colour, ...], NDArray[np.int16]]:
    """Class names, colours and the label table of a dataset.yaml. Raises ValueError with every fault of the file, in one line."""
    document = _read(file)
    if faults := list(_faults(document)) or list(_clashes(document)):
        raise ValueError(f"{file}: {'; '.join(faults)}")
    classes, values = document["classes"], _values(document)
    table = label_table({**dict.fromkeys(_void(document), VOID), **{value: k for k, value in enumerate(values)}})
    colours = [(red, green, blue) for red, green, blue in classes.values()] if isinstance(classes, dict) else voc_palette(len(classes))
    return tuple(classes), tuple(colours), table


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
        twice, document = _repeated_keys(yaml.compose(text, yaml.SafeLoader)), yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}; write into it, for example, `{EXAMPLE}`") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if twice:
        raise ValueError(f"{file}: {some(twice)} stands twice; keep one")
    return document


def _repeated_keys(document: yaml.Node | None) -> list[str]:
    """Of the mapping and of those within it: loading would keep the last value of each in silence."""
    outer = document.value if isinstance(document, yaml.MappingNode) else []
    inner = [pair for _, node in outer if isinstance(node, yaml.MappingNode) for pair in node.value]
    return [key for pairs in (outer, inner) for key in repeated(str(node.value) for node, _ in pairs)]


def _faults(document: Any) -> Iterator[str]:
    """What is wrong with the keys, each for itself."""
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
        yield f"classes: is missing; for example `{EXAMPLE}`"
    for key in ("values", "void"):
        yield from _value_faults(key, document.get(key, []))


def _class_faults(classes: Any) -> Iterator[str]:
    if not isinstance(classes, list | dict) or not 2 <= len(classes) <= 255:
        yield f"classes: must be 2 to 255 names, with the background where it has a value, got {classes}"
        return
    for name in classes:
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
            yield f"classes: a name has letters, digits and _ only, because it becomes part of a metric's name; got {name!r}"
    if twice := repeated(map(str, classes)):
        yield f"classes: {some(twice)} stands twice"
    for name, colour in classes.items() if isinstance(classes, dict) else ():
        if not isinstance(colour, list) or len(colour) != 3 or not all(map(_is_byte, colour)):
            yield f"classes.{name}: must be a colour [r, g, b] of 0..255, got {colour}"


def _value_faults(key: str, values: Any) -> Iterator[str]:
    if not all(map(_is_byte, values if isinstance(values, list) else [values])) or (key == "values" and not isinstance(values, list)):
        yield f"{key}: must be {'a list of values' if key == 'values' else 'a value or a list of values'} in 0..255, got {values}"


def _clashes(document: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong between keys that are right each for itself."""
    values, void = _values(document), _void(document)
    if len(values) != len(document["classes"]):
        yield f"values: must be one for each of the {len(document['classes'])} classes, got {len(values)}"
    if twice := repeated(map(str, values)):
        yield f"values: {some(twice)} stands twice"
    for value in void:
        if value in values:
            name = list(document["classes"])[values.index(value)]
            yield f"void: {value} is the value of class {name}; take it out, or give the classes other ones by values: [...]"


def _values(document: Mapping[str, Any]) -> list[int]:
    return list(document.get("values", range(len(document["classes"]))))


def _void(document: Mapping[str, Any]) -> list[int]:
    if "void" not in document:
        return [] if VOID in _values(document) else [VOID]
    return document["void"] if isinstance(document["void"], list) else [document["void"]]


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255  # and no bool
