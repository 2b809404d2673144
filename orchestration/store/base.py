"""The Protocol of a store: whole, durable objects under keys, with compare-and-swap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from orchestration.errors import Conflict, StoreError

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
"""No part of a key starts with a dot: DirectoryStore uses such names itself, and `..` is impossible."""


@dataclass(frozen=True)
class UnfinishedWrite:
    """A write that is in progress, or whose writer died."""

    place: str
    """The key that the write is for (S3), or the temporary name beside it (directory)."""
    upload: str
    """S3's upload ID; empty for a file."""
    age_s: float
    """Seconds since the writer last changed it. Wrong if a clock was set in between."""
    size: int | None
    """Bytes written so far; None where unknown."""


class Store(Protocol):
    """Whole objects under keys such as `demo/3f2a/manifest.json`.

    An etag identifies content: equal bytes may have equal etags. Two writers that must be distinguished must write different bytes.

    Every method raises StoreError with a one-line text when the store refuses, and ValueError for a malformed key. All methods may
    be called from many threads, processes and machines at once. A store can be pickled and never holds a credential.
    """

    @property
    def uri(self) -> str:
        """Where the store is, in a form that `open_store` accepts."""
        ...

    def read(self, key: str) -> tuple[bytes, str]:
        """The body and its etag. Raises NotFound, or Corrupt when the server's checksum differs."""
        ...

    def write(self, key: str, body: bytes) -> None:
        """Create or replace unconditionally. On return the body is durable. Readers see the old or the new body, never a mix."""
        ...

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        """Compare-and-swap: write if the etag is still `expected` (None: if the key does not exist). Returns the new etag.

        Competing writers must write different bytes (each carries its attempt's number). After a lost reply a writer recognises its
        own success only by its bytes.

        Raises:
            Conflict: another writer was first; nothing was written.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the keys. Missing keys are ignored."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys that start with the string `prefix`, sorted. End it with `/` to list a folder."""
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """The same keys as `keys`, with the size of each in bytes."""
        ...

    def unfinished(self, prefix: str) -> Iterator[UnfinishedWrite]:
        """Unfinished writes to keys that start with `prefix`. No other method shows them."""
        ...

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        """Delete unfinished writes. A writer that is still alive then fails. Missing writes are ignored."""
        ...


NO_ETAG = f'"{"0" * 32}"'
"""An etag that no object has."""


def require_conditions(store: Store, key: str, body: bytes) -> None:
    """Raises StoreError unless the store refuses two puts of `body` whose conditions do not hold. The key must hold another body."""
    for condition, expected in (("If-Match", NO_ETAG), ("If-None-Match", None)):
        if ignores_condition(store, key, body, expected=expected):
            raise StoreError(
                f"{store.uri}: ignores the condition of a conditional put ({condition}), so two drivers could overwrite each other; "
                "use a server that supports it, such as those in docs/guarantees.md"
            )


def ignores_condition(store: Store, key: str, body: bytes, *, expected: str | None = NO_ETAG) -> bool:
    """Whether the store takes `body` although there is another one, whose etag is not `expected`."""
    try:
        store.replace(key, body, expected=expected)
    except Conflict:
        return False
    return True


def is_key(name: str) -> bool:
    return bool(_KEY.fullmatch(name))


def checked(key: str) -> str:
    """The key, unchanged. Raises ValueError if it is malformed."""
    if not is_key(key):
        raise ValueError(f"key must be parts of A-Z, a-z, 0-9, _, - and . joined by /, none starting with a dot, got {key!r}")
    return key


def checked_prefix(prefix: str) -> str:
    """The prefix, unchanged. Raises ValueError if no key can start with it."""
    if prefix:
        checked(prefix.removesuffix("/"))
    return prefix
