"""Notes in the store which trials MLflow shows completely, so that a finished sweep need not contact MLflow."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from pydantic import ValidationError

from orchestration.errors import NotFound, StoreError
from orchestration.record.manifest import _ManifestModel
from orchestration.store.base import Store


class _TrackingNote(_ManifestModel):
    uri: str
    trials: frozenset[str]


def tracked(store: Store, sweep: str, uri: str) -> set[str]:
    """Trials that the tracking server at `uri` shows completely, as of the last normal end of the sweep. Raises StoreError."""
    note = _read_note(store, sweep)
    return set(note.trials) if note and note.uri == uri else set()


def forget_tracked(store: Store, sweep: str, trial_ids: Collection[str]) -> None:
    """Remove trials from the note, so that the next run sends them to MLflow again. Raises StoreError."""
    note = _read_note(store, sweep)
    if note and not note.trials.isdisjoint(trial_ids):
        write_tracked(store, sweep, note.uri, sorted(note.trials - set(trial_ids)))


def write_tracked(store: Store, sweep: str, uri: str, trial_ids: Sequence[str]) -> None:
    """Write the note that `tracked` reads. `uri` must not contain credentials."""
    store.write(_tracking_key(sweep), json.dumps({"uri": uri, "trials": sorted(trial_ids)}).encode())


def _read_note(store: Store, sweep: str) -> _TrackingNote | None:
    key = _tracking_key(sweep)
    try:
        return _TrackingNote.model_validate_json(store.read(key)[0])
    except NotFound:
        return None
    except ValidationError as error:
        raise StoreError(
            f"{key}: not a tracking note (validation errors: {error.error_count()}); delete it; the next run updates MLflow"
        ) from error


def _tracking_key(sweep: str) -> str:
    return f"{sweep}/tracking.json"
