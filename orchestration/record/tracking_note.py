"""Which trials MLflow shows completely: a note in the store, so that a finished sweep needs no look at MLflow."""

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
    """Trials whose whole truth the tracking server at `uri` was told when a sweep last ended in order. Raises StoreError."""
    told = _told(store, sweep)
    return set(told.trials) if told and told.uri == uri else set()


def forget_tracked(store: Store, sweep: str, trial_ids: Collection[str]) -> None:
    """Take trials out of what `tracked` answers, whatever server it is for, so that it is told of them again. Raises StoreError."""
    told = _told(store, sweep)
    if told and not told.trials.isdisjoint(trial_ids):
        write_tracked(store, sweep, told.uri, sorted(told.trials - set(trial_ids)))


def write_tracked(store: Store, sweep: str, uri: str, trial_ids: Sequence[str]) -> None:
    """Remember what `tracked` answers. `uri` must hold no credential."""
    store.write(_tracking_key(sweep), json.dumps({"uri": uri, "trials": sorted(trial_ids)}).encode())


def _told(store: Store, sweep: str) -> _TrackingNote | None:
    key = _tracking_key(sweep)
    try:
        return _TrackingNote.model_validate_json(store.read(key)[0])
    except NotFound:
        return None
    except ValidationError as error:
        raise StoreError(
            f"{key}: not a note of ours ({error.error_count()} faults); delete it, and MLflow is told everything again"
        ) from error


def _tracking_key(sweep: str) -> str:
    return f"{sweep}/tracking.json"
