"""One driver a sweep: a record in the store that its driver keeps changing, and that the next driver takes over once that one is dead."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from orchestration.errors import Conflict, LeaseHeld, LeaseLost, NotFound, StoreError
from orchestration.record.process import Process, here
from orchestration.store.base import Store

log = logging.getLogger(__name__)

_BEATS_MISSED = 3
"""A holder is never stale before it has missed so many of its own beats, however short the patience."""
_PATIENCE_S = 30.0
_RELEASE_WITHIN_S = 10.0
BEAT_WITHIN_S = 4.0
"""Patience for one heartbeat; one that hangs and the one that releases the lease must both end within _RELEASE_WITHIN_S."""
_PAUSE_S = 0.2
"""Between tries to release, in a folder that refuses at once."""


class _LeaseModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class LastSeen(_LeaseModel):
    """The last sign of life of a trial: the attempt, and the seconds that it had worked by then."""

    attempt: int
    worked_s: float


class _LeaseRecord(_LeaseModel):
    version: Literal[1] = 1
    token: PositiveInt
    writer: str
    """Random name of the lease, so that two that acquire at once never write the same bytes."""
    holder: Process
    beat: int = 0
    """Grows with every heartbeat, so that the bytes change even when nothing else does."""
    beat_ms: int
    """Only to show: nothing is decided by a wall clock."""
    every_s: PositiveFloat
    released: bool = False
    seen: dict[str, LastSeen] = {}

    @property
    def driver(self) -> str:
        return f"the driver with {self.holder}"

    @property
    def heard(self) -> str:
        try:
            return f"{datetime.fromtimestamp(self.beat_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC by its own clock"
        except (ValueError, OverflowError, OSError):  # a clock may show anything
            return "an unknown time"


class Lease:
    """The right to drive a sweep; leaving the context releases it.

    A lost lease stays lost. A store that is away loses nothing: the heartbeat goes on when it is back, unless a rival came first.
    """

    token: int
    """One more than that of the driver before."""
    previous: Mapping[str, LastSeen]
    """What the driver before last saw of its trials. Handed on to the next driver too, until `see` or `forget` says otherwise."""
    took_over: str | None
    """Whose lease was taken and why, in one line for the user; None where it was free."""

    def __init__(
        self, store: Store, key: str, record: _LeaseRecord, etag: str, *, took_over: str | None, now_ms: Callable[[], int]
    ) -> None:
        self._store, self._key, self._record, self._now_ms = store, key, record, now_ms
        self._etag: str | None = etag
        self.token, self.previous, self.took_over = record.token, dict(record.seen), took_over
        self._seen, self._lock = dict(record.seen), threading.Lock()
        self._lost: str | None = None
        self._ending = threading.Event()
        self._try_until_s = 0.0
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
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
        """Become the driver of `sweep`, with a token above those of all drivers before, and above `above`.

        A holder on this host is looked up among its processes. Any other is watched for `patience_s`, which `say` announces: it is
        alive once its record changes. With `take_over` the present holder isn't asked.

        Args:
            beats: the same store, opened with a patience of BEAT_WITHIN_S: a heartbeat that hangs must not hold up the next.

        Raises:
            LeaseHeld: another driver is alive, or was faster.
            StoreError: among others, for a record that is none.
        """
        key = _key(sweep)
        target: int | None = None
        while True:
            old, etag = _read(store, key)
            if old and not old.released and target not in (None, old.token):  # a rival was faster, and isn't whom `take_over` meant
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
                return cls(beats or store, key, record, etag, took_over=took_over, now_ms=now_ms)
            except Conflict:
                target = old.token if old else 0

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def see(self, trial_id: str, attempt: int, worked_s: float) -> None:
        """A trial of this driver gave a sign of life; written with the next heartbeat. Any thread may say so."""
        with self._lock:
            self._seen[trial_id] = LastSeen(attempt=attempt, worked_s=worked_s)

    def forget(self, trial_id: str) -> None:
        """The trial's attempt is accounted for; no heir needs to know of it."""
        with self._lock:
            self._seen.pop(trial_id, None)

    def check(self) -> None:
        """Raises LeaseLost once it is known that another driver has the sweep."""
        if self._lost:
            raise LeaseLost(self._lost)

    def release(self) -> None:
        """Let the next driver in without a wait. Tries for ten seconds; where the store is away for longer, the record stays as it is."""
        if self._ending.is_set():
            return
        self._try_until_s = time.monotonic() + _RELEASE_WITHIN_S
        self._ending.set()
        self._thread.join(_RELEASE_WITHIN_S)
        if self._thread.is_alive():
            log.warning("%s: not released, the store does not answer; the next driver will notice that this one is gone", self._key)

    def _beat_on(self) -> None:
        """The thread. It catches everything: a heart that stops for a bug would be taken for a dead driver's."""
        warned = False
        while not self._lost:
            last = self._ending.wait(self._record.every_s)
            try:
                self._write(released=last)
                warned = False
            except Exception as error:
                if not warned:  # one line an outage
                    log.warning("%s: no heartbeat: %s; trying on", self._key, error)
                warned = True
                if last and time.monotonic() < self._try_until_s:
                    time.sleep(_PAUSE_S)
                    continue
            if last:
                return

    def _write(self, *, released: bool) -> None:
        while not self._lost:
            with self._lock:
                seen = dict(self._seen)
            changes = {"beat": self._record.beat + 1, "beat_ms": self._now_ms(), "seen": seen, "released": released}
            fresh = self._record.model_copy(update=changes)
            try:
                self._etag = self._store.replace(self._key, _dump(fresh), expected=self._etag)
                self._record = fresh
                return
            except Conflict:
                self._look_who_wrote()

    def _look_who_wrote(self) -> None:
        """It may be ourselves: of a beat during an outage only the answer may have been lost. A deleted record is written anew."""
        found, self._etag = _read(self._store, self._key)
        if found and found.writer == self._record.writer:
            self._record = found
        elif found:
            sweep = self._key.partition("/")[0]
            self._lost = f"sweep {sweep}: {found.driver} has taken it over (its token is {found.token}, ours {self.token}); this one stops"
            log.error("%s", self._lost)


