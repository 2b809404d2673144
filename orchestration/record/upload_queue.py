"""Checkpoints on their way to the store: one thread commits them in order, and those that wait lie on disk, so that training goes on."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from orchestration.record.manifest import SCORE, EpochMetrics

log = logging.getLogger(__name__)

_PREFIX = "rrn-sweep-outbox-"
_LOCK = ".lock"


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint, and the metrics and pictures of the epochs that were completed since the one before."""

    step: int
    epoch: int
    files: Mapping[str, bytes]
    entries: Sequence[EpochMetrics]
    seconds: float
    at_s: float
    """`time.monotonic()` when it was captured."""
    pictures: Mapping[int, Mapping[str, bytes]] = field(default_factory=dict)
    """Files by epoch; small beside a checkpoint, so they wait in memory."""

    @property
    def size(self) -> int:
        return sum(map(len, self.files.values()))

    @property
    def score(self) -> float | None:
        """`val/miou`, where the checkpoint closes an epoch."""
        return next((entry.metrics[SCORE] for entry in self.entries if entry.step == self.step), None)


@dataclass(frozen=True)
class _QueuedCheckpoint:
    parcel: PendingCheckpoint
    """Without its files, where they lie on disk."""
    size: int
    spooled: tuple[Path, ...] = ()


class UploadQueue:
    """Commits the parcels of one training, which is the only thread that submits.

    Of more than two that wait, only the newest and the best keep their files; entries and pictures of the others go with the next one.

    Leaving the context waits for all of them. While an exception passes, it waits for the one under way only and drops the rest.
    """

    def __init__(self, commit: Callable[[PendingCheckpoint], None], *, limit_bytes: int, folder: Path | None = None) -> None:
        """`commit` blocks for as long as it hopes. The spool lies below `folder` (default: the system's place for temporary files)."""
        self._commit, self._limit_bytes = commit, limit_bytes
        self._spool = _Spool(folder)
        self._change = threading.Condition()
        self._queue: list[_QueuedCheckpoint] = []
        self._under_way, self._closing = False, False
        self._deserted = False
        self._leaving = 0  # bytes on disk of the parcel under way, while it is read back
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def __enter__(self) -> UploadQueue:
        self._spool.sweep()
        self._thread.start()
        return self

    def submit(self, parcel: PendingCheckpoint) -> None:
        """Hand over; waits only while the spool is full or has no disk. Raises what went wrong with an earlier commit."""
        with self._change:
            newest = self._coalesce(parcel)
            idle = self._idle()
        if not idle:
            newest = self._spooled(newest)
        with self._change:
            self._raise()
            self._queue.append(newest)
            self._change.notify_all()
        if not idle and not newest.spooled:
            self._pause_until(lambda: not self._queue, "the next checkpoint waits in memory")

    def flush(self, *, timeout_s: float) -> bool:
        """True when everything submitted is committed. Raises what went wrong with a commit."""
        with self._change:
            done = self._change.wait_for(lambda: bool(self._error) or self.waiting == 0, timeout_s)
            self._raise()
            return done

    def conclude(self, last: PendingCheckpoint | None, *, within_s: float) -> bool:
        """`flush`, after `last` was put at the end of the queue, where it waits in memory.

        False: time is over. Then leaving the context waits for nothing; the commit under way goes on for as long as the process does.
        """
        with self._change:
            if last:
                item = self._coalesce(last)  # which makes the queue anew
                self._queue.append(item)
                self._change.notify_all()
            self._deserted = not self.flush(timeout_s=within_s)
            return not self._deserted

    @property
    def waiting(self) -> int:
        """Parcels not committed yet."""
        return len(self._queue) + self._under_way

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._change:
                if kind is not None:
                    self._drop_all()
                self._change.wait_for(lambda: self._deserted or self._idle())
                if kind is None:
                    self._raise()
            if self._error and self._error is not error:
                log.warning("the last checkpoint was not committed: %s", self._error)
        finally:
            self._close()

    def _close(self) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()
            idle = self._idle()
        if idle:  # otherwise the wait was cut short, and nobody waits for a commit that may take an hour
            self._thread.join()
        self._spool.remove()

    def _idle(self) -> bool:
        return self.waiting == 0

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _coalesce(self, parcel: PendingCheckpoint) -> _QueuedCheckpoint:
        """Make place for `parcel` in the queue; it comes back with the entries of those that fell out."""
        self._raise()
        *older, newest = _coalesced([*self._queue, _QueuedCheckpoint(parcel, parcel.size)])
        self._drop(keep=older)
        return newest

    def _spooled(self, item: _QueuedCheckpoint) -> _QueuedCheckpoint:
        """The parcel with its files on disk; as it is, where the disk has no place for them or nobody is before it any more."""
        self._pause_until(
            lambda: self._has_room(item.size) or not self._on_disk(), f"{self._limit_bytes} bytes of checkpoints wait for the store"
        )
        if not self._has_room(item.size):
            return item
        try:
            paths = self._spool.write(item.parcel.files)
        except OSError as error:
            log.warning("a checkpoint cannot be put aside: %s", error)
            return item
        return replace(item, parcel=replace(item.parcel, files={}), spooled=paths)

    def _has_room(self, size: int) -> bool:
        return self._on_disk() + size <= self._limit_bytes

    def _on_disk(self) -> int:
        with self._change:
            return self._leaving + sum(item.size for item in self._queue if item.spooled)

    def _pause_until(self, ready: Callable[[], bool], why: str) -> None:
        started_s = time.monotonic()
        with self._change:
            if not ready():
                log.warning("training pauses: %s", why)
                self._change.wait_for(lambda: bool(self._error) or ready())
                log.info("training goes on after %.0f s", time.monotonic() - started_s)
            self._raise()

    def _work(self) -> None:
        while item := self._next():
            error = self._try(item)
            with self._change:
                self._under_way = False
                if error:
                    self._error = error
                    self._drop_all()
                self._change.notify_all()

    def _next(self) -> _QueuedCheckpoint | None:
        with self._change:
            self._change.wait_for(lambda: self._queue or self._closing)
            if self._closing or not self._queue:
                return None
            self._under_way = True
            item = self._queue.pop(0)
            self._leaving = item.size if item.spooled else 0
            self._change.notify_all()
            return item

    def _try(self, item: _QueuedCheckpoint) -> BaseException | None:
        """Whatever goes wrong belongs to the training's thread."""
        try:
            self._commit(self._taken(item) if item.spooled else item.parcel)
        except BaseException as error:
            return error
        return None

    def _taken(self, item: _QueuedCheckpoint) -> PendingCheckpoint:
        files = self._spool.take(item.spooled)
        with self._change:
            self._leaving = 0
            self._change.notify_all()
        return replace(item.parcel, files=files)

    def _drop_all(self) -> None:
        if self._queue:
            log.warning("not committed: the checkpoints of steps %s", ", ".join(str(item.parcel.step) for item in self._queue))
        self._drop(keep=[])

    def _drop(self, *, keep: list[_QueuedCheckpoint]) -> None:
        stay = {item.spooled for item in keep}
        for item in self._queue:
            if item.spooled not in stay:
                self._spool.discard(item.spooled)
        self._queue = keep


