"""The palettes of label files against each other: two orders of the same colours mean that values are not classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rrn_core.data.labels import VOID, Colour, DecodedLabel, Legend, decode_label, palette_of
from rrn_core.errors import DataError


def require_one_order(files: Sequence[Path], legend: Legend) -> None:
    """Compare the palettes of label files. Only headers are read if one palette continues all others, as it mostly does.

    Raises:
        DataError: two files that are read by value give a value different colours, or a colour different values.
    """
    palettes = {file: palette for file in files if (palette := palette_of(file))}
    longest = max(palettes.values(), key=len, default=())
    if all(palette == longest[: len(palette)] for palette in set(palettes.values())):
        return
    if found := disagreement(_used(files_with=palettes, legend=legend)):
        raise DataError(found)


def disagreement(used: Iterable[tuple[Path, dict[int, Colour], tuple[Colour, ...]]]) -> str:
    """The first contradiction between palettes as text; empty if there is none.

    Args:
        used: for each file the colours of the values that occur in it, without void, and its whole palette.
    """
    colours: dict[int, tuple[Colour, Path]] = {}
    values: dict[Colour, tuple[int, Path, tuple[Colour, ...]]] = {}
    advice = (
        "state the colours of the classes in dataset.yaml (dataset: folder), then masks are mapped by colour; or save them as grey values"
    )
    for file, found, palette in used:
        for value, colour in found.items():
            other, first = colours.setdefault(value, (colour, file))
            if other != colour:
                return (
                    f"{file}: its palette gives value {value} the colour {list(colour)}, that of {first} gives it {list(other)}; {advice}"
                )
            at, first, whole = values.setdefault(colour, (value, file, palette))
            if at != value and not (palette[at : at + 1] == whole[value : value + 1] == (colour,)):
                return f"{file}: its palette has the colour {list(colour)} at value {value}, that of {first} at {at}; {advice}"
    return ""


def used_colours(label: DecodedLabel) -> dict[int, Colour]:
    """The colours of the values that occur in a label file, without void."""
    found = np.flatnonzero(label.counts).tolist()
    return {value: label.palette[value] for value in found if value < len(label.palette) and label.table[value] != VOID}


def _used(files_with: Iterable[Path], legend: Legend) -> Iterable[tuple[Path, dict[int, Colour], tuple[Colour, ...]]]:
    for file in files_with:
        label = decode_label(file, legend)
        yield file, used_colours(label), label.palette
