"""A trial's manifest in the store: what was committed, by which attempt; the only source of truth.

Layout below the store's root::

    SWEEP/TRIAL/manifest.json                          committed by compare-and-swap
    SWEEP/TRIAL/checkpoints/STEP-ATTEMPT/model.safetensors, state.pt
    SWEEP/tracking.json                                which trials the tracking server was last told the whole truth about
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestration.errors import Conflict, Corrupt, Fenced, NotFound, SpecError, StoreError, SweepError
from orchestration.plan import ID_LENGTH, Resolve, TrialPlan
from orchestration.spec import Retention, SweepSpec, build_config
from orchestration.store import Store
from rrn_core.config import TrainConfig

log = logging.getLogger(__name__)

Status = Literal["running", "finished", "failed"]
SCORE = "val/miou"
"""The metric by which the best checkpoint is chosen."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ObjectRef(_Record):
    """One stored object and what it must hash to."""

    key: str
    sha256: str
    size: int


class Checkpoint(_Record):
    """All that is needed to go on after `step`; `epoch` counts completed epochs."""

    step: int
    epoch: int
    attempt: int
    score: float | None
    """`val/miou` where the checkpoint closes an epoch."""
    objects: dict[str, ObjectRef]


class Entry(_Record):
    """The metrics of one completed epoch (counted from 1) and the instant at which they were first measured."""

    epoch: int
    step: int
    time_ms: int
    metrics: dict[str, float]


class Manifest(_Record):
    """Everything known of a trial. `history` is append-only: an epoch that is trained again changes nothing."""

    version: Literal[1] = 1
    sweep: str
    trial_id: str
    label: str
    config: dict[str, Any]
    varied: tuple[str, ...]
    proposal: int | None = None
    iterations: int
    status: Status = "running"
    reason: str | None = None
    traceback: str | None = None
    attempt: int = 0
    writer: str = ""
    """Random name of the attempt's writer, so that two that start at once never write the same bytes."""
    created_ms: int
    updated_ms: int
    seconds: float = 0.0
    """Seconds of training that the committed checkpoints hold."""
    checkpoints: tuple[Checkpoint, ...] = ()
    history: tuple[Entry, ...] = ()

    @property
    def epochs(self) -> int:
        """Epochs completed and committed."""
        return self.history[-1].epoch if self.history else 0

    @property
    def last(self) -> Entry | None:
        return self.history[-1] if self.history else None

    @property
    def best_checkpoint(self) -> Checkpoint | None:
        """The earliest kept checkpoint with the highest score."""
        return _best(self.checkpoints)

    @property
    def best(self) -> Entry | None:
        """The first epoch with the highest `val/miou`."""
        return max(self.history, key=lambda entry: entry.metrics[SCORE], default=None)


def manifest_key(sweep: str, trial_id: str) -> str:
    return f"{sweep}/{trial_id}/manifest.json"


def read_manifest(store: Store, sweep: str, trial_id: str) -> Manifest | None:
    """The trial's manifest, or None where it never started. Raises StoreError."""
    try:
        return _parse(*store.read(manifest_key(sweep, trial_id)), key=manifest_key(sweep, trial_id))[0]
    except NotFound:
        return None


def read_manifests(store: Store, sweep: str, trial_ids: Sequence[str] | None = None) -> dict[str, Manifest]:
    """The manifests of the named trials, or of every trial of the sweep, by trial_id."""
    if trial_ids is None:
        trial_ids = [key.split("/")[1] for key in store.keys(f"{sweep}/") if key.count("/") == 2 and key.endswith("/manifest.json")]
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = pool.map(lambda trial_id: read_manifest(store, sweep, trial_id), trial_ids)
        return {manifest.trial_id: manifest for manifest in found if manifest}


def restored_plan(manifest: Manifest) -> TrialPlan:
    """The plan of a stored trial. Raises SweepError where this version no longer knows its settings."""
    plan = TrialPlan(manifest.sweep, build_config(manifest.config, path="config"), manifest.varied, manifest.proposal)
    if plan.trial_id != manifest.trial_id:
        raise SweepError(f"trial {manifest.trial_id} was made by another version of this program: its settings now hash to {plan.trial_id}")
    return plan


