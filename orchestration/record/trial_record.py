"""Writes a trial's manifest: opens an attempt, commits checkpoints, closes the attempt, and accounts for its seconds."""

from __future__ import annotations

import logging
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from orchestration.errors import Conflict, Corrupt, Fenced, NotFound, StoreError, StoreUnavailable
from orchestration.failures import Failure
from orchestration.plan.spec import Retention, Retries
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.lease import superseded
from orchestration.record.manifest import (
    CHECKPOINTS,
    FOLDERS,
    PICTURES,
    Attempt,
    Checkpoint,
    EpochMetrics,
    EpochPictures,
    Manifest,
    ObjectRef,
    dump_manifest,
    manifest_key,
    parse_manifest,
    read_checkpoint,
    retained,
    sha256_of,
)
from orchestration.record.stored_trials import new_manifest
from orchestration.record.trial_state import TrialState, budget_spent
from orchestration.store.base import Store

log = logging.getLogger(__name__)

WORKER_DIED = "worker died without reporting an error (killed, out of memory, or node lost)"
"""Reason of an attempt that nobody closed."""


def _wall_ms() -> int:
    return time.time_ns() // 10**6


class TrialRecord:
    """The one writer of a trial. Raises Fenced once another attempt has replaced it.

    The attempt accounts for every second from `open` to its end, measured by a monotonic clock. A second is useful or repeated if a
    checkpoint contains its work, otherwise lost.
    """

    def __init__(
        self, store: Store, manifest: Manifest, etag: str, *, retention: Retention, now_ms: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._store, self._retention, self._now_ms, self._clock = store, retention, now_ms, clock
        self.manifest, self._etag = manifest, etag
        self._opened_s = self._accounted_s = clock()
        self._first = self._step = 0  # first step of the attempt; last step whose seconds are accounted for
        self._abandoned = False
        self.unusable: list[str] = []
        """One line for each checkpoint that could not be used."""

    @classmethod
    def open(
        cls,
        store: Store,
        plan: TrialPlan,
        *,
        retention: Retention,
        driver: int = 0,
        machine: Mapping[str, str] | None = None,
        now_ms: Callable[[], int] = _wall_ms,
        clock: Callable[[], float] = time.monotonic,
    ) -> TrialRecord:
        """Start an attempt for the driver with the token `driver`. Fences every earlier writer.

        A finished trial is opened without a new attempt. `machine`: description of the machine, stored with the attempt.

        Raises:
            Fenced: a driver with a higher token has started an attempt.
        """
        key = manifest_key(plan.sweep, plan.trial_id)
        while True:
            manifest, etag = _read_or_new(store, plan, key, now_ms())
            if manifest.driver > driver:
                raise superseded(f"trial {plan.trial_id}", manifest.driver, driver)
            if manifest.status is TrialState.FINISHED:
                assert etag is not None
                return cls(store, manifest, etag, retention=retention, now_ms=now_ms, clock=clock)
            fresh = _with_attempt(manifest, driver, platform.node(), dict(machine or {}), now_ms())
            try:
                etag = store.replace(key, dump_manifest(fresh), expected=etag)
                return cls(store, fresh, etag, retention=retention, now_ms=now_ms, clock=clock)
            except Conflict:
                log.warning("trial %s: another attempt started at the same time; reading the manifest again", plan.trial_id)

    @property
    def worked_s(self) -> float:
        """Seconds since this attempt started."""
        return self._clock() - self._opened_s

    def usable_checkpoints(self) -> Iterator[tuple[Checkpoint, dict[str, bytes]]]:
        """Checkpoints whose objects are complete and undamaged, newest first. Adds a line to `unusable` for each other one."""
        for checkpoint in sorted(self.manifest.checkpoints, key=lambda c: c.step, reverse=True):
            try:
                files = read_checkpoint(self._store, checkpoint)
            except (NotFound, Corrupt) as error:
                self.pass_over(checkpoint, error)
                continue
            yield checkpoint, files

    def pass_over(self, checkpoint: Checkpoint, error: Exception) -> None:
        """Log that a checkpoint is unusable, and add a line to `unusable`."""
        self.unusable.append(f"checkpoint of step {checkpoint.step} is unusable ({error})")
        log.warning("trial %s: %s", self.manifest.trial_id, self.unusable[-1])

    def begin_at(self, step: int) -> None:
        """Set the step from which the attempt resumes."""
        self._first = self._step = step

    def commit(
        self,
        *,
        step: int,
        epoch: int,
        files: Mapping[str, bytes],
        entries: Sequence[EpochMetrics],
        seconds: float,
        pictures: Mapping[int, Mapping[str, bytes]] | None = None,
        at_s: float | None = None,
    ) -> None:
        """Write `files` as the checkpoint of `step`, then the manifest, then delete what the retention no longer keeps.

        Args:
            pictures: files by epoch. Epochs that already have pictures are skipped.
            at_s: time by this record's clock at which `files` were captured; default now.

        Raises:
            Fenced: another attempt has replaced this one; nothing was committed.
        """
        objects = self._put(f"{CHECKPOINTS}/{step:08d}", files)
        drawn, captured_s = self._put_pictures(pictures or {}), self._clock() if at_s is None else at_s
        before: set[str] = set()

        def changes() -> dict[str, Any]:
            now = self.manifest
            before.update(ref.key for checkpoint in now.checkpoints for ref in checkpoint.objects.values())
            history = (*now.history, *(entry for entry in entries if entry.epoch > now.epochs))
            score = next((entry.score for entry in history if entry.step == step), None)
            checkpoint = Checkpoint(step=step, epoch=epoch, attempt=now.attempt, score=score, objects=objects)
            known = {stored.epoch for stored in now.pictures}
            return {
                "checkpoints": retained((*(c for c in now.checkpoints if c.step < step), checkpoint), self._retention),
                "history": history,
                "pictures": (*now.pictures, *(entry for entry in drawn if entry.epoch not in known)),
                "seconds": max(seconds, now.seconds),
            }

        self._swap(lambda: self._account(step, max(captured_s, self._accounted_s)), changes)
        self._accounted_s, self._step = max(captured_s, self._accounted_s), step
        self._drop(lambda: before)

    def finish(self) -> None:
        """Close the attempt of a completed trial, and delete the objects of uncommitted uploads."""
        self._end({"outcome": "finished"}, lost=False, status=TrialState.FINISHED)
        prefixes = [f"{self.manifest.sweep}/{self.manifest.trial_id}/{folder}/" for folder in FOLDERS]
        self._drop(lambda: chain.from_iterable(map(self._store.keys, prefixes)))

    def hurry(self, store: Store) -> None:
        """Write through `store` from now on. It should have a shorter deadline."""
        self._store = store

    def leave(self) -> None:
        """Leave the attempt open, because a commit is still running and nobody waits for it. The next attempt closes it."""
        self._abandoned = True

    def stop(self) -> None:
        """Close the attempt because the sweep was stopped. The next run of the sweep resumes the trial."""
        self._end({"outcome": "interrupted"}, lost=True, status=TrialState.INTERRUPTED)

    def fail(self, *, failure: Failure, reason: str, traceback: str = "") -> None:
        """Close the attempt as failed. The trial has failed too, unless another attempt follows."""
        end = {"outcome": failure, "reason": reason}
        self._end(end, lost=True, status=TrialState.FAILED, failure=failure, reason=reason, traceback=traceback)

    def _put(self, folder: str, files: Mapping[str, bytes]) -> dict[str, ObjectRef]:
        """Write the files below the trial's `folder`, with this attempt's number in their keys."""
        place = f"{self.manifest.sweep}/{self.manifest.trial_id}/{folder}-{self.manifest.attempt}"
        objects = {name: ObjectRef(key=f"{place}/{name}", sha256=sha256_of(body), size=len(body)) for name, body in files.items()}
        for name, ref in objects.items():
            self._store.write(ref.key, files[name])
        return objects

    def _put_pictures(self, pictures: Mapping[int, Mapping[str, bytes]]) -> list[EpochPictures]:
        """Write the pictures of epochs that have none yet."""
        known = {stored.epoch for stored in self.manifest.pictures}
        fresh = sorted((epoch, files) for epoch, files in pictures.items() if epoch not in known)
        return [EpochPictures(epoch=epoch, objects=self._put(f"{PICTURES}/{epoch:04d}", files)) for epoch, files in fresh]

    def _account(self, step: int, at_s: float) -> dict[str, Any]:
        """Changes to the attempt that account for the seconds up to `at_s`, in which it trained up to `step`."""
        attempt, spent_s = self.manifest.attempts[-1], at_s - self._accounted_s
        repeated = max(0, min(step, self.manifest.reached) - self._step) / max(1, step - self._step)
        return {
            "first_step": self._first,
            "last_step": step,
            "useful_s": attempt.useful_s + (1 - repeated) * spent_s,
            "repeated_s": attempt.repeated_s + repeated * spent_s,
        }

    def _end(self, closing: dict[str, Any], *, lost: bool, **changes: Any) -> None:
        if self._abandoned:
            raise StoreUnavailable(f"{self._store.uri}: the last commit is still running; the attempt stays open")
        kind, now_s = "lost_s" if lost else "useful_s", self._clock()

        def account() -> dict[str, Any]:
            left_s = max(0.0, now_s - self._accounted_s)
            return closing | {"ended_ms": self._now_ms(), kind: getattr(self.manifest.attempts[-1], kind) + left_s}

        self._swap(account, lambda: changes)

    def _swap(self, attempt: Callable[[], dict[str, Any]], changes: Callable[[], dict[str, Any]]) -> None:
        """Commit the manifest with `changes`, and with `attempt` in its last attempt, both made from `self.manifest`.

        A refused commit does not change `self`. If an earlier commit of this attempt arrived although its reply was lost, it is adopted
        first. An attempt that has ended stays as it ended.
        """
        while True:
            last = self.manifest.attempts[-1].model_copy(update=attempt())
            attempts = (*self.manifest.attempts[:-1], last)
            fresh = self.manifest.model_copy(update={**changes(), "attempts": attempts, "updated_ms": self._now_ms()})
            try:
                self._etag = self._store.replace(manifest_key(fresh.sweep, fresh.trial_id), dump_manifest(fresh), expected=self._etag)
            except Conflict as error:
                if not self._adopted():
                    raise Fenced(
                        f"trial {fresh.trial_id}: attempt {fresh.attempt} was replaced by a later one; its uncommitted work is lost"
                    ) from error
                if self.manifest.is_open:
                    continue
                return
            self.manifest = fresh
            return

    def _adopted(self) -> bool:
        """Whether this attempt itself wrote the stored manifest. Then it is this record's from now on."""
        key = manifest_key(self.manifest.sweep, self.manifest.trial_id)
        try:
            found, etag = parse_manifest(*self._store.read(key), key=key)
        except NotFound:
            return False
        if found.writer != self.manifest.writer or etag == self._etag:
            return False
        self._accounted_s += found.attempts[-1].seconds - self.manifest.attempts[-1].seconds
        self._step = found.attempts[-1].last_step or self._first
        self.manifest, self._etag = found, etag
        return True

    def _drop(self, keys: Callable[[], Iterable[str]]) -> None:
        """Delete the keys that the manifest does not name. A failure is only logged: the commit is complete, and gc can delete them."""
        named = {ref.key for ref in self.manifest.objects}
        try:
            self._store.delete([key for key in keys() if key not in named])
        except StoreError as error:
            log.warning("trial %s: old checkpoints were not removed: %s; `rrn-sweep gc` removes them", self.manifest.trial_id, error)


def settle(
    store: Store,
    sweep: str,
    trial_id: str,
    *,
    driver: int,
    failure: Failure | None,
    reason: str,
    traceback: str = "",
    worked_s: float = 0.0,
    retries: Retries | None = None,
    unopened: TrialPlan | None = None,
    after: int = 0,
    now_ms: Callable[[], int] = _wall_ms,
) -> Manifest | None:
    """Close the open attempt of a dead worker, and fence it in case it is still alive.

    Args:
        failure: None if the worker was interrupted for a reason that is not its own.
        worked_s: seconds from the attempt's start to its last heartbeat; 0 if unknown.
        retries: budgets per class of failure. If this one is used up, the trial fails. None: the trial is only interrupted.
        unopened: the trial's plan, if its worker may have died before it opened an attempt. Unless the store has an attempt later than
            number `after`, one is added, so that the budget counts every death.

    Returns:
        The trial's manifest, unchanged if no attempt was open. None if the trial never started and `unopened` is not given.

    Raises:
        Fenced: a driver with a higher token started the attempt.
    """
    key, ended_ms = manifest_key(sweep, trial_id), now_ms()  # of the call, as `worked_s`: the store may take its time
    while True:
        try:
            manifest, etag = parse_manifest(*store.read(key), key=key)
        except NotFound:
            if unopened is None:
                return None
            manifest, etag = new_manifest(unopened, now_ms=ended_ms), None
        died_early = unopened and manifest.attempt <= after and manifest.status is not TrialState.FINISHED
        if not manifest.is_open and not died_early:
            return manifest
        if manifest.driver > driver:
            raise superseded(f"trial {trial_id}", manifest.driver, driver)
        if not manifest.is_open:
            manifest = _with_attempt(manifest, driver, "an unknown node", {}, ended_ms)
        closed = _closed(manifest, failure, reason, worked_s, ended_ms)
        failed = retries is not None and budget_spent(closed, retries, driver=driver)
        changes = {
            "status": TrialState.FAILED if failed else TrialState.INTERRUPTED,
            "driver": max(driver, manifest.driver),
            "updated_ms": now_ms(),
        }
        fresh = closed.model_copy(update=changes | {"traceback": traceback or None})
        with suppress(Conflict):  # the worker was alive and wrote the manifest: read it again
            store.replace(key, dump_manifest(fresh), expected=etag)
            return fresh


def _read_or_new(store: Store, plan: TrialPlan, key: str, now_ms: int) -> tuple[Manifest, str | None]:
    try:
        return parse_manifest(*store.read(key), key=key)
    except NotFound:
        return new_manifest(plan, now_ms=now_ms), None


def _with_attempt(manifest: Manifest, driver: int, node: str, machine: dict[str, str], now_ms: int) -> Manifest:
    """The manifest with a new attempt, after closing the open attempt of a dead worker."""
    if manifest.is_open:
        manifest = _closed(manifest, "lost", WORKER_DIED, 0.0, manifest.updated_ms)
    attempt = Attempt(number=manifest.attempt + 1, driver=driver, node=node, machine=machine, started_ms=now_ms)
    changes = {
        "attempt": attempt.number,
        "attempts": (*manifest.attempts, attempt),
        "driver": driver,
        "writer": uuid.uuid4().hex,
        "status": TrialState.RUNNING,
        "failure": None,
        "reason": None,
        "traceback": None,
        "updated_ms": now_ms,
    }
    return manifest.model_copy(update=changes)


def _closed(manifest: Manifest, failure: Failure | None, reason: str, worked_s: float, ended_ms: int) -> Manifest:
    """The manifest with its last attempt closed by another process. Fences the attempt's writer."""
    attempt = manifest.attempts[-1]
    end = {"ended_ms": ended_ms, "outcome": failure or "interrupted", "reason": reason, "lost_s": max(0.0, worked_s - attempt.seconds)}
    attempts = (*manifest.attempts[:-1], attempt.model_copy(update=end))
    return manifest.model_copy(update={"attempts": attempts, "failure": failure, "reason": reason, "writer": uuid.uuid4().hex})
