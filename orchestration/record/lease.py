"""The lease of a sweep: one driver at a time, which renews it by heartbeats. The next driver takes the lease of a dead one."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC
from types import TracebackType
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from orchestration.errors import Conflict, Fenced, LeaseHeld, LeaseLost, NotFound, StoreError
from orchestration.formatting import instant
from orchestration.record.process import Process, here
from orchestration.record.stored_model import Count, Seconds, StoredModel, Token
from orchestration.store.base import Store, ignores_condition, require_conditions

log = logging.getLogger(__name__)

_BEATS_MISSED = 3
"""A holder counts as dead only after this many missed heartbeats, even if the patience is shorter."""
_PATIENCE_S = 30.0
"""How long to wait for a heartbeat of a holder whose process cannot be checked."""
_RELEASE_WITHIN_S = 10.0
"""How long `release` tries."""
BEAT_WITHIN_S = 3.0
"""Deadline of one put. A hanging heartbeat, which is two puts, and the release after it must end within _RELEASE_WITHIN_S."""
_OLD_BEATS = 2
"""Heartbeats after which the last one is old."""
_PAUSE_S = 0.2
"""Between tries to release; a directory store fails at once."""


class LastSeen(StoredModel):
    """The last report of a trial: its attempt, and the seconds that the attempt had worked by then."""

    attempt: Count
    worked_s: Seconds


class _LeaseRecord(StoredModel):
    version: Literal[1] = 1
    token: Annotated[Token, Field(ge=1)]
    writer: str
    """Random name of the lease. Two drivers that acquire at once therefore never write the same bytes."""
    holder: Process
    beat: Count = 0
    """Counts heartbeats, so that every heartbeat changes the bytes."""
    beat_ms: Annotated[int, Field(ge=-(10**30), le=10**30)]
    """Time of the heartbeat. For display only: no decision depends on a wall clock."""
    every_s: Annotated[float, Field(gt=0, le=1e6)]
    released: bool = False
    seen: dict[str, LastSeen] = Field(default_factory=dict)

    @property
    def driver(self) -> str:
        return f"the driver with {self.holder}"

    @property
    def last_heartbeat(self) -> str:
        return f"{instant(self.beat_ms, UTC)} by its own clock"


class Lease:
    """The right to drive a sweep. Leaving the context releases it.

    A lost lease stays lost. An outage of the store does not lose it: heartbeats continue afterwards, unless another driver took it.
    """

    token: int
    """One more than the token of the previous driver."""
    previous: Mapping[str, LastSeen]
    """Last reports of the previous driver's trials. Also passed on to the next driver, unless `see` or `forget` changes them."""
    took_over: str | None
    """One line for the user: whose lease was taken, and why. None if it was free."""

    def __init__(
        self, store: Store, beats: Store, key: str, record: _LeaseRecord, etag: str, *, took_over: str | None, now_ms: Callable[[], int]
    ) -> None:
        self._patient, self._store, self._key, self._record, self._now_ms = store, beats, key, record, now_ms
        self._etag: str | None = etag
        self.token, self.previous, self.took_over = record.token, dict(record.seen), took_over
        self._seen, self._lock = dict(record.seen), threading.Lock()
        self._lost: str | None = None
        self._beat_s = _awake_s()
        self._releasing = threading.Event()
        self._release_until_s = 0.0
        self._thread = threading.Thread(target=self._send_heartbeats, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        store: Store,
        sweep: str,
        *,
        take_over: bool = False,
        every_s: float = 5.0,
        patience_s: float = _PATIENCE_S,
        above: int = 0,
        beats: Store | None = None,
        say: Callable[[str], None],
        now_ms: Callable[[], int] = lambda: time.time_ns() // 10**6,
    ) -> Lease:
        """Become the driver of `sweep`. The token is higher than those of all previous drivers, and higher than `above`.

        If the holder ran on this host, its process is checked. Otherwise its record is watched for `patience_s`, announced by `say`;
        the holder is alive if the record changes.

        Args:
            take_over: take the lease even if the holder appears to be alive.
            beats: the same store, opened with a deadline of BEAT_WITHIN_S, so that a hanging heartbeat does not delay the next.

        Raises:
            LeaseHeld: another driver is alive, or was faster.
            StoreError: the store refused, ignores the condition of a conditional put, or the record is not a lease.
        """
        key = _key(sweep)
        target: int | None = None
        while True:
            old, etag = _read(store, key)
            if old and not old.released and target not in (None, old.token):  # another driver was faster; `take_over` does not apply to it
                raise _held(sweep, old)
            took_over = _why_free(store, sweep, old, etag, take_over=take_over, patience_s=patience_s, say=say)
            record = _LeaseRecord(
                token=max(old.token if old else 0, above) + 1,
                writer=uuid.uuid4().hex,
                holder=here(),
                beat_ms=now_ms(),
                every_s=every_s,
                seen=old.seen if old else {},
            )
            try:
                etag = store.replace(key, _dump(record), expected=etag)
            except Conflict:
                target = old.token if old else 0
                continue
            require_conditions(store, key, _dump(record.model_copy(update={"released": True})))
            return cls(store, beats or store, key, record, etag, took_over=took_over, now_ms=now_ms)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def see(self, trial_id: str, attempt: int, worked_s: float) -> None:
        """Note the last report of a trial; the next heartbeat writes it. Callable from any thread."""
        with self._lock:
            self._seen[trial_id] = LastSeen(attempt=attempt, worked_s=worked_s)

    def forget(self, trial_id: str) -> None:
        """Drop the report of a trial: its attempt is closed, so the next driver does not need it."""
        with self._lock:
            self._seen.pop(trial_id, None)

    def check(self) -> None:
        """Raises LeaseLost if another driver is known to hold the lease."""
        if self._lost:
            raise LeaseLost(self._lost)

    def confirm(self) -> None:
        """Like `check`, but reads the lease first if the last heartbeat is old: this process may have slept. Raises StoreError too."""
        if _awake_s() - self._beat_s > _OLD_BEATS * self._record.every_s:
            found, _ = _read(self._patient, self._key)
            if found and found.writer != self._record.writer:
                self._lose(self._taken_by(found))
        self.check()

    def release(self) -> None:
        """Free the lease, so that the next driver need not wait. Gives up after ten seconds without the store and leaves the record."""
        if self._releasing.is_set():
            return
        self._release_until_s = time.monotonic() + _RELEASE_WITHIN_S
        self._releasing.set()
        self._thread.join(_RELEASE_WITHIN_S)
        if self._thread.is_alive():
            log.warning("%s: not released, the store does not answer; the next driver takes over once this one is dead", self._key)

    def _send_heartbeats(self) -> None:
        """Run the heartbeat thread. Catches every exception: without heartbeats this driver would count as dead."""
        warned = False
        while not self._lost:
            last = self._releasing.wait(self._record.every_s)
            try:
                self._write(released=last)
                warned = False
            except Exception as error:
                if not warned:  # one line per outage
                    log.warning("%s: heartbeat failed: %s; retrying", self._key, error)
                warned = True
                if last and time.monotonic() < self._release_until_s:
                    time.sleep(_PAUSE_S)
                    continue
            if last:
                return

    def _write(self, *, released: bool) -> None:
        while not self._lost:
            with self._lock:
                seen = dict(self._seen)
            began_s = _awake_s()
            changes = {"beat": self._record.beat + 1, "beat_ms": self._now_ms(), "seen": seen, "released": released}
            fresh = self._record.model_copy(update=changes)
            if not released and ignores_condition(self._store, self._key, _dump(fresh)):
                self._lose("the store ignores the condition of a conditional put")
                return
            try:
                self._etag = self._store.replace(self._key, _dump(fresh), expected=self._etag)
                self._record, self._beat_s = fresh, began_s
                return
            except Conflict:
                self._resolve_conflict()

    def _resolve_conflict(self) -> None:
        """Find out who wrote the record. It may be this driver, if a reply was lost. A deleted record is written again."""
        found, self._etag = _read(self._store, self._key)
        if found and found.writer == self._record.writer:
            self._record = found
        elif found:
            self._lose(self._taken_by(found))

    def _taken_by(self, found: _LeaseRecord) -> str:
        return f"{found.driver} took the lease (its token: {found.token}, ours: {self.token})"

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = f"sweep {self._key.partition('/')[0]}: {reason}; this driver stops"
            log.error("%s", self._lost)


