"""The manifest of a trial: what was committed, and by which attempt. The only source of truth.

Layout of a store::

    SWEEP/TRIAL/manifest.json                          committed by compare-and-swap
    SWEEP/TRIAL/checkpoints/STEP-ATTEMPT/model.safetensors, state.safetensors
    SWEEP/TRIAL/pictures/EPOCH-ATTEMPT/predictions.png, confusion.json
    SWEEP/tracking.json                                trials that MLflow shows completely (tracking_note.py)
    SWEEP/lease.json                                   the driver that runs the sweep (lease.py)
    weights/SHA256.safetensors                         initial weights (inputs.py)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from orchestration.errors import Corrupt, NotFound, StoreError, StoreUnavailable
from orchestration.failures import Failure
from orchestration.plan.spec import Retention
from orchestration.record.stored_model import Count, Milliseconds, Seconds, StoredModel, Token, Value
from orchestration.record.trial_state import TrialState, with_present_states
from orchestration.store.base import Store, is_key
from rrn_core.config import Split
from rrn_core.methods import settings_where

log = logging.getLogger(__name__)

SCORE = "val/miou"
"""The metric by which the best checkpoint is chosen."""
MIOUS = (SCORE, *(f"{SCORE}_{head}" for head in ("branch1", "branch2", "ensemble")))
"""The means over classes. Each is absent while no validation pixel has a label."""

CONTENTS = tuple(sorted(settings_where(lambda setting: setting.data == "contents")))
"""Settings that a sweep fills in from the contents of files."""
VERSION: Literal[2] = 2
"""Of manifests that this release writes. It reads version 1 too."""
_LONGEST_FAULT = 200
FOLDERS = CHECKPOINTS, PICTURES = "checkpoints", "pictures"
"""Folders of a trial. The objects below carry their attempt's number in their keys, so that no two attempts share a key."""


class ObjectRef(StoredModel):
    """A stored object and its expected checksum."""

    key: str
    sha256: str
    size: Count


Objects = Annotated[dict[str, ObjectRef], Field(min_length=1)]
"""Objects by file name."""


class Checkpoint(StoredModel):
    """Everything needed to resume after `step`. `epoch` counts completed epochs."""

    step: Count
    epoch: Count
    attempt: Count
    score: Value | None
    """`val/miou`; None where the checkpoint does not end an epoch."""
    objects: Objects


class EpochMetrics(StoredModel):
    """The metrics of a completed epoch (counted from 1). `time_ms`: when they were first measured."""

    epoch: Count
    step: Count
    time_ms: Milliseconds
    metrics: dict[str, Value]
    """A metric that is undefined is absent."""

    @property
    def score(self) -> float | None:
        """`val/miou`; None if it is undefined, because no validation pixel has a label."""
        return self.metrics.get(SCORE)


class EpochPictures(StoredModel):
    """The pictures of an epoch (counted from 1).

    `predictions.png`: some validation images. `confusion.json`: classes, head (whose predictions), counts (rows: truth).
    """

    epoch: Count
    objects: Objects


class Attempt(StoredModel):
    """One attempt at a trial. `seconds`: how long it held its resources."""

    number: Count
    driver: Token
    """Token of the driver that started it."""
    node: str
    machine: dict[str, str] = Field(default_factory=dict)
    """What it runs on: versions of Python and torch, device, CPUs."""
    started_ms: Milliseconds
    ended_ms: Milliseconds | None = None
    """None while it runs. A later attempt or driver closes the attempt of a dead worker."""
    outcome: Literal["finished", "interrupted"] | Failure | None = None
    reason: str | None = None
    first_step: Count = 0
    last_step: Count = 0
    """Step of the newest checkpoint that it committed; 0 if none."""
    useful_s: Seconds = 0.0
    """Seconds of new work that a checkpoint saved."""
    repeated_s: Seconds = 0.0
    """Seconds spent on steps that an earlier attempt had committed in a checkpoint that is now damaged."""
    lost_s: Seconds = 0.0
    """Seconds of work that no checkpoint saved. For a worker that died: up to its last heartbeat."""

    @property
    def seconds(self) -> float:
        return self.useful_s + self.repeated_s + self.lost_s


class _Versioned(StoredModel):
    version: int


class _KnownSettings(StoredModel):
    """Settings that are read even if this release does not know the trial's configuration."""

    method: str | None = None
    dataset: str | None = None
    partition: str | None = None
    seed: Count | None = None
    epochs: Count | None = None
    train_images: Count | None = None
    val_images: Count | None = None
    split: Split | None = None


