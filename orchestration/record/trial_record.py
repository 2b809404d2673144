"""Writing a trial's record: taking the trial over, committing checkpoints, closing the attempt, and the account of its seconds."""

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
from orchestration.record.manifest import (
    CHECKPOINTS,
    FOLDERS,
    PICTURES,
    SCORE,
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
from orchestration.store.base import Store

log = logging.getLogger(__name__)


def _wall_ms() -> int:
    return time.time_ns() // 10**6


class TrialRecord:
    """The handle of a trial's one writer; a writer that another attempt replaced is refused with Fenced.

    Every second from `open` to the end is accounted for in the attempt, by a clock that never jumps: useful or repeated
    where a checkpoint holds its work, else lost.
    """

    def __init__(
        self, store: Store, manifest: Manifest, etag: str, *, retention: Retention, now_ms: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._store, self._retention, self._now_ms, self._clock = store, retention, now_ms, clock
        self.manifest, self._etag = manifest, etag
        self._opened_s = self._accounted_s = clock()
        self._first = self._step = 0  # where training began, and up to where it is accounted for
        self._left = False
        self.unusable: list[str] = []
        """Checkpoints that had to be passed over, a line each."""

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
        """Take the trial over for the driver with the token `driver`: a new attempt begins, every earlier writer is fenced off.

        A finished trial is opened as it is. `machine`: what is noted of where the attempt runs.

        Raises:
            Fenced: a driver with a higher token has ordered an attempt.
        """
        key = manifest_key(plan.sweep, plan.trial_id)
        while True:
            manifest, etag = _read_or_new(store, plan, key, now_ms())
            if manifest.driver > driver:
                raise _superseded(plan.trial_id, manifest, driver)
            if manifest.status == "finished":
                assert etag is not None
                return cls(store, manifest, etag, retention=retention, now_ms=now_ms, clock=clock)
            fresh = _with_attempt(manifest, driver, dict(machine or {}), now_ms())
            try:
                etag = store.replace(key, dump_manifest(fresh), expected=etag)
                return cls(store, fresh, etag, retention=retention, now_ms=now_ms, clock=clock)
            except Conflict:
                log.warning("trial %s: another attempt is starting too, reading again", plan.trial_id)

    @property
    def worked_s(self) -> float:
        """Seconds since this attempt began."""
        return self._clock() - self._opened_s

    def usable_checkpoints(self) -> Iterator[tuple[Checkpoint, dict[str, bytes]]]:
        """Checkpoints whose objects are all there and hash as committed, the newest first; the others are told in `unusable`."""
        for checkpoint in sorted(self.manifest.checkpoints, key=lambda c: c.step, reverse=True):
            try:
                files = read_checkpoint(self._store, checkpoint)
            except (NotFound, Corrupt) as error:
                self.pass_over(checkpoint, error)
                continue
            yield checkpoint, files

    def pass_over(self, checkpoint: Checkpoint, error: Exception) -> None:
        """Note that a checkpoint could not be used."""
        self.unusable.append(f"checkpoint of step {checkpoint.step} is unusable ({error}), taking the one before")
        log.warning("trial %s: %s", self.manifest.trial_id, self.unusable[-1])

    def begin_at(self, step: int) -> None:
        """Say from which step the attempt trains on."""
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
        """Store `files` as the checkpoint of `step`, then the manifest that names it, then drop what retention no longer keeps.

        Args:
            pictures: files by epoch; those of an epoch that has some already are left out.
            at_s: instant of this record's clock at which `files` were captured; unset, now.

        Raises:
            Fenced: another attempt took the trial over; nothing was committed.
        """
        objects = self._put(f"{CHECKPOINTS}/{step:08d}", files)
        history = (*self.manifest.history, *(entry for entry in entries if entry.epoch > self.manifest.epochs))
        score = next((entry.metrics[SCORE] for entry in history if entry.step == step), None)
        checkpoint = Checkpoint(step=step, epoch=epoch, attempt=self.manifest.attempt, score=score, objects=objects)
        before = self.manifest.checkpoints
        changes = {
            "checkpoints": retained((*(c for c in before if c.step < step), checkpoint), self._retention),
            "history": history,
            "pictures": (*self.manifest.pictures, *self._drawn(pictures or {})),
            "seconds": max(seconds, self.manifest.seconds),
        }
        self._swap(self._account(step, self._clock() if at_s is None else at_s), **changes)
        self._drop(lambda: (ref.key for c in before for ref in c.objects.values()))

    def finish(self) -> None:
        """The trial is complete; objects that uncommitted uploads left behind are removed."""
        self._end({"outcome": "finished"}, lost=False, status="finished")
        prefixes = [f"{self.manifest.sweep}/{self.manifest.trial_id}/{folder}/" for folder in FOLDERS]
        self._drop(lambda: chain.from_iterable(map(self._store.keys, prefixes)))

    def hurry(self, store: Store) -> None:
        """From here on write through `store`, which gives up sooner."""
        self._store = store

    def leave(self) -> None:
        """A commit is still under way, and nobody waits for it: the attempt stays open, and who comes next closes it."""
        self._left = True

    def stop(self) -> None:
        """The attempt ends because the sweep was stopped; the trial goes on when it is run again."""
        self._end({"outcome": "stopped"}, lost=True)

    def fail(self, *, failure: Failure, reason: str, traceback: str = "") -> None:
        """The attempt failed; the trial has, unless another attempt follows."""
        end = {"outcome": failure, "reason": reason}
        self._end(end, lost=True, status="failed", failure=failure, reason=reason, traceback=traceback)

    def _put(self, folder: str, files: Mapping[str, bytes]) -> dict[str, ObjectRef]:
        """Write the files below the trial's `folder` of this attempt."""
        place = f"{self.manifest.sweep}/{self.manifest.trial_id}/{folder}-{self.manifest.attempt}"
        objects = {name: ObjectRef(key=f"{place}/{name}", sha256=sha256_of(body), size=len(body)) for name, body in files.items()}
        for name, ref in objects.items():
            self._store.write(ref.key, files[name])
        return objects

    def _drawn(self, pictures: Mapping[int, Mapping[str, bytes]]) -> list[EpochPictures]:
        """The pictures of epochs that have none yet, written."""
        known = {drawn.epoch for drawn in self.manifest.pictures}
        fresh = sorted((epoch, files) for epoch, files in pictures.items() if epoch not in known)
        return [EpochPictures(epoch=epoch, objects=self._put(f"{PICTURES}/{epoch:04d}", files)) for epoch, files in fresh]

    def _account(self, step: int, at_s: float) -> dict[str, Any]:
        """The attempt with the seconds from the last account to `at_s`, in which it went from there to `step`."""
        attempt, spent_s = self.manifest.attempts[-1], max(0.0, at_s - self._accounted_s)
        again = max(0, min(step, self.manifest.reached) - self._step) / max(1, step - self._step)
        self._accounted_s, self._step = max(at_s, self._accounted_s), step
        return {
            "first_step": self._first,
            "last_step": step,
            "useful_s": attempt.useful_s + (1 - again) * spent_s,
            "repeated_s": attempt.repeated_s + again * spent_s,
        }

    def _end(self, closing: dict[str, Any], *, lost: bool, **changes: Any) -> None:
        if self._left:
            raise StoreUnavailable(f"{self._store.uri}: the last commit has not come to an end")
        kind = "lost_s" if lost else "useful_s"
        left_s = max(0.0, self._clock() - self._accounted_s)
        closing |= {"ended_ms": self._now_ms(), kind: getattr(self.manifest.attempts[-1], kind) + left_s}
        self._swap(closing, **changes)

    def _swap(self, attempt: dict[str, Any], **changes: Any) -> None:
        """Commit the manifest with `changes`, and its last attempt with `attempt`; `self` is unchanged when it is refused."""
        attempts = (*self.manifest.attempts[:-1], self.manifest.attempts[-1].model_copy(update=attempt))
        fresh = self.manifest.model_copy(update={**changes, "attempts": attempts, "updated_ms": self._now_ms()})
        key = manifest_key(fresh.sweep, fresh.trial_id)
        try:
            self._etag = self._store.replace(key, dump_manifest(fresh), expected=self._etag)
        except Conflict as error:
            raise Fenced(f"trial {fresh.trial_id}: attempt {fresh.attempt} was replaced by a later one; its work is dropped") from error
        self.manifest = fresh

    def _drop(self, keys: Callable[[], Iterable[str]]) -> None:
        """Delete what the manifest does not name. The commit stands already, so a failure here only leaves litter."""
        named = {ref.key for ref in self.manifest.objects}
        try:
            self._store.delete([key for key in keys() if key not in named])
        except StoreError as error:
            log.warning("trial %s: old checkpoints were not removed: %s", self.manifest.trial_id, error)


def settle(
    store: Store,
    sweep: str,
    trial_id: str,
    *,
    driver: int,
    failure: Failure,
    reason: str,
    traceback: str = "",
    worked_s: float = 0.0,
    retries: Retries | None = None,
    now_ms: Callable[[], int] = _wall_ms,
) -> Manifest | None:
    """Close the attempt of a process that died without a word, and fence it off, should it be alive after all.

    Args:
        worked_s: seconds from the attempt's start to its last sign of life, as far as known.
        retries: the trial has failed once an attempt more than its budget of `failure` failed; unset, it may go on.

    Returns:
        The trial's manifest, untouched where no attempt was open; None where the trial never started.

    Raises:
        Fenced: the attempt was ordered by a driver with a higher token.
    """
    key = manifest_key(sweep, trial_id)
    while True:
        try:
            manifest, etag = parse_manifest(*store.read(key), key=key)
        except NotFound:
            return None
        if not manifest.attempts or manifest.attempts[-1].ended_ms is not None:
            return manifest
        if manifest.driver > driver:
            raise _superseded(trial_id, manifest, driver)
        closed = _closed(manifest, failure, reason, worked_s, now_ms())
        failed = retries is not None and spent(closed, retries, driver=driver)
        changes = {"status": "failed" if failed else "running", "driver": max(driver, manifest.driver), "updated_ms": now_ms()}
        fresh = closed.model_copy(update=changes | {"traceback": traceback or None})
        with suppress(Conflict):  # it was alive, at least until now: look again
            store.replace(key, dump_manifest(fresh), expected=etag)
            return fresh


def spent(manifest: Manifest, retries: Retries, *, driver: int) -> bool:
    """Whether the last attempt's failure used up this driver's budget for its class."""
    failure = manifest.attempts[-1].outcome if manifest.attempts else None
    if failure is None or failure == "finished" or failure == "stopped":
        return False
    return manifest.failures(failure, driver=driver) > retries.of(failure)


def _superseded(trial_id: str, manifest: Manifest, driver: int) -> Fenced:
    return Fenced(f"trial {trial_id}: driver {manifest.driver} has taken the sweep over from driver {driver}")


def _read_or_new(store: Store, plan: TrialPlan, key: str, now_ms: int) -> tuple[Manifest, str | None]:
    try:
        return parse_manifest(*store.read(key), key=key)
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


def _with_attempt(manifest: Manifest, driver: int, machine: dict[str, str], now_ms: int) -> Manifest:
    """The manifest with one more attempt, after closing what a process that died without a word left open."""
    if manifest.attempts and manifest.attempts[-1].ended_ms is None:
        manifest = _closed(manifest, "lost", "its process ended without a word", 0.0, manifest.updated_ms)
    attempt = Attempt(number=manifest.attempt + 1, driver=driver, node=platform.node(), machine=machine, started_ms=now_ms)
    taken = {
        "attempt": attempt.number,
        "attempts": (*manifest.attempts, attempt),
        "driver": driver,
        "writer": uuid.uuid4().hex,
        "status": "running",
        "failure": None,
        "reason": None,
        "traceback": None,
        "updated_ms": now_ms,
    }
    return manifest.model_copy(update=taken)


def _closed(manifest: Manifest, failure: Failure, reason: str, worked_s: float, ended_ms: int) -> Manifest:
    """The manifest with its last attempt closed from outside, which shuts its writer out."""
    attempt = manifest.attempts[-1]
    end = {"ended_ms": ended_ms, "outcome": failure, "reason": reason, "lost_s": max(0.0, worked_s - attempt.seconds)}
    attempts = (*manifest.attempts[:-1], attempt.model_copy(update=end))
    return manifest.model_copy(update={"attempts": attempts, "failure": failure, "reason": reason, "writer": uuid.uuid4().hex})
