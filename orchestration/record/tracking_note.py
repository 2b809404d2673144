"""Notes in the store which trials MLflow shows completely, so that a finished sweep need not contact MLflow."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from contextlib import suppress

from pydantic import ValidationError

from orchestration.errors import Conflict, NotFound, StoreError
from orchestration.record.lease import require_lease, superseded
from orchestration.record.stored_model import StoredModel, Token
from orchestration.store.base import Store


class _TrackingNote(StoredModel):
    uri: str
    trials: frozenset[str]
    driver: Token = 0
    """The highest token of a driver that wrote the note. Drivers with lower tokens are fenced."""
    writer: str = ""
    """Random: two notes that are written at once are never the same bytes."""


def tracked(store: Store, sweep: str, uri: str) -> set[str]:
    """Trials that the tracking server at `uri` shows completely, as of the last normal end of the sweep. Raises StoreError."""
    note, _ = _read_note(store, sweep)
    return set(note.trials) if note and note.uri == uri else set()


def forget_tracked(store: Store, sweep: str, trial_ids: Collection[str], *, driver: int) -> None:
    """Remove trials from the note, so that the next run sends them to MLflow again. Raises StoreError, Fenced."""
    _rewrite(store, sweep, driver, lambda note: note and note.model_copy(update={"trials": note.trials - set(trial_ids)}))


def write_tracked(store: Store, sweep: str, uri: str, trial_ids: Collection[str], *, driver: int) -> None:
    """Write the note that `tracked` reads. `uri` must not contain credentials. Raises StoreError, Fenced."""
    _rewrite(store, sweep, driver, lambda _: _TrackingNote(uri=uri, trials=frozenset(trial_ids)))


def _rewrite(store: Store, sweep: str, driver: int, change: Callable[[_TrackingNote | None], _TrackingNote | None]) -> None:
    """Replace the note by compare-and-swap, unless a driver with a higher token has written it or holds the lease."""
    while True:
        note, etag = _read_note(store, sweep)
        require_lease(store, sweep, driver)
        if note and note.driver > driver:
            raise superseded(f"sweep {sweep}", note.driver, driver)
        fresh = change(note)
        if fresh is None:
            return
        signed = fresh.model_copy(update={"driver": driver, "writer": uuid.uuid4().hex})
        with suppress(Conflict):
            store.replace(_tracking_key(sweep), signed.model_dump_json().encode(), expected=etag)
            return


def _read_note(store: Store, sweep: str) -> tuple[_TrackingNote | None, str | None]:
    key = _tracking_key(sweep)
    try:
        body, etag = store.read(key)
    except NotFound:
        return None, None
    try:
        return _TrackingNote.model_validate_json(body), etag
    except ValidationError as error:
        raise StoreError(
            f"{key}: not a tracking note (validation errors: {error.error_count()}); delete it; the next run updates MLflow"
        ) from error


def _tracking_key(sweep: str) -> str:
    return f"{sweep}/tracking.json"