class Manifest(StoredModel):
    """The state of a trial. `history` and `pictures` are append-only: an epoch that is trained again changes neither."""

    version: Literal[2] = VERSION
    sweep: str
    trial_id: str
    label: str
    config: dict[str, Any]
    varied: tuple[str, ...]
    proposal: Count | None = None
    iterations: Count
    status: TrialState = TrialState.RUNNING
    """`running` while the attempt is open, even if its driver is dead. `state_of` also considers the driver."""
    failure: Failure | None = None
    """Why the last attempt failed; None if it did not."""
    reason: str | None = None
    traceback: str | None = None
    attempt: Count = 0
    attempts: tuple[Attempt, ...] = ()
    driver: Token = 0
    """The highest token of a driver that started an attempt or retired checkpoints. Drivers with lower tokens are fenced."""
    writer: str = ""
    """Random name of the attempt's writer. Two attempts that start at once therefore never write the same bytes."""
    created_ms: Milliseconds
    updated_ms: Milliseconds
    seconds: Seconds = 0.0
    """Seconds of training that the committed checkpoints contain."""
    checkpoints: tuple[Checkpoint, ...] = ()
    history: tuple[EpochMetrics, ...] = ()
    pictures: tuple[EpochPictures, ...] = ()

    @field_validator("config")
    @classmethod
    def _readable(cls, config: dict[str, Any]) -> dict[str, Any]:
        _KnownSettings.model_validate(config, strict=True)
        if not _finite(config):
            raise ValueError("numbers must be finite")
        return config

    @model_validator(mode="after")
    def _own_objects(self) -> Manifest:
        place = f"{self.sweep}/{self.trial_id}/"
        groups = [*(c.objects for c in self.checkpoints), *(p.objects for p in self.pictures)]
        for name, ref in (entry for group in groups for entry in group.items()):
            if not is_key(ref.key) or not ref.key.startswith(place) or ref.key.rpartition("/")[2] != name:
                raise ValueError(f"object {name!r} must lie below {place}, got {ref.key!r}")
        return self

    @property
    def is_open(self) -> bool:
        """Whether the last attempt has not ended, according to the store."""
        return bool(self.attempts) and self.attempts[-1].ended_ms is None

    @property
    def failure_text(self) -> str:
        """Why the last attempt failed, such as `[memory] OutOfMemoryError: ...`. Empty if it did not."""
        return f"[{self.failure}] {self.reason}" if self.failure else self.reason or ""

    @property
    def epochs(self) -> int:
        """Number of committed epochs."""
        return self.history[-1].epoch if self.history else 0

    @property
    def last(self) -> EpochMetrics | None:
        return self.history[-1] if self.history else None

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        """The objects of all checkpoints and pictures."""
        groups = [*(c.objects for c in self.checkpoints), *(p.objects for p in self.pictures)]
        return tuple(ref for group in groups for ref in group.values())

    @property
    def reached(self) -> int:
        """The highest step that any attempt committed."""
        return max((attempt.last_step for attempt in self.attempts), default=0)

    def failures(self, failure: Failure, *, driver: int) -> int:
        """How many attempts of this driver ended with `failure`."""
        return sum(attempt.outcome == failure and attempt.driver == driver for attempt in self.attempts)

    @property
    def best_checkpoint(self) -> Checkpoint | None:
        """The earliest kept checkpoint with the highest score."""
        return best_of(self.checkpoints)

    @property
    def best(self) -> EpochMetrics | None:
        """The first epoch with the highest `val/miou`; None if no epoch has one."""
        return best_epoch(self.history)


def manifest_key(sweep: str, trial_id: str) -> str:
    return f"{sweep}/{trial_id}/manifest.json"


def sweep_names(store: Store) -> list[str]:
    """The sweeps that have a trial in the store."""
    return sorted({key.partition("/")[0] for key in store.keys("") if _is_manifest(key)})


def _is_manifest(key: str) -> bool:
    return key.count("/") == 2 and key.endswith("/manifest.json")


def read_manifest(store: Store, sweep: str, trial_id: str) -> Manifest | None:
    """The trial's manifest; None if the trial never started. Raises StoreError."""
    try:
        return parse_manifest(*store.read(manifest_key(sweep, trial_id)), key=manifest_key(sweep, trial_id))[0]
    except NotFound:
        return None


def read_manifests(store: Store, sweep: str) -> dict[str, Manifest]:
    """The readable manifests of the sweep by trial_id. Every other one is named in a warning. Raises StoreError."""
    manifests, unreadable = read_all(store, sweep)
    for fault in unreadable.values():
        log.warning("%s; this trial is left out", fault)
    return manifests


