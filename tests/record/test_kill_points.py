"""A process that is killed at any line of a commit, or of a trial's end, leaves a store from which the trial resumes without loss."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import orchestration.store.directory
from orchestration.plan.spec import Retention
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import TrialPlan, expand
from orchestration.record.garbage import collect
from orchestration.record.manifest import EpochMetrics, Manifest, manifest_key, read_checkpoint, read_manifest, read_manifests
from orchestration.record.trial_record import TrialRecord, settle
from orchestration.store.base import Store
from orchestration.store.directory import DirectoryStore
from orchestration.store.open import open_store

(PLAN,) = expand(check({"name": "demo", "preset": "digits"}))
KEEP = Retention(last=1, best=False)  # so that a commit also deletes the previous checkpoint
pytestmark = pytest.mark.slow

TRACED = str(Path(orchestration.store.directory.__file__).parent)


@pytest.fixture
def prepare(store: Store) -> Callable[[], None]:
    """What a child process does first. Creating a client takes longer than a commit, so each child copies an unconnected one."""
    if isinstance(store, DirectoryStore):
        return lambda: None
    unconnected = open_store(store.uri)._client()
    return lambda: store._clients.update({os.getpid(): unconnected})


def files(epoch: int) -> dict[str, bytes]:
    return {"model.safetensors": b"model %d" % epoch * 100, "state.pt": b"state %d" % epoch * 100}


def commit(record: TrialRecord, epoch: int) -> None:
    entry = EpochMetrics(epoch=epoch, step=10 * epoch, time_ms=1000 + epoch, metrics={"val/miou": 0.5})
    pictures = {epoch: {"predictions.png": b"picture %d" % epoch}}
    record.commit(step=10 * epoch, epoch=epoch, files=files(epoch), entries=[entry], seconds=1.0, pictures=pictures)


def plan(number: int) -> TrialPlan:
    return dataclasses.replace(PLAN, config=PLAN.config.model_copy(update={"seed": number}))


def opened(store: Store, number: int) -> TrialRecord:
    return TrialRecord.open(store, plan(number), retention=KEEP, driver=1)


class Reaper:
    """A trace function that kills this process at the n-th line that runs in orchestration/store/."""

    def __init__(self, lines: int) -> None:
        self._left = lines

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Reaper | None:
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def dies(act: Callable[[TrialRecord], None], record: TrialRecord, *, at_line: int, first: Callable[[], None]) -> bool:
    """Whether a forked process that runs `act` is killed at that line before it is done. Lines of `first` are not counted."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            first()
            reaper = Reaper(at_line)
            threading.settrace(reaper)
            sys.settrace(reaper)
            act(record)
            sys.settrace(None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def outcomes(store: Store, act: Callable[[TrialRecord], None], check: Callable[[TrialRecord], str], first: Callable[[], None]) -> list[str]:
    """Results of `check` for the next attempt after a death at the first line of `act`, the second, and so on. The last did not die."""
    found, died = [], True
    while died:
        number = len(found)
        record = opened(store, number)
        commit(record, 1)
        died = dies(act, record, at_line=number + 1, first=first)
        named(store, [read_manifest(store, "demo", record.manifest.trial_id)])
        found.append(check(opened(store, number)))
    return found


def removed(store: Store, trials: int) -> int:
    """How many things gc deletes once the attempts are closed. Asserts that afterwards the store contains exactly the named objects."""
    trial_ids = [plan(number).trial_id for number in range(trials)]
    for trial_id in trial_ids:
        settle(store, "demo", trial_id, driver=2, failure="lost", reason="killed")
    report = collect(store, "demo", trial_ids, driver=2, retention=KEEP, dry_run=False)
    keys = named(store, read_manifests(store, "demo").values())
    assert list(store.keys("demo/")) == sorted([*keys, *(manifest_key("demo", trial_id) for trial_id in trial_ids)])
    assert [write for write in store.unfinished("demo/") if "/checkpoints/" in write.place or "/pictures/" in write.place] == []
    return len(report.items)


def named(store: Store, manifests: Iterable[Manifest]) -> list[str]:
    """The keys of all objects that the manifests name. Asserts that each is complete and undamaged."""
    keys: list[str] = []
    for manifest in manifests:
        for checkpoint in manifest.checkpoints:
            assert read_checkpoint(store, checkpoint) == files(checkpoint.epoch)
        for pictures in manifest.pictures:
            assert store.read(pictures.objects["predictions.png"].key)[0] == b"picture %d" % pictures.epoch
        keys += [ref.key for ref in manifest.objects]
    return keys


def test_a_commit_that_is_killed_at_any_line_has_happened_or_has_not(store, prepare):
    def resume(resumed: TrialRecord) -> str:
        checkpoint, body = next(resumed.usable_checkpoints())
        assert (resumed.unusable, body) == ([], files(checkpoint.epoch))
        assert resumed.manifest.epochs == len(resumed.manifest.pictures) == checkpoint.epoch
        commit(resumed, checkpoint.epoch + 1)
        return f"epoch {checkpoint.epoch}"

    found = outcomes(store, lambda record: commit(record, 2), resume, prepare)
    assert found == sorted(found)  # up to some line the old checkpoint is the newest, after it the new one
    assert set(found) == {"epoch 1", "epoch 2"}
    assert min(found.count("epoch 1"), found.count("epoch 2")) > 30
    assert removed(store, len(found)) > 30


def test_an_end_that_is_killed_at_any_line_has_happened_or_has_not(store, prepare):
    def resume(resumed: TrialRecord) -> str:
        checkpoint, body = next(resumed.usable_checkpoints())
        assert (checkpoint.epoch, body) == (1, files(1))
        if resumed.manifest.status == "finished":
            return "finished"
        commit(resumed, 2)
        resumed.finish()
        return "running"

    found = outcomes(store, TrialRecord.finish, resume, prepare)
    assert found == sorted(found, reverse=True)
    assert set(found) == {"running", "finished"}
    assert min(found.count("running"), found.count("finished")) > 10
    removed(store, len(found))
