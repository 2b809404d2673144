"""Class names: weights and data may number the same classes differently, so the classes are matched by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from rrn_core.errors import DataError

LONGEST_LIST = 12
"""Longest list of names that a message shows completely."""


def order_of(data: Sequence[str], weights: Sequence[str], *, remedy: str) -> tuple[int, ...]:
    """The index in `weights` of each class of `data`.

    Raises:
        DataError: the two do not name the same classes; the text shows both lists and ends with `remedy`.
    """
    ours, theirs = ([unicodedata.normalize("NFC", name) for name in names] for names in (data, weights))
    if sorted(ours) != sorted(theirs) or len(set(ours)) != len(ours):
        raise DataError(f"the weights are for {_listed(weights, data)}, the data have {_listed(data, weights)}; {remedy}")
    index = {name: k for k, name in enumerate(theirs)}
    return tuple(index[name] for name in ours)


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    """`3 classes (sky, road, car)`. Of a long list only the names that `others` lacks."""
    if len(names) <= LONGEST_LIST:
        return f"{len(names)} classes ({', '.join(names)})"
    lacking = [name for name in names if name not in set(others)]
    more = ", ..." if len(lacking) > LONGEST_LIST else ""
    return f"{len(names)} classes (among them {', '.join(lacking[:LONGEST_LIST])}{more})" if lacking else f"{len(names)} classes"