def proposed(spec: SweepSpec, manifests: Mapping[str, Manifest], resolve: Resolve = lambda config: config) -> list[Manifest]:
    """The trials that belong to the spec's search, by proposal: values within the space, and what the file asks for otherwise."""

    def belongs(manifest: Manifest) -> bool:
        values = {name: manifest.config.get(name) for name in spec.space}
        if manifest.proposal is None or not all(spec.space[name].holds(value) for name, value in values.items()):
            return False
        try:
            config = build_config({**spec.settings, **values})
        except SpecError:  # the file has changed, and values that once fitted together no longer do
            return False
        return agree(resolve(config), manifest)

    return sorted(filter(belongs, manifests.values()), key=lambda m: m.proposal or 0)


def agree(config: TrainConfig, manifest: Manifest) -> bool:
    """Whether the trial is the run of `config`, as far as `config` knows the contents of its files."""
    try:
        stored = build_config(manifest.config)
    except SpecError:  # settings of another version of this program
        return False
    if stored.digest()[:ID_LENGTH] != manifest.trial_id:
        return False
    known = stored.model_copy(update={name: None for name in ("split", "init_sha256") if getattr(config, name) is None})
    return known.digest() == config.digest()


def adopted(plan: TrialPlan, manifests: Iterable[Manifest]) -> TrialPlan:
    """A plan whose files were not at hand, as the newest trial that was made of it; the plan itself where there is none."""
    made = [manifest for manifest in manifests if agree(plan.config, manifest)]
    return replace(plan, config=restored_plan(max(made, key=lambda m: m.updated_ms)).config) if made else plan


def tracked(store: Store, sweep: str, uri: str) -> set[str]:
    """Trials whose whole truth the tracking server at `uri` was told when a sweep last ended in order."""
    try:
        told = json.loads(store.read(f"{sweep}/tracking.json")[0])
    except NotFound:
        return set()
    return set(told["trials"]) if told["uri"] == uri else set()


def write_tracked(store: Store, sweep: str, uri: str, trial_ids: Sequence[str]) -> None:
    """Remember what `tracked` answers. `uri` must hold no credential."""
    store.write(f"{sweep}/tracking.json", json.dumps({"uri": uri, "trials": sorted(trial_ids)}).encode())


