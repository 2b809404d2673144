"""What a store is: whole objects under keys, durable, with compare-and-swap. The Protocol, the keys, and unfinished writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
"""No part of a key starts with a dot: those names are the directory's own, and `..` cannot be spelled."""


@dataclass(frozen=True)
class UnfinishedWrite:
    """A write that goes on, or whose writer died; `place` is the key that it is for, or the name beside it that holds the bytes so far."""

    place: str
    upload: str
    """S3's name of the upload; empty for a file."""
    age_s: float
    """Since its last sign of life; a clock that was set makes it wrong."""
    size: int | None
    """Bytes so far, where that is known."""


class Store(Protocol):
    """Whole objects under keys such as `trials/3f2a/manifest.json`.

    An etag is a token of the content: equal bytes may have equal etags, so what writers must tell apart must differ in its bytes.
    Every method raises StoreError with one clear line when the store refuses, ValueError for a malformed key. All methods may be
    called from many threads, processes and machines at once, and the store may be pickled; it never holds a credential.
    """

    @property
    def uri(self) -> str:
        """Where the store is, in a form that `open_store` accepts."""
        ...

    def read(self, key: str) -> tuple[bytes, str]:
        """The body and its etag; raises NotFound, or Corrupt when the server's checksum differs."""
        ...

    def write(self, key: str, body: bytes) -> None:
        """Create or replace, unconditionally; on return the body is durable, and readers only ever see the old or the new one."""
        ...

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        """Compare-and-swap: write if the etag is still `expected` (None: if the key doesn't exist), and return the new etag.

        Raises Conflict, and writes nothing, when another writer came first. Rival bodies must differ (each carries its attempt's
        number): after a lost reply a writer knows its own success only by its bytes.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the keys; missing ones are fine."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys that start with the string `prefix`, sorted; end it with `/` to mean a folder."""
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """What `keys` gives, with the bytes of each."""
        ...

    def unfinished(self, prefix: str) -> Iterator[UnfinishedWrite]:
        """Writes to keys that start with `prefix` which go on, or whose writer died; no other method shows them."""
        ...

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        """Remove what they left; one that still goes on fails, and missing ones are fine."""
        ...


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