def read_all(
    store: Store, sweep: str, trial_ids: Sequence[str] | None = None, *, known: Mapping[str, Manifest] | None = None
) -> tuple[dict[str, Manifest], dict[str, StoreError]]:
    """The manifests of the sweep, and for each manifest that cannot be read the fault, both by trial_id.

    Args:
        trial_ids: default all trials of the sweep.
        known: manifests that are not read again.

    Raises:
        StoreError: the store is unavailable, or cannot be listed.
    """
    known = known or {}
    if trial_ids is None:
        trial_ids = [key.split("/")[1] for key in store.keys(f"{sweep}/") if _is_manifest(key)]

    def read(trial_id: str) -> Manifest | StoreError | None:
        try:
            return known.get(trial_id) or read_manifest(store, sweep, trial_id)
        except StoreUnavailable:
            raise
        except StoreError as fault:
            return fault

    with ThreadPoolExecutor(max_workers=16) as pool:
        found = dict(zip(trial_ids, pool.map(read, trial_ids), strict=True))
    manifests = {trial_id: manifest for trial_id, manifest in found.items() if isinstance(manifest, Manifest)}
    return manifests, {trial_id: fault for trial_id, fault in found.items() if isinstance(fault, StoreError)}


def read_checkpoint(store: Store, checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's files by name, with verified checksums. Raises NotFound, Corrupt."""
    files = {}
    for name, ref in checkpoint.objects.items():
        files[name], _ = store.read(ref.key)
        if sha256_of(files[name]) != ref.sha256:
            raise Corrupt(ref.key)
    return files


def retained(checkpoints: tuple[Checkpoint, ...], retention: Retention) -> tuple[Checkpoint, ...]:
    """The checkpoints that `retention` keeps while the trial trains."""
    keep = set(sorted(c.step for c in checkpoints)[-retention.last :])
    best = best_of(checkpoints)
    if retention.best and best:
        keep.add(best.step)
    return tuple(c for c in checkpoints if c.step in keep)


def best_epoch(history: Iterable[EpochMetrics]) -> EpochMetrics | None:
    """The first epoch with the highest `val/miou`; None if no epoch has one."""
    scored = [(entry.score, entry) for entry in history if entry.score is not None]
    return max(scored, key=lambda one: one[0], default=(None, None))[1]


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The earliest checkpoint with the highest score. None if no checkpoint has a score."""
    scored = (c for c in checkpoints if c.score is not None)
    return max(scored, key=lambda c: (c.score or 0.0, -c.step), default=None)


def parse_manifest(body: bytes, etag: str, *, key: str) -> tuple[Manifest, str]:
    """The manifest stored under `key`, and its etag.

    Raises:
        StoreError: `body` is not a manifest, was written by a newer release, or belongs to another sweep or trial (a copied folder).
    """
    try:
        manifest = Manifest.model_validate_json(_as_present_version(body, key), strict=True)
    except ValidationError as error:
        raise StoreError(
            f"{key}: not a manifest (validation errors: {error.error_count()}, first: {_first(error)}); "
            "move it out of the store to restart the trial from step 0"
        ) from error
    if key != manifest_key(manifest.sweep, manifest.trial_id):
        raise StoreError(
            f"{key}: this is the manifest of sweep {manifest.sweep!r}, trial {manifest.trial_id!r}; "
            "move copied folders out of the store, then run again"
        )
    return manifest, etag


def _as_present_version(body: bytes, key: str) -> bytes:
    """The body, converted if it is of version 1. Raises StoreError for a version above this release's."""
    version = _version(body)
    if version > VERSION:
        raise StoreError(
            f"{key}: written by a newer release (manifest version {version}, this release reads up to {VERSION}); update rrn-sweep"
        )
    return json.dumps(with_present_states(json.loads(body))).encode() if version == 1 else body


def _version(body: bytes) -> int:
    """The version that the body states; 0 if it states none that makes sense."""
    try:
        version = _Versioned.model_validate_json(body, strict=True).version
    except ValidationError:
        return 0
    return version


def _first(error: ValidationError) -> str:
    """`attempts.0.number: Input should be a valid integer`."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, fault["loc"]))
    return " ".join(f"{place}: {fault['msg']}".removeprefix(": ").split())[:_LONGEST_FAULT]


def _finite(value: Any) -> bool:
    """Whether all numbers in a JSON value are finite."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes that `parse_manifest` reads."""
    return json.dumps(manifest.model_dump(mode="json"), allow_nan=False).encode()


def sha256_of(body: bytes) -> str:
    """The checksum of an object, in hexadecimal."""
    return hashlib.sha256(body).hexdigest()
