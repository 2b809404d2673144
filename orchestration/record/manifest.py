"""A trial's manifest in the store: what was committed, by which attempt; the only source of truth.

Layout below the store's root::

    SWEEP/TRIAL/manifest.json                          committed by compare-and-swap
    SWEEP/TRIAL/checkpoints/STEP-ATTEMPT/model.safetensors, state.pt
    SWEEP/TRIAL/pictures/EPOCH-ATTEMPT/predictions.png, confusion.json
    SWEEP/tracking.json                                which trials the tracking server was last told the whole truth about
    SWEEP/lease.json                                   which driver runs the sweep (lease.py)
    weights/SHA256.safetensors                         initial weights (contents.py)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from orchestration.errors import Corrupt, NotFound, SpecError, StoreError, SweepError
from orchestration.failures import Failure
from orchestration.plan.spec import Retention, SweepSpec
from orchestration.plan.sweep_file import build_config
from orchestration.plan.trial_plan import ID_LENGTH, Resolve, TrialPlan
from orchestration.store.base import Store
from rrn_core.config import TrainConfig
from rrn_core.methods import settings_where

Status = Literal["running", "finished", "failed"]

SCORE = "val/miou"
"""The metric by which the best checkpoint is chosen."""

CONTENTS = tuple(sorted(settings_where(lambda setting: setting.data == "contents")))
"""Settings that a sweep fills in from files."""
FOLDERS = CHECKPOINTS, PICTURES = "checkpoints", "pictures"
"""Of a trial: below them lie its objects, each in a folder that carries the attempt's number, so that no two attempts share a key."""


class _ManifestModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ObjectRef(_ManifestModel):
    """One stored object and what it must hash to."""

    key: str
    sha256: str
    size: int


class Checkpoint(_ManifestModel):
    """All that is needed to go on after `step`; `epoch` counts completed epochs."""

    step: int
    epoch: int
    attempt: int
    score: float | None
    """`val/miou` where the checkpoint closes an epoch."""
    objects: dict[str, ObjectRef]


class EpochMetrics(_ManifestModel):
    """The metrics of one completed epoch (counted from 1) and the instant at which they were first measured."""

    epoch: int
    step: int
    time_ms: int
    metrics: dict[str, float]

    @field_validator("metrics")
    @classmethod
    def _scored(cls, metrics: dict[str, float]) -> dict[str, float]:
        if SCORE not in metrics:
            raise ValueError(f"an epoch without {SCORE}")
        return metrics


class EpochPictures(_ManifestModel):
    """What an epoch (counted from 1) looked like.

    `predictions.png`: some validation images. `confusion.json`: classes, head (whose predictions), counts (rows: truth).
    """

    epoch: int
    objects: dict[str, ObjectRef]


class Attempt(_ManifestModel):
    """One try at a trial, from taking it over to its end. `seconds` is all the time that it held its resources."""

    number: int
    driver: int
    """Token of the driver that ordered it."""
    node: str
    machine: dict[str, str] = {}
    """What it ran on: python, torch, device, cpus and the like."""
    started_ms: int
    ended_ms: int | None = None
    """None while it runs; a later attempt or driver closes what a dead one left open."""
    outcome: Literal["finished", "stopped"] | Failure | None = None
    reason: str | None = None
    first_step: int = 0
    last_step: int = 0
    """Of the newest checkpoint that it committed; 0 where it committed none."""
    useful_s: float = 0.0
    """Seconds whose work a checkpoint was the first to hold."""
    repeated_s: float = 0.0
    """Seconds spent on steps that an earlier attempt had committed, but in a checkpoint that was damaged."""
    lost_s: float = 0.0
    """Seconds whose work no checkpoint holds. Of an attempt that died without a word: up to its last sign of life."""

    @property
    def seconds(self) -> float:
        return self.useful_s + self.repeated_s + self.lost_s


