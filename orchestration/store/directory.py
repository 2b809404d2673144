"""A store in a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestration.errors import Conflict, NotFound, StoreError
from orchestration.store.base import UnfinishedWrite, checked, checked_prefix

_STAGED = ".new-"
"""Prefix of the names of unfinished files."""

_STRAY_AFTER_S = 3600.0
"""Age from which an unfinished file is taken to be a dead writer's."""


@dataclass(frozen=True)
class DirectoryStore:
    """A store in a folder, local or on a network file system. All users must see the folder, and `flock` must work."""

    root: Path

    @property
    def uri(self) -> str:
        return self.root.as_uri()

    def read(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)
        with _store_errors(path):
            try:
                body = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NotFound(key) from None
        return body, _sha256(body)

    def write(self, key: str, body: bytes) -> None:
        path = self._path(key)
        with _store_errors(path, body), _staged(path, body) as staged, self._locked():
            _publish(staged, path)

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        path = self._path(key)
        with _store_errors(path, body), _staged(path, body) as staged, self._locked():
            if self._etag(key) != expected:
                raise Conflict(key)
            _publish(staged, path)
        return _sha256(body)

    def delete(self, keys: Iterable[str]) -> None:
        for path in map(self._path, keys):
            with _store_errors(path):
                if path.is_file():
                    with self._locked():
                        path.unlink(missing_ok=True)
                    _remove_if_empty(path.parent)

    def keys(self, prefix: str) -> Iterator[str]:
        return iter(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        return {key: status.st_size for key, status in self._below(prefix) if not _hidden(key)}

    def unfinished(self, prefix: str) -> Iterator[UnfinishedWrite]:
        for place, status in self._below(prefix):
            if _hidden(place) and _name(place).startswith(_STAGED):
                yield UnfinishedWrite(place, "", time.time() - status.st_mtime, status.st_size)

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        for write in writes:
            assert _name(write.place).startswith(_STAGED), write.place
            path = self.root / write.place
            with _store_errors(path):
                path.unlink(missing_ok=True)
                _remove_if_empty(path.parent)

    def _below(self, prefix: str) -> list[tuple[str, os.stat_result]]:
        """All files whose path relative to the root starts with `prefix`, including hidden ones, sorted."""
        folder = self.root / checked_prefix(prefix).rpartition("/")[0]
        found = []
        with _store_errors(folder):
            for path in _files_below(folder):
                place = path.relative_to(self.root).as_posix()
                with suppress(FileNotFoundError):  # deleted since it was listed
                    if place.startswith(prefix):
                        found.append((place, path.stat()))
        return sorted(found, key=lambda entry: entry[0])

    def _path(self, key: str) -> Path:
        return self.root / checked(key)

    def _etag(self, key: str) -> str | None:
        try:
            return self.read(key)[1]
        except NotFound:
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the store. It is held only while a name changes; the kernel frees it when its holder dies."""
        _make_durable(self.root)
        with (self.root / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def _staged(path: Path, body: bytes) -> Iterator[Path]:
    """The body, durable under a hidden name beside `path`. Deleted at the end unless it was published."""
    _make_durable(path.parent)
    _remove_strays(path.parent)
    staged = path.parent / f"{_STAGED}{uuid.uuid4().hex}"
    try:
        with staged.open("xb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def _publish(staged: Path, path: Path) -> None:
    staged.replace(path)
    _sync(path.parent)


def _make_durable(folder: Path) -> None:
    """Create the folder and its parents so that they survive a power cut: a new name is durable once its parent is synced."""
    if not folder.is_dir():
        _make_durable(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_strays(folder: Path) -> None:
    """Delete the files of killed writers. A living writer changes its file far more often than hourly."""
    for stray in folder.glob(f"{_STAGED}*"):
        try:
            if stray.stat().st_mtime < time.time() - _STRAY_AFTER_S:
                stray.unlink()
        except FileNotFoundError:  # its writer or another process deleted it first
            continue


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
        yield from (Path(parent, name) for name in names)


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _hidden(place: str) -> bool:
    return _name(place).startswith(".")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty
        folder.rmdir()


def _raise_unless_gone(error: OSError) -> None:
    # os.walk ignores errors by default: an unreadable folder would look empty, and its checkpoints lost
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


@contextmanager
def _store_errors(path: Path, body: bytes = b"") -> Iterator[None]:
    """Convert OSError to StoreError. `body`: what is being written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{path}: disk full: {len(body)} bytes needed{_free(path)}; free some space, then run again") from error
        raise StoreError(f"{path}: {error}") from error


def _free(path: Path) -> str:
    try:
        return f", {shutil.disk_usage(path.parent).free} free"
    except OSError:
        return ""


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
