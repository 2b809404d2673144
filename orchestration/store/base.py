"""Names in a store: what a key may be, and how a write that is not complete is called."""

from __future__ import annotations

import re
from dataclasses import dataclass

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
"""No part of a key starts with a dot: those names are the directory's own, and `..` cannot be spelled."""


@dataclass(frozen=True)
class Unfinished:
    """A write that goes on, or whose writer died; `place` is the key that it is for, or the name beside it that holds the bytes so far."""

    place: str
    upload: str
    """S3's name of the upload; empty for a file."""
    age_s: float
    """Since its last sign of life; a clock that was set makes it wrong."""
    size: int | None
    """Bytes so far, where that is known."""


def is_key(name: str) -> bool:
    """Whether `name` may be a key."""
    return bool(_KEY.fullmatch(name))


def checked(key: str) -> str:
    """The key itself; raises ValueError where it is malformed."""
    if not is_key(key):
        raise ValueError(f"key must be parts of A-Z, a-z, 0-9, _, - and . joined by /, none starting with a dot, got {key!r}")
    return key


def checked_prefix(prefix: str) -> str:
    """The beginning of keys itself; raises ValueError for what no key begins with."""
    if prefix:
        checked(prefix.removesuffix("/"))
    return prefix