class Manifest(_ManifestModel):
    """Everything known of a trial. `history` and `pictures` are append-only: an epoch that is trained again changes nothing."""

    version: Literal[1] = 1
    sweep: str
    trial_id: str
    label: str
    config: dict[str, Any]
    varied: tuple[str, ...]
    proposal: int | None = None
    iterations: int
    status: Status = "running"
    failure: Failure | None = None
    """Why the last attempt failed, where it did."""
    reason: str | None = None
    traceback: str | None = None
    attempt: int = 0
    attempts: tuple[Attempt, ...] = ()
    driver: int = 0
    """The highest token of a driver that ordered an attempt: one with a lower token is out of date."""
    writer: str = ""
    """Random name of the attempt's writer, so that two that start at once never write the same bytes."""
    created_ms: int
    updated_ms: int
    seconds: float = 0.0
    """Seconds of training that the committed checkpoints hold."""
    checkpoints: tuple[Checkpoint, ...] = ()
    history: tuple[EpochMetrics, ...] = ()
    pictures: tuple[EpochPictures, ...] = ()

    @property
    def epochs(self) -> int:
        """Epochs completed and committed."""
        return self.history[-1].epoch if self.history else 0

    @property
    def last(self) -> EpochMetrics | None:
        return self.history[-1] if self.history else None

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        """All that it names: of checkpoints and of pictures."""
        groups = [*(c.objects for c in self.checkpoints), *(p.objects for p in self.pictures)]
        return tuple(ref for group in groups for ref in group.values())

    @property
    def reached(self) -> int:
        """The highest step that was ever committed."""
        return max((attempt.last_step for attempt in self.attempts), default=0)

    def failures(self, failure: Failure, *, driver: int) -> int:
        """How many attempts that this driver ordered ended so."""
        return sum(attempt.outcome == failure and attempt.driver == driver for attempt in self.attempts)

    @property
    def best_checkpoint(self) -> Checkpoint | None:
        """The earliest kept checkpoint with the highest score."""
        return best_of(self.checkpoints)

    @property
    def best(self) -> EpochMetrics | None:
        """The first epoch with the highest `val/miou`."""
        return max(self.history, key=lambda entry: entry.metrics[SCORE], default=None)


def manifest_key(sweep: str, trial_id: str) -> str:
    return f"{sweep}/{trial_id}/manifest.json"


def read_manifest(store: Store, sweep: str, trial_id: str) -> Manifest | None:
    """The trial's manifest, or None where it never started. Raises StoreError."""
    try:
        return parse_manifest(*store.read(manifest_key(sweep, trial_id)), key=manifest_key(sweep, trial_id))[0]
    except NotFound:
        return None


def read_manifests(
    store: Store, sweep: str, trial_ids: Sequence[str] | None = None, *, known: Mapping[str, Manifest] | None = None
) -> dict[str, Manifest]:
    """The manifests of the named trials, or of every trial of the sweep, by trial_id; those that are `known` are not read again."""
    known = known or {}
    if trial_ids is None:
        trial_ids = [key.split("/")[1] for key in store.keys(f"{sweep}/") if key.count("/") == 2 and key.endswith("/manifest.json")]
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = pool.map(lambda trial_id: known.get(trial_id) or read_manifest(store, sweep, trial_id), trial_ids)
        return {manifest.trial_id: manifest for manifest in found if manifest}


def stored_config(manifest: Manifest) -> TrainConfig:
    """The configuration of a stored trial. Raises SpecError where this release does not know its settings."""
    return build_config(manifest.config, path="config")


def identity_of(manifest: Manifest) -> str | None:
    """The identity that the stored trial has in this release; None where it is not the run that its settings now describe."""
    try:
        identity = stored_config(manifest).digest[:ID_LENGTH]
    except SpecError:
        return None
    return identity if manifest.trial_id in (identity, _identity_of_release_0_1(manifest.config)) else None


def _identity_of_release_0_1(config: Mapping[str, Any]) -> str:
    """Releases up to 0.1 hashed every setting, those too that the trial's method does not read."""
    settings = dict(config)
    if settings.get("split"):
        settings |= {"train_list": None, "labeled_list": None, "unlabeled_list": None}
    if settings.get("init_sha256"):
        settings["init_weights"] = None
    return sha256_of(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())[:ID_LENGTH]


