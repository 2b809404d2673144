"""Your own data set as a folder: images/, masks/ with the same names, optionally unlabeled/, and dataset.yaml that describes the masks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rrn_core.data.files import ImageRecord, SplitName, matching, unused_in
from rrn_core.data.images import IMAGE_SUFFIXES
from rrn_core.data.labels import VOID, Colour, Legend, colour_meanings, label_table, voc_palette
from rrn_core.data.lists import first_few, image_name, read_list, repeated
from rrn_core.errors import DataError
from rrn_core.yaml12 import YamlError, parse

MASKS = (".png",)

EXAMPLE = "classes: [background, cat, dog]"

_SHOWN = 8
"""Items of a list that a message quotes."""
_KEYS = ("classes", "values", "void", "void_colours", "bits")


class Folder:
    """An image of images/ is labelled if masks/ has a PNG of the same name, else unlabelled. Images of unlabeled/ are always unlabelled.

    val.txt lists the validation images. train.txt is optional and lists the images of images/ to train on, in order. Without it these are
    all images that val.txt does not list, sorted.

    dataset.yaml has these keys:
        classes: names of the classes in the order of their values in the masks, or a mapping from names to colours [r, g, b]. Masks in RGB,
            or with a palette of another order, are mapped by these colours; pictures show them.
        values: optional; the values of the classes in the masks, if not 0, 1, 2, ... (a binary mask: [0, 255]).
        void: optional; a value or a list of values that are neither trained nor evaluated, if not 255.
        void_colours: optional; a colour [r, g, b] or a list of colours of void in such masks.
        bits: optional; bits of a pixel value in 16-bit images, 8..16, if not those that each image needs.

    Raises:
        DataError: a folder, a list or dataset.yaml that is missing or wrong, two files of one name, or a mask without an image.
    """

    def __init__(self, root: Path) -> None:
        self.list_folder = root
        self.classes, self.palette, self.legend, self.bits = _description(root / "dataset.yaml")
        self._images = _by_name(root / "images", IMAGE_SUFFIXES)
        self._masks = _by_name(root / "masks", MASKS)
        self._unlabeled = _by_name(root / "unlabeled", IMAGE_SUFFIXES) if (root / "unlabeled").is_dir() else {}
        if unmatched := sorted(set(self._masks) - set(self._images)):
            counted = f"{len(unmatched)} of {len(self._masks)} masks have no image of the same name in images/"
            raise DataError(f"{root / 'masks'}: {counted}: {first_few(unmatched)}; rename or remove the masks")
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

    def unused(self) -> Iterator[str]:
        for folder, suffixes in (("images", IMAGE_SUFFIXES), ("masks", MASKS), ("unlabeled", IMAGE_SUFFIXES)):
            yield from unused_in(self.list_folder / folder, *suffixes)

    def _training(self) -> tuple[str, ...]:
        file = self.list_folder / "train.txt"
        if file.is_file():
            return read_list(file)
        return tuple(sorted(set(self._images) - set(self.val_names())))


def _by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by the names of their images, as lists name them."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; data_root must hold images/, masks/, dataset.yaml and val.txt")
    files = matching(folder, *suffixes)
    names = [image_name(file.name) for file in files]
    if duplicates := repeated(names):
        raise DataError(f"{folder}: more than one file of the same name: {first_few(duplicates)}; keep one")
    if not files and folder.name != "unlabeled":
        raise DataError(f"{folder}: holds no {', '.join(suffixes)} files")
    return dict(zip(names, files, strict=True))


def _description(file: Path) -> tuple[tuple[str, ...], tuple[Colour, ...], Legend, int | None]:
    """Class names, colours for pictures, legend and bits of a dataset.yaml. Raises DataError with every fault of the file on one line."""
    document = _read(file)
    if faults := list(_faults(document)) or list(_contradictions(document)):
        raise DataError(f"{file}: {'; '.join(faults)}")
    classes, values = document["classes"], _values(document)
    table = label_table({**dict.fromkeys(_void(document), VOID), **{value: k for k, value in enumerate(values)}})
    assumed = 0 if "values" in document or "void" in document else len(classes)
    if not isinstance(classes, dict):
        return tuple(classes), voc_palette(len(classes)), Legend(table, described=True, assumed=assumed), document.get("bits")
    colours = tuple((red, green, blue) for red, green, blue in classes.values())
    legend = Legend(table, colour_meanings(colours, void=_void_colours(document)), described=True, assumed=assumed)
    return tuple(classes), colours, legend, document.get("bits")


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
        yield f"must be a mapping with classes, for example `{EXAMPLE}`, got {_shown(document)}"
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
    if not all(map(_is_colour, _void_colours(document))):
        yield f"void_colours: must be a colour [r, g, b] of 0..255 or a list of colours, got {_shown(document['void_colours'])}"
    if "bits" in document and not (_is_byte(document["bits"]) and 8 <= document["bits"] <= 16):
        yield f"bits: must be 8..16, the bits of a pixel value in 16-bit images, got {_shown(document['bits'])}"


def _class_faults(classes: Any) -> Iterator[str]:
    if not isinstance(classes, list | dict) or not 2 <= len(classes) <= 255:
        yield f"classes: must be 2 to 255 names, including the background if it has a value, got {_shown(classes)}"
        return
    for name in classes:
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
            yield f"classes: a name must consist of letters, digits and _, because metrics contain it; got {name!r}"
    if duplicates := repeated(map(str, classes)):
        yield f"classes: named more than once: {first_few(duplicates)}"
    for name, colour in classes.items() if isinstance(classes, dict) else ():
        if not _is_colour(colour):
            yield f"classes.{name}: must be a colour [r, g, b] of 0..255, got {colour}"


def _value_faults(key: str, values: Any) -> Iterator[str]:
    if not all(map(_is_byte, values if isinstance(values, list) else [values])) or (key == "values" and not isinstance(values, list)):
        yield f"{key}: must be {'a list of values' if key == 'values' else 'a value or a list of values'} in 0..255, got {_shown(values)}"


def _contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    """The faults between keys that have no fault by themselves."""
    values, void = _values(document), _void(document)
    if len(values) != len(document["classes"]):
        yield f"values: must be one for each of the {len(document['classes'])} classes, got {len(values)}"
    if duplicates := repeated(map(str, values)):
        yield f"values: given more than once: {first_few(duplicates)}"
    if "void_colours" in document and not isinstance(document["classes"], dict):
        yield "void_colours: needs a colour for each class too, for example `classes: {background: [0, 0, 0], cat: [255, 0, 0]}`"
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


def _void_colours(document: Mapping[str, Any]) -> list[Any]:
    written = document.get("void_colours", [])
    if not isinstance(written, list):
        return [written]
    return [tuple(colour) for colour in ([written] if any(map(_is_byte, written)) else written)]


def _is_colour(colour: Any) -> bool:
    return isinstance(colour, list | tuple) and len(colour) == 3 and all(map(_is_byte, colour))


def _shown(value: Any) -> str:
    """A value as text; a long list by its first items and its length."""
    if isinstance(value, list | dict) and len(value) > _SHOWN:
        return f"{len(value)}: {first_few(map(str, value), _SHOWN)}"
    return str(value)


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255  # not isinstance, which accepts bool