class TrialRecord:
    """The handle of a trial's one writer; a writer that another attempt replaced is refused with Fenced."""

    def __init__(self, store: Store, manifest: Manifest, etag: str, *, retention: Retention, now_ms: Callable[[], int]) -> None:
        self._store, self._retention, self._now_ms = store, retention, now_ms
        self.manifest, self._etag = manifest, etag
        self.unusable: list[str] = []
        """What `load_checkpoint` had to pass over, a line each."""

    @classmethod
    def open(
        cls, store: Store, plan: TrialPlan, *, retention: Retention, now_ms: Callable[[], int] = lambda: time.time_ns() // 10**6
    ) -> TrialRecord:
        """Take the trial over: the attempt's number grows by one, every earlier writer is fenced off."""
        key = manifest_key(plan.sweep, plan.trial_id)
        while True:
            manifest, etag = _read_or_new(store, plan, key, now_ms())
            if manifest.status == "finished":
                assert etag is not None
                return cls(store, manifest, etag, retention=retention, now_ms=now_ms)
            taken = {
                "attempt": manifest.attempt + 1,
                "writer": uuid.uuid4().hex,
                "status": "running",
                "reason": None,
                "traceback": None,
                "updated_ms": now_ms(),
            }
            try:
                fresh = manifest.model_copy(update=taken)
                return cls(store, fresh, store.replace(key, _dump(fresh), expected=etag), retention=retention, now_ms=now_ms)
            except Conflict:
                log.warning("trial %s: another attempt is starting too, reading again", plan.trial_id)

    def load_checkpoint(self) -> tuple[Checkpoint, dict[str, bytes]] | None:
        """The newest checkpoint whose objects are all there and hash as committed; each that is passed over is told in `unusable`."""
        for checkpoint in sorted(self.manifest.checkpoints, key=lambda c: c.step, reverse=True):
            try:
                return checkpoint, read_checkpoint(self._store, checkpoint)
            except (NotFound, Corrupt) as error:
                self.unusable.append(f"checkpoint of step {checkpoint.step} is unusable ({error}), taking the one before")
                log.warning("trial %s: %s", self.manifest.trial_id, self.unusable[-1])
        return None

    def commit(self, *, step: int, epoch: int, files: Mapping[str, bytes], entries: Sequence[Entry], seconds: float) -> None:
        """Store `files` as the checkpoint of `step`, then the manifest that names it, then drop what retention no longer keeps.

        Raises:
            Fenced: another attempt took the trial over; nothing was committed.
        """
        folder = f"{self.manifest.sweep}/{self.manifest.trial_id}/checkpoints/{step:08d}-{self.manifest.attempt}"
        objects = {name: ObjectRef(key=f"{folder}/{name}", sha256=_sha256(body), size=len(body)) for name, body in files.items()}
        for name, ref in objects.items():
            self._store.write(ref.key, files[name])
        history = (*self.manifest.history, *(entry for entry in entries if entry.epoch > self.manifest.epochs))
        score = next((entry.metrics[SCORE] for entry in history if entry.step == step), None)
        checkpoint = Checkpoint(step=step, epoch=epoch, attempt=self.manifest.attempt, score=score, objects=objects)
        before = self.manifest.checkpoints
        kept = _retained((*(c for c in before if c.step < step), checkpoint), self._retention)
        self._swap(checkpoints=kept, history=history, seconds=max(seconds, self.manifest.seconds))
        self._drop(lambda: (ref.key for c in before if c not in kept for ref in c.objects.values()))

    def finish(self) -> None:
        """The trial is complete; objects that uncommitted uploads left behind are removed."""
        self._swap(status="finished")
        prefix = f"{self.manifest.sweep}/{self.manifest.trial_id}/checkpoints/"
        self._drop(lambda: self._store.keys(prefix))

    def fail(self, *, reason: str, traceback: str) -> None:
        self._swap(status="failed", reason=reason, traceback=traceback)

    def _swap(self, **changes: Any) -> None:
        """Commit the manifest with `changes`; `self` is unchanged when it is refused."""
        fresh = self.manifest.model_copy(update={**changes, "updated_ms": self._now_ms()})
        key = manifest_key(fresh.sweep, fresh.trial_id)
        try:
            self._etag = self._store.replace(key, _dump(fresh), expected=self._etag)
        except Conflict as error:
            raise Fenced(f"trial {fresh.trial_id}: attempt {fresh.attempt} was replaced by a later one; its work is dropped") from error
        self.manifest = fresh

    def _drop(self, keys: Callable[[], Iterable[str]]) -> None:
        """Delete what the manifest does not name. The commit stands already, so a failure here only leaves litter."""
        named = {ref.key for c in self.manifest.checkpoints for ref in c.objects.values()}
        try:
            self._store.delete([key for key in keys() if key not in named])
        except StoreError as error:
            log.warning("trial %s: old checkpoints were not removed: %s", self.manifest.trial_id, error)


def read_checkpoint(store: Store, checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's files, verified. Raises NotFound, Corrupt."""
    files = {}
    for name, ref in checkpoint.objects.items():
        files[name], _ = store.read(ref.key)
        if _sha256(files[name]) != ref.sha256:
            raise Corrupt(ref.key)
    return files


def _retained(checkpoints: tuple[Checkpoint, ...], retention: Retention) -> tuple[Checkpoint, ...]:
    keep = set(sorted(c.step for c in checkpoints)[-retention.last :])
    best = _best(checkpoints)
    if retention.best and best:
        keep.add(best.step)
    return tuple(c for c in checkpoints if c.step in keep)


def _best(checkpoints: tuple[Checkpoint, ...]) -> Checkpoint | None:
    scored = (c for c in checkpoints if c.score is not None)
    return max(scored, key=lambda c: (c.score or 0.0, -c.step), default=None)


def _read_or_new(store: Store, plan: TrialPlan, key: str, now_ms: int) -> tuple[Manifest, str | None]:
    try:
        return _parse(*store.read(key), key=key)
    except NotFound:
        fresh = Manifest(
            sweep=plan.sweep,
            trial_id=plan.trial_id,
            label=plan.label,
            config=plan.config.model_dump(mode="json"),
            varied=plan.varied,
            proposal=plan.proposal,
            iterations=plan.iterations,
            created_ms=now_ms,
            updated_ms=now_ms,
        )
        return fresh, None


def _parse(body: bytes, etag: str, *, key: str) -> tuple[Manifest, str]:
    try:
        return Manifest.model_validate_json(body), etag
    except ValidationError as error:
        raise StoreError(f"{key}: not a manifest ({error.error_count()} faults); move it away to start the trial afresh") from error


def _dump(manifest: Manifest) -> bytes:
    return json.dumps(manifest.model_dump(mode="json"), allow_nan=False).encode()


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