def current_token(store: Store, sweep: str) -> int:
    """The token of the current or last driver of the sweep; 0 if there was none."""
    record, _ = _read(store, _key(sweep))
    return record.token if record else 0


def require_lease(store: Store, sweep: str, driver: int) -> None:
    """Raises Fenced if another driver has taken the lease since."""
    if (token := current_token(store, sweep)) > driver:
        raise superseded(f"sweep {sweep}", token, driver)


def superseded(what: str, successor: int, driver: int) -> Fenced:
    """What ends an action of the overtaken `driver`."""
    return Fenced(f"{what}: driver {successor} has taken the sweep over from driver {driver}")


@dataclass(frozen=True)
class Driver:
    """The driver of a sweep, read from its lease once."""

    token: int
    name: str
    heard: str
    """Time of its last heartbeat by its own clock, for display only."""
    beat_ms: int
    """The same time as a number."""
    beat: int
    """Changes with every heartbeat."""
    every_s: float
    """Seconds between heartbeats."""
    alive: bool | None
    """Whether its process runs. None if this machine cannot check that; then only another heartbeat proves it."""

    @property
    def working(self) -> bool:
        """Whether it probably works on the sweep. For a process on another machine: a recent heartbeat, compared with this clock."""
        return self.alive if self.alive is not None else abs(time.time() - self.beat_ms / 1000) < self.patience_s

    @property
    def patience_s(self) -> float:
        """How long without a heartbeat until it counts as dead, for machines that cannot check its process."""
        return max(_PATIENCE_S, _BEATS_MISSED * self.every_s)


