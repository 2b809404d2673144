"""Opens the store that a URI names."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestration.errors import StoreError
from orchestration.store.base import Store
from orchestration.store.directory import DirectoryStore
from orchestration.store.s3 import s3_store


def open_store(uri: str, *, deadline_s: float = 600.0) -> Store:
    """The store at `s3://bucket/prefix`, `file:///path` or a path. Contacts and creates nothing.

    A relative path becomes absolute. An operation on an absent server, or a full or failing disk, retries for `deadline_s` seconds.

    Raises:
        StoreError: `uri` has another form.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", uri)
    if not uri.strip() or (scheme and scheme[1] not in ("s3", "file")):
        raise StoreError(f"store: expected s3://bucket/prefix, file:///path or a path, got {uri!r}")
    if not scheme:
        return DirectoryStore(Path(uri).expanduser().absolute(), deadline_s=deadline_s)
    return s3_store(uri, deadline_s) if scheme[1] == "s3" else _file_store(uri, deadline_s)


def _file_store(uri: str, deadline_s: float) -> DirectoryStore:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or parts.path in ("", "/"):
        raise StoreError(f"store: expected file:///absolute/path, got {uri!r}")
    return DirectoryStore(Path(unquote(parts.path)), deadline_s=deadline_s)
