"""The address of MLflow: `sqlite:///PATH`, whose path is read here alone, or `http(s)://HOST`."""

from __future__ import annotations

import re
from pathlib import Path

from orchestration.errors import TrackingError, without_password

_SQLITE = "sqlite:///"
_UNOPENABLE = re.compile(r"\?|%[0-9a-fA-F]{2}|[\0-\x1f]")


def database_of(address: str) -> Path | None:
    """The file of an SQLite address: what follows the three slashes, as it stands. None for a server."""
    return Path(address.removeprefix(_SQLITE)) if address.startswith(_SQLITE) else None


def absolute(address: str) -> str:
    """An SQLite address with an absolute path, so that it means the same in any folder."""
    database = database_of(address)
    return f"{_SQLITE}{database.resolve()}" if database else address


def checked_address(address: str) -> str:
    """`address` itself. Raises TrackingError unless it is absolute and MLflow can open it."""
    if not re.match(r"sqlite:////.|https?://[^/]", address, re.DOTALL):
        got = without_password(address)
        raise TrackingError(f"tracking: must be sqlite:////absolute/path.db or http(s)://host..., got {got!r}")
    if fault := path_fault(address):
        raise TrackingError(f"tracking: {fault}")
    return address


def path_fault(address: str) -> str | None:
    """Why MLflow cannot open the path of an SQLite address."""
    path = str(database_of(address) or "")
    return f"{path!r}: MLflow cannot open a path with ?, %20 or a line break; name another" if _UNOPENABLE.search(path) else None