def restored_plan(manifest: Manifest) -> TrialPlan:
    """The plan of a stored trial. Raises SweepError where this release does not know its settings."""
    config, identity = stored_config(manifest), identity_of(manifest)
    if identity is None:
        raise SweepError(
            f"trial {manifest.trial_id} was stored by another release: its settings now hash to {config.digest[:ID_LENGTH]}; "
            "read it with the release that wrote it"
        )
    stored_as = manifest.trial_id if manifest.trial_id != identity else None
    return TrialPlan(manifest.sweep, config, manifest.varied, manifest.proposal, stored_as)


class StoredTrials:
    """The manifests of a sweep, to find the one that belongs to a plan."""

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        self._runs = [(manifest, stored_config(manifest)) for manifest in manifests if identity_of(manifest)]
        self._by_key: dict[tuple[str, ...], dict[str, Manifest]] = {}

    def find(self, config: TrainConfig) -> Manifest | None:
        """The trial that is the run of `config`, as far as `config` knows the contents of its files: a finished one, else the newest."""
        unknown = tuple(name for name in CONTENTS if getattr(config, name) is None)
        if unknown not in self._by_key:
            chosen: dict[str, Manifest] = {}
            for manifest, stored in self._runs:
                digest = stored.model_copy(update=dict.fromkeys(unknown)).digest if unknown else stored.digest
                known = chosen.setdefault(digest, manifest)
                if _preference(manifest) > _preference(known):
                    chosen[digest] = manifest
            self._by_key[unknown] = chosen
        return self._by_key[unknown].get(config.digest)

    def of_search(self, spec: SweepSpec, resolve: Resolve = lambda config: config) -> list[Manifest]:
        """The trials of the spec's search, by proposal: values within the space, and what the file asks for otherwise."""
        found = [manifest for manifest, _ in self._runs if manifest.proposal is not None and self._belongs(manifest, spec, resolve)]
        return sorted(found, key=lambda manifest: manifest.proposal or 0)

    def _belongs(self, manifest: Manifest, spec: SweepSpec, resolve: Resolve) -> bool:
        values = {name: manifest.config.get(name) for name in spec.space}
        if not all(spec.space[name].holds(value) for name, value in values.items()):
            return False
        try:
            config = resolve(build_config({**spec.settings, **values}))
        except SpecError:  # the file has changed, and values that once fitted together no longer do
            return False
        return self.find(config) is manifest


def _preference(manifest: Manifest) -> tuple[bool, int]:
    return manifest.status == "finished", manifest.updated_ms


def read_checkpoint(store: Store, checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's files, verified. Raises NotFound, Corrupt."""
    files = {}
    for name, ref in checkpoint.objects.items():
        files[name], _ = store.read(ref.key)
        if sha256_of(files[name]) != ref.sha256:
            raise Corrupt(ref.key)
    return files


def retained(checkpoints: tuple[Checkpoint, ...], retention: Retention) -> tuple[Checkpoint, ...]:
    """The checkpoints that a trial keeps while it trains."""
    keep = set(sorted(c.step for c in checkpoints)[-retention.last :])
    best = best_of(checkpoints)
    if retention.best and best:
        keep.add(best.step)
    return tuple(c for c in checkpoints if c.step in keep)


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The earliest of those with the highest score; None where none closes an epoch."""
    scored = (c for c in checkpoints if c.score is not None)
    return max(scored, key=lambda c: (c.score or 0.0, -c.step), default=None)


def parse_manifest(body: bytes, etag: str, *, key: str) -> tuple[Manifest, str]:
    """The manifest that lies under `key`, and its etag. Raises StoreError, also for a copy of another trial's or another sweep's."""
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        raise StoreError(f"{key}: not a manifest ({error.error_count()} faults); move it away to start the trial afresh") from error
    if key != manifest_key(manifest.sweep, manifest.trial_id):
        raise StoreError(f"{key}: not the manifest of that trial of that sweep; move copies out of the store, then run again")
    return manifest, etag


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes to store."""
    return json.dumps(manifest.model_dump(mode="json"), allow_nan=False).encode()


def sha256_of(body: bytes) -> str:
    """The checksum that names a stored object's content."""
    return hashlib.sha256(body).hexdigest()