def _coalesced(items: list[_QueuedCheckpoint]) -> list[_QueuedCheckpoint]:
    """Of more than two, the best and the newest; each takes the entries and pictures of those that fell out before it."""
    if len(items) <= 2:
        return items
    scored = [item for item in items if item.parcel.score is not None]
    best = max(scored, key=lambda item: (item.parcel.score or 0.0, -item.parcel.step), default=None)
    kept, entries, pictures = list[_QueuedCheckpoint](), list[EpochMetrics](), dict[int, Mapping[str, bytes]]()
    for item in items:
        entries += item.parcel.entries
        pictures |= item.parcel.pictures
        if item is best or item is items[-1]:
            kept.append(replace(item, parcel=replace(item.parcel, entries=tuple(entries), pictures=pictures)))
            entries, pictures = [], {}
    return kept


class _Spool:
    """A temporary folder that is made when it is first needed, and that outlives its process only until the next one sweeps."""

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        self._folder: Path | None = None
        self._lock: IO[bytes] | None = None

    def write(self, files: Mapping[str, bytes]) -> tuple[Path, ...]:
        """Put the files aside; where that fails nothing is left. Raises OSError."""
        if self._folder is None:
            self._folder, self._lock = self._made()
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        paths = {folder / name: body for name, body in files.items()}
        try:
            for path, body in paths.items():
                path.write_bytes(body)
        except BaseException:
            self.discard(paths)
            raise
        return tuple(paths)

    def take(self, paths: Iterable[Path]) -> dict[str, bytes]:
        """The files, which then are on disk no more."""
        files = {path.name: path.read_bytes() for path in paths}
        self.discard(paths)
        return files

    def discard(self, paths: Iterable[Path]) -> None:
        for folder in {path.parent for path in paths}:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what processes left that were killed: a folder whose lock is free has no owner."""
        parent = self._parent or Path(tempfile.gettempdir())
        for folder in parent.glob(f"{_PREFIX}*"):
            with suppress(OSError), (folder / _LOCK).open("ab") as lock:  # in use, another user's, or already gone
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)

    def remove(self) -> None:
        if self._folder and self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()

    def _made(self) -> tuple[Path, IO[bytes]]:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            with suppress(FileNotFoundError):  # a sweeper came between the folder and its lock
                lock = (folder / _LOCK).open("ab")
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (folder / _LOCK).exists():
                    return folder, lock