def driver_of(store: Store, sweep: str) -> Driver | None:
    """The holder of the sweep's lease; None if it is free. Raises StoreError."""
    record, _ = _read(store, _key(sweep))
    if record is None or record.released:
        return None
    return Driver(record.token, record.driver, record.last_heartbeat, record.beat_ms, record.beat, record.every_s, record.holder.runs())


def _awake_s() -> float:
    """Seconds since the machine started, with those in which it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _key(sweep: str) -> str:
    return f"{sweep}/lease.json"


def _read(store: Store, key: str) -> tuple[_LeaseRecord | None, str | None]:
    try:
        body, etag = store.read(key)
    except NotFound:
        return None, None
    try:
        return _LeaseRecord.model_validate_json(body), etag
    except ValidationError as error:
        raise StoreError(
            f"{store.uri}: {key}: not a lease (validation errors: {error.error_count()}); "
            "make sure that no driver runs this sweep, delete the key, then run again"
        ) from error


def _dump(record: _LeaseRecord) -> bytes:
    return record.model_dump_json().encode()


def _why_free(
    store: Store, sweep: str, old: _LeaseRecord | None, etag: str | None, *, take_over: bool, patience_s: float, say: Callable[[str], None]
) -> str | None:
    """Why the lease may be taken from its holder; None if it has none. Raises LeaseHeld."""
    if old is None or old.released:
        return None
    if take_over:
        return f"sweep {sweep}: took the lease from {old.driver} (last heartbeat: {old.last_heartbeat})"
    alive = old.holder.runs()
    if alive is False:
        return f"sweep {sweep}: {old.driver} is dead; took its lease"
    patience_s = max(patience_s, _BEATS_MISSED * old.every_s)
    if alive is None:
        say(
            f"sweep {sweep}: {old.driver} holds the lease, and this machine cannot check its process; "
            f"waiting up to {patience_s:.0f} s for a heartbeat"
        )
    if alive or _changes_within(store, _key(sweep), etag, patience_s=patience_s):
        raise _held(sweep, old)
    return f"sweep {sweep}: {old.driver} sent no heartbeat for {patience_s:.0f} s; took its lease"


def _held(sweep: str, record: _LeaseRecord) -> LeaseHeld:
    return LeaseHeld(
        f"sweep {sweep}: {record.driver} holds the lease (last heartbeat: {record.last_heartbeat}); "
        "wait until it ends, stop it, or use --take-over if it is dead"
    )


def _changes_within(store: Store, key: str, etag: str | None, *, patience_s: float) -> bool:
    """Whether the holder changes the record within the patience. Time without the store does not count."""
    pause_s = min(1.0, patience_s / 10)
    quiet_s, read_s = 0.0, time.monotonic()
    while quiet_s < patience_s:
        time.sleep(pause_s)
        record, now = _read(store, key)
        if now != etag:
            return record is not None and not record.released
        quiet_s += min(time.monotonic() - read_s, 2 * pause_s)
        read_s = time.monotonic()
    return False
