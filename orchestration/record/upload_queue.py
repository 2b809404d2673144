"""Uploads checkpoints in the background: a thread commits them in order; waiting checkpoints are spooled to disk."""

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

from orchestration.errors import StoreUnavailable
from orchestration.record.manifest import EpochMetrics

log = logging.getLogger(__name__)

_PREFIX = "rrn-sweep-outbox-"
_LOCK = ".lock"


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint, with the metrics and pictures of the epochs since the previous checkpoint."""

    step: int
    epoch: int
    files: Mapping[str, bytes]
    entries: Sequence[EpochMetrics]
    seconds: float
    at_s: float
    """`time.monotonic()` when it was captured."""
    pictures: Mapping[int, Mapping[str, bytes]] = field(default_factory=dict)
    """Files by epoch. They wait in memory, because they are much smaller than a checkpoint."""

    @property
    def size(self) -> int:
        return sum(map(len, self.files.values()))

    @property
    def score(self) -> float | None:
        """`val/miou`; None where the checkpoint does not end an epoch."""
        return next((entry.score for entry in self.entries if entry.step == self.step), None)


@dataclass(frozen=True)
class _QueuedCheckpoint:
    checkpoint: PendingCheckpoint
    """Without its files if they are spooled."""
    size: int
    spooled: tuple[Path, ...] = ()


class UploadQueue:
    """Commits the checkpoints of one training. Only the training's thread submits.

    If more than two checkpoints wait, only the newest and the best are kept. Metrics and pictures of dropped ones move to the next one.

    Leaving the context waits until all are committed. After an exception it waits only for the running commit and drops the others.
    """

    def __init__(self, commit: Callable[[PendingCheckpoint], None], *, limit_bytes: int, folder: Path | None = None) -> None:
        """`commit` may block. `limit_bytes`: size of the spool. `folder`: where to create it (default: the system's temporary folder)."""
        self._commit, self._limit_bytes = commit, limit_bytes
        self._spool = _Spool(folder)
        self._change = threading.Condition()
        self._queue: list[_QueuedCheckpoint] = []
        self._committing, self._closing = False, False
        self._abandoned = False
        self._reading_bytes = 0  # bytes of the spooled checkpoint that is being read back
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def __enter__(self) -> UploadQueue:
        self._spool.remove_leftovers()
        self._thread.start()
        return self

    def submit(self, checkpoint: PendingCheckpoint) -> None:
        """Queue a checkpoint. Blocks only while the spool or its disk is full. Raises the error of an earlier commit."""
        with self._change:
            newest = self._coalesce(checkpoint)
            idle = self._idle()
        if not idle:
            newest = self._spooled(newest)
        with self._change:
            self._raise()
            self._queue.append(newest)
            self._change.notify_all()
        if not idle and not newest.spooled:
            self._pause_until(lambda: not self._queue, "the next checkpoint does not fit on disk and waits in memory")

    def flush(self, *, timeout_s: float) -> bool:
        """Wait; True if everything submitted is committed. Raises the error of a commit."""
        with self._change:
            done = self._change.wait_for(lambda: bool(self._error) or self.waiting == 0, timeout_s)
            self._raise()
            return done

    def conclude(self, last: PendingCheckpoint | None, *, within_s: float) -> bool:
        """Queue `last` in memory, then `flush`.

        False: not done in time. Then leaving the context does not wait, and a running commit continues until the process ends.
        """
        with self._change:
            if last:
                item = self._coalesce(last)  # first, because it replaces the queue
                self._queue.append(item)
                self._change.notify_all()
            self._abandoned = not self.flush(timeout_s=within_s)
            return not self._abandoned

    @property
    def waiting(self) -> int:
        """Number of checkpoints that are not committed yet."""
        return len(self._queue) + self._committing

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._change:
                if kind is not None:
                    self._drop_all()
                self._change.wait_for(lambda: self._abandoned or self._idle())
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
        if idle:  # otherwise the commit was abandoned; it may take an hour
            self._thread.join()
        self._spool.remove()

    def _idle(self) -> bool:
        return self.waiting == 0

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _coalesce(self, checkpoint: PendingCheckpoint) -> _QueuedCheckpoint:
        """Drop queued checkpoints if too many wait. Returns `checkpoint` with the entries of those dropped after the last one kept."""
        self._raise()
        *older, newest = _coalesced([*self._queue, _QueuedCheckpoint(checkpoint, checkpoint.size)])
        self._drop(keep=older)
        return newest

    def _spooled(self, item: _QueuedCheckpoint) -> _QueuedCheckpoint:
        """The item with its files on disk. Unchanged if they do not fit."""
        self._pause_until(
            lambda: self._has_room(item.size) or not self._on_disk(), f"{self._limit_bytes} bytes of checkpoints wait for the store"
        )
        if not self._has_room(item.size):
            return item
        try:
            paths = self._spool.write(item.checkpoint.files)
        except OSError as error:
            log.warning("cannot write a checkpoint to the spool, so it waits in memory: %s", error)
            return item
        return replace(item, checkpoint=replace(item.checkpoint, files={}), spooled=paths)

    def _has_room(self, size: int) -> bool:
        return self._on_disk() + size <= self._limit_bytes

    def _on_disk(self) -> int:
        with self._change:
            return self._reading_bytes + sum(item.size for item in self._queue if item.spooled)

    def _pause_until(self, ready: Callable[[], bool], reason: str) -> None:
        started_s = time.monotonic()
        with self._change:
            if not ready():
                log.warning("training pauses: %s", reason)
                self._change.wait_for(lambda: bool(self._error) or ready())
                log.info("training continues after %.0f s", time.monotonic() - started_s)
            self._raise()

    def _work(self) -> None:
        while item := self._next():
            error = self._try(item)
            with self._change:
                self._committing = False
                if error:
                    self._error = error
                    self._drop_all()
                self._change.notify_all()

    def _next(self) -> _QueuedCheckpoint | None:
        with self._change:
            self._change.wait_for(lambda: self._queue or self._closing)
            if self._closing or not self._queue:
                return None
            self._committing = True
            item = self._queue.pop(0)
            self._reading_bytes = item.size if item.spooled else 0
            self._change.notify_all()
            return item

    def _try(self, item: _QueuedCheckpoint) -> BaseException | None:
        """Commit. Returns the error, which the training's thread raises."""
        try:
            self._commit(self._read_back(item) if item.spooled else item.checkpoint)
        except BaseException as error:
            return error
        return None

    def _read_back(self, item: _QueuedCheckpoint) -> PendingCheckpoint:
        try:
            files = self._spool.take(item.spooled)
        except OSError as error:  # somebody cleaned the temporary folder, or its disk fails
            raise StoreUnavailable(f"a spooled checkpoint cannot be read, so it was not committed: {error}") from error
        with self._change:
            self._reading_bytes = 0
            self._change.notify_all()
        return replace(item.checkpoint, files=files)

    def _drop_all(self) -> None:
        if self._queue:
            log.warning("not committed: the checkpoints of steps %s", ", ".join(str(item.checkpoint.step) for item in self._queue))
        self._drop(keep=[])

    def _drop(self, *, keep: list[_QueuedCheckpoint]) -> None:
        stay = {item.spooled for item in keep}
        for item in self._queue:
            if item.spooled not in stay:
                self._spool.discard(item.spooled)
        self._queue = keep


def _coalesced(items: list[_QueuedCheckpoint]) -> list[_QueuedCheckpoint]:
    """If more than two, only the best and the newest. Each takes the entries and pictures of those dropped before it."""
    if len(items) <= 2:
        return items
    scored = [item for item in items if item.checkpoint.score is not None]
    best = max(scored, key=lambda item: (item.checkpoint.score or 0.0, -item.checkpoint.step), default=None)
    kept, entries, pictures = list[_QueuedCheckpoint](), list[EpochMetrics](), dict[int, Mapping[str, bytes]]()
    for item in items:
        entries += item.checkpoint.entries
        pictures |= item.checkpoint.pictures
        if item is best or item is items[-1]:
            kept.append(replace(item, checkpoint=replace(item.checkpoint, entries=tuple(entries), pictures=pictures)))
            entries, pictures = [], {}
    return kept


class _Spool:
    """A temporary folder, created at first use. If its process is killed, the next process deletes it."""

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        self._folder: Path | None = None
        self._lock: IO[bytes] | None = None

    def write(self, files: Mapping[str, bytes]) -> tuple[Path, ...]:
        """Write the files, or none of them. Raises OSError."""
        if self._folder is None:
            self._folder, self._lock = self._created()
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
        """Read the files and delete them from disk."""
        files = {path.name: path.read_bytes() for path in paths}
        self.discard(paths)
        return files

    def discard(self, paths: Iterable[Path]) -> None:
        for folder in {path.parent for path in paths}:
            shutil.rmtree(folder, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Delete the folders of killed processes: their locks are free."""
        parent = self._parent or Path(tempfile.gettempdir())
        for folder in parent.glob(f"{_PREFIX}*"):
            with suppress(OSError), (folder / _LOCK).open("ab") as lock:  # in use, another user's, or already deleted
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)

    def remove(self) -> None:
        if self._folder and self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()

    def _created(self) -> tuple[Path, IO[bytes]]:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            with suppress(FileNotFoundError):  # another process deleted the folder before it was locked
                lock = (folder / _LOCK).open("ab")
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (folder / _LOCK).exists():
                    return folder, lock
