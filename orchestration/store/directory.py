"""A store in a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import pwd
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from orchestration.errors import Conflict, NotFound, StoreError, StoreUnavailable
from orchestration.store.base import UnfinishedWrite, checked, checked_prefix
from orchestration.store.retry import TransientFault, retried

log = logging.getLogger(__name__)

T = TypeVar("T")

_STAGED = ".new-"
"""Prefix of the names of unfinished files."""

_STRAY_AFTER_S = 3600.0
"""Age from which an unfinished file is taken to be a dead writer's."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
_TRANSIENT = (*_FULL, errno.ESTALE, errno.EIO, errno.EROFS, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOLCK)
"""Errors of a disk or a network file system that may pass."""


@dataclass(frozen=True)
class DirectoryStore:
    """A store in a folder, local or on a network file system. All users must see the folder, and `flock` must work.

    New files and folders take the permissions of `root`, so that its users can share it. A full, failing or read-only disk is tried
    again for `deadline_s` seconds.
    """

    root: Path
    deadline_s: float = field(default=600.0, kw_only=True)
    _denied_folders: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)
    """Those that a warning has named."""

    @property
    def uri(self) -> str:
        return self.root.as_uri()

    def read(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)
        return self._retried(path, lambda _: _read(path, key))

    def write(self, key: str, body: bytes) -> None:
        path = self._path(key)

        def once(_: bool) -> None:
            with self._staged(path, body) as staged, self._locked():
                _publish(staged, path)

        self._retried(path, once, body)

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        path, digest = self._path(key), _sha256(body)

        def once(unsure: bool) -> None:
            with self._staged(path, body) as staged, self._locked():
                present = _etag(path, key)
                if present != expected and not (unsure and present == digest):  # an earlier try may have renamed the file
                    raise Conflict(key)
                _publish(staged, path)

        self._retried(path, once, body)
        return digest

    def delete(self, keys: Iterable[str]) -> None:
        for path in map(self._path, keys):
            self._retried(path, lambda _, path=path: self._delete(path))  # type: ignore[misc]

    def _delete(self, path: Path) -> None:
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
            self._retried(path, lambda _, path=path: path.unlink(missing_ok=True))  # type: ignore[misc]
            _remove_if_empty(path.parent)

    def _below(self, prefix: str) -> list[tuple[str, os.stat_result]]:
        """All files whose path relative to the root starts with `prefix`, including hidden ones, sorted."""
        folder = self.root / checked_prefix(prefix).rpartition("/")[0]
        return self._retried(folder, lambda _: self._listed(folder, prefix))

    def _listed(self, folder: Path, prefix: str) -> list[tuple[str, os.stat_result]]:
        found = []
        for path in self._files_below(folder):
            place = path.relative_to(self.root).as_posix()
            with suppress(FileNotFoundError):  # deleted since it was listed
                if place.startswith(prefix):
                    found.append((place, path.stat()))
        return sorted(found, key=lambda entry: entry[0])

    def _files_below(self, folder: Path) -> Iterator[Path]:
        def tolerate(error: OSError) -> None:
            # os.walk ignores errors by default: an unreadable folder would look empty, and its checkpoints lost
            denied = Path(error.filename)
            if isinstance(error, PermissionError) and denied != folder:
                if denied not in self._denied_folders:
                    log.warning("%s; what is in it is left out", _denied(denied))
                self._denied_folders.add(denied)
            elif not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise error

        for parent, _, names in os.walk(folder, onerror=tolerate):
            yield from (Path(parent, name) for name in names)

    def _path(self, key: str) -> Path:
        return self.root / checked(key)

    def _retried(self, path: Path, operation: Callable[[bool], T], body: bytes = b"") -> T:
        """The result of `operation`, tried again while the disk is full, failing or read-only. `body`: what is being written."""

        def once(unsure: bool) -> T:
            with _store_errors(path, body):
                return operation(unsure)

        try:
            return retried(once, uri=self.uri, deadline_s=self.deadline_s, log=log)
        except TransientFault as fault:
            raise StoreUnavailable(str(fault)) from fault.__cause__

    def _mode(self) -> int:
        """Permissions of the root, with its setgid bit."""
        return stat.S_IMODE(self.root.stat().st_mode)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the store. It is held only while a name changes; the kernel frees it when its holder dies."""
        self._make_durable(self.root)
        with (self.root / ".lock").open("ab") as lock:
            if os.fstat(lock.fileno()).st_uid == os.geteuid():
                os.fchmod(lock.fileno(), self._mode() & 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _staged(self, path: Path, body: bytes) -> Iterator[Path]:
        """The body, durable under a hidden name beside `path`. Deleted at the end unless it was published."""
        self._make_durable(path.parent)
        _remove_strays(path.parent)
        staged = path.parent / f"{_STAGED}{uuid.uuid4().hex}"
        try:
            with staged.open("xb") as file:
                os.fchmod(file.fileno(), self._mode() & 0o666)
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            with suppress(OSError):  # the error of the write is reported; gc removes the file
                staged.unlink(missing_ok=True)

    def _make_durable(self, folder: Path) -> None:
        """Create the folder and its parents so that they survive a power cut: a new name is durable once its parent is synced."""
        if folder.is_dir():
            return
        self._make_durable(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
            if self.root in folder.parents:
                folder.chmod(self._mode())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        _sync(folder.parent)


def _read(path: Path, key: str) -> tuple[bytes, str]:
    try:
        body = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(key) from None
    return body, _sha256(body)


def _etag(path: Path, key: str) -> str | None:
    try:
        return _read(path, key)[1]
    except NotFound:
        return None


def _publish(staged: Path, path: Path) -> None:
    staged.replace(path)
    _sync(path.parent)


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
        except (FileNotFoundError, PermissionError):  # deleted since it was listed, or another user's
            continue


def _name(place: str) -> str:
    return place.rpartition("/")[2]


def _hidden(place: str) -> bool:
    return _name(place).startswith(".")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty
        folder.rmdir()


@contextmanager
def _store_errors(path: Path, body: bytes = b"") -> Iterator[None]:
    """Convert OSError to StoreError. `body`: what is being written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise TransientFault(f"{path}: disk full: {len(body)} bytes needed{_free(path)}; free some space, then run again") from error
        if error.errno in _TRANSIENT:
            raise TransientFault(f"{path}: {error.strerror}; check the disk or the network file system, then run again") from error
        if isinstance(error, PermissionError):
            raise StoreError(_denied(Path(error.filename or path))) from error
        raise StoreError(f"{path}: {error}") from error


def _denied(path: Path) -> str:
    """Which user may not use which folder, and what to do."""
    folder = path if os.path.isdir(path) else path.parent  # noqa: PTH112  (unlike is_dir, it raises nothing)
    try:
        status = folder.stat()
        owner = f" belongs to {_user(status.st_uid)} with mode {stat.S_IMODE(status.st_mode):o}"
    except OSError:
        owner = " cannot be looked at"
    return f"{path}: user {_user(os.geteuid())} has no permission: the folder {folder}{owner}; give the user's group access: chmod -R g+rwX"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _free(path: Path) -> str:
    try:
        return f", {shutil.disk_usage(path.parent).free} free"
    except OSError:
        return ""


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