def current_token(store: Store, sweep: str) -> int:
    """The token of the driver that has, or last had, the sweep; 0 where there was none."""
    record, _ = _read(store, _key(sweep))
    return record.token if record else 0


@dataclass(frozen=True)
class Driver:
    """Who drives a sweep, as one look at its lease tells."""

    token: int
    name: str
    heard: str
    """Its last sign of life by its own clock, only to show."""
    beat: int
    """Changes with every sign of life."""
    every_s: float
    """From one sign of life to the next."""
    alive: bool | None
    """Whether its process runs; None where that can't be seen from here, and only another beat could tell."""

    @property
    def patience_s(self) -> float:
        """So long without a beat, and whoever cannot look its process up may take it for dead."""
        return max(_PATIENCE_S, _BEATS_MISSED * self.every_s)


def driver_of(store: Store, sweep: str) -> Driver | None:
    """Who holds the sweep's lease; None where nobody does. Raises StoreError."""
    record, _ = _read(store, _key(sweep))
    if record is None or record.released:
        return None
    return Driver(record.token, record.driver, record.heard, record.beat, record.every_s, record.holder.runs())


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
            f"{store.uri}: {key}: not a lease ({error.error_count()} faults); "
            "make sure that no driver runs this sweep, delete the key, then run again"
        ) from error


def _dump(record: _LeaseRecord) -> bytes:
    return record.model_dump_json().encode()


def _why_free(
    store: Store, sweep: str, old: _LeaseRecord | None, etag: str | None, *, take_over: bool, patience_s: float, say: Callable[[str], None]
) -> str | None:
    """Why the lease may be taken from its holder, None where it has none. Raises LeaseHeld."""
    if old is None or old.released:
        return None
    if take_over:
        return f"sweep {sweep}: taken over from {old.driver}, last heard of at {old.heard}"
    alive = old.holder.runs()
    if alive is False:
        return f"sweep {sweep}: {old.driver} is dead; taken over"
    patience_s = max(patience_s, _BEATS_MISSED * old.every_s)
    if alive is None:
        say(f"sweep {sweep}: {old.driver} has it and cannot be looked up from here; waiting up to {patience_s:.0f} s for a sign of life")
    if alive or _changes_within(store, _key(sweep), etag, patience_s=patience_s):
        raise _held(sweep, old)
    return f"sweep {sweep}: {old.driver} gave no sign of life for {patience_s:.0f} s; taken over"


def _held(sweep: str, record: _LeaseRecord) -> LeaseHeld:
    return LeaseHeld(
        f"sweep {sweep}: {record.driver} is running it, last heard of at {record.heard}; "
        "wait for it, stop it, or give --take-over if it is dead"
    )


def _changes_within(store: Store, key: str, etag: str | None, *, patience_s: float) -> bool:
    """Whether anybody lets go of the record or changes it. Time in which the store was away doesn't count: then nobody could."""
    pause_s = min(1.0, patience_s / 10)
    quiet_s, looked_s = 0.0, time.monotonic()
    while quiet_s < patience_s:
        time.sleep(pause_s)
        record, now = _read(store, key)
        if now != etag:
            return record is not None and not record.released
        quiet_s += min(time.monotonic() - looked_s, 2 * pause_s)
        looked_s = time.monotonic()
    return False
