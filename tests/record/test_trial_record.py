"""trial_record.py: one writer per trial, objects before the manifest, retention, and the account of seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestration.errors import Fenced, StoreError, StoreUnavailable
from orchestration.plan.spec import Retention, Retries
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record import stored_trials
from orchestration.record.manifest import EpochMetrics, manifest_key, read_manifest
from orchestration.record.stored_trials import restored_plan
from orchestration.record.trial_record import WORKER_DIED, TrialRecord, settle
from orchestration.record.trial_state import budget_spent
from orchestration.store.open import open_store

(PLAN,) = expand(check({"name": "demo", "preset": "digits"}))
KEEP = Retention(last=2, best=True)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def commit(record: TrialRecord, epoch: int, miou: float, *, pictures: dict[int, dict[str, bytes]] | None = None) -> None:
    entry = EpochMetrics(epoch=epoch, step=10 * epoch, time_ms=1000 + epoch, metrics={"val/miou": miou})
    files = {"model.safetensors": b"w%d" % epoch}
    record.commit(step=10 * epoch, epoch=epoch, files=files, entries=[entry], seconds=float(epoch), pictures=pictures)


def steps(record: TrialRecord) -> list[int]:
    return [checkpoint.step for checkpoint in record.manifest.checkpoints]


def checkpoint_keys(store) -> list[str]:
    return [key for key in store.keys("demo/") if "/checkpoints/" in key]


def test_what_was_committed_is_read_back(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    manifest = read_manifest(store, "demo", PLAN.trial_id)
    assert manifest == record.manifest
    assert (manifest.status, manifest.attempt, manifest.epochs) == ("running", 1, 1)
    assert restored_plan(manifest) == PLAN
    checkpoint, files = next(TrialRecord.open(store, PLAN, retention=KEEP).usable_checkpoints())
    assert (checkpoint.step, files) == (10, {"model.safetensors": b"w1"})


def test_the_last_two_and_the_best_checkpoint_are_kept_and_the_rest_deleted(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    for epoch, miou in enumerate([0.1, 0.9, 0.3, 0.4, 0.5], start=1):
        commit(record, epoch, miou)
    assert steps(record) == [20, 40, 50]
    assert len(checkpoint_keys(store)) == 3
    assert record.manifest.best.epoch == 2


def test_without_best_only_the_last_are_kept(store):
    record = TrialRecord.open(store, PLAN, retention=Retention(last=1, best=False))
    for epoch in (1, 2, 3):
        commit(record, epoch, 1 / epoch)
    assert steps(record) == [30]


def test_a_later_attempt_fences_an_earlier_one(store):
    zombie = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(zombie, 1, 0.5)
    successor = TrialRecord.open(store, PLAN, retention=KEEP)
    for act in (lambda: commit(zombie, 2, 0.6), zombie.finish, lambda: zombie.fail(failure="code", reason="x")):
        with pytest.raises(Fenced, match="attempt 1 was replaced"):
            act()
    commit(successor, 2, 0.7)
    assert read_manifest(store, "demo", PLAN.trial_id).history[-1].metrics == {"val/miou": 0.7}


def test_a_zombie_does_not_delete_what_the_next_attempt_still_names(store):
    zombie = TrialRecord.open(store, PLAN, retention=Retention(last=1, best=False))
    commit(zombie, 1, 0.5)
    successor = TrialRecord.open(store, PLAN, retention=KEEP)
    with pytest.raises(Fenced):
        commit(zombie, 2, 0.6)
    assert next(successor.usable_checkpoints())[0].step == 10


def test_an_epoch_that_is_trained_again_changes_no_history(store):
    commit(TrialRecord.open(store, PLAN, retention=KEEP), 1, 0.5)
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    before = again.manifest.history
    commit(again, 1, 0.5)
    assert again.manifest.history == before
    assert len(again.manifest.checkpoints) == 1


def test_pictures_of_an_epoch_are_committed_once(store):
    first = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(first, 1, 0.5, pictures={1: {"predictions.png": b"first"}})
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(again, 1, 0.5, pictures={1: {"predictions.png": b"again"}})
    commit(again, 2, 0.5)
    commit(again, 3, 0.5, pictures={3: {"predictions.png": b"third"}, 2: {"predictions.png": b"second"}})
    pictures = read_manifest(store, "demo", PLAN.trial_id).pictures
    assert [(entry.epoch, store.read(entry.objects["predictions.png"].key)[0]) for entry in pictures] == [
        (1, b"first"),
        (2, b"second"),
        (3, b"third"),
    ]
    assert pictures[2].objects["predictions.png"].key == f"demo/{PLAN.trial_id}/pictures/0003-2/predictions.png"
    assert sum("/pictures/" in key for key in store.keys("demo/")) == 3


def test_no_manifest_names_the_pictures_of_a_refused_commit(store):
    zombie = TrialRecord.open(store, PLAN, retention=KEEP)
    successor = TrialRecord.open(store, PLAN, retention=KEEP)
    with pytest.raises(Fenced):
        commit(zombie, 1, 0.5, pictures={1: {"predictions.png": b"zombie"}})
    commit(successor, 1, 0.5, pictures={1: {"predictions.png": b"successor"}})
    assert store.read(successor.manifest.pictures[0].objects["predictions.png"].key)[0] == b"successor"
    successor.finish()
    assert sum("/pictures/" in key for key in store.keys("demo/")) == 1


def test_an_attempt_stores_its_machine(store):
    TrialRecord.open(store, PLAN, retention=KEEP, machine={"device": "a GPU"})
    TrialRecord.open(store, PLAN, retention=KEEP)
    assert [attempt.machine for attempt in read_manifest(store, "demo", PLAN.trial_id).attempts] == [{"device": "a GPU"}, {}]


def test_an_attempt_with_an_abandoned_commit_stays_open(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    record.leave()
    for end in (record.stop, lambda: record.fail(failure="lost", reason="x")):
        with pytest.raises(StoreUnavailable, match="the last commit is still running; the attempt stays open"):
            end()
    commit(record, 1, 0.5)  # the commit ends after all
    assert read_manifest(store, "demo", PLAN.trial_id).epochs == 1


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(store, tmp_path, damage):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    commit(record, 2, 0.6)
    damage(tmp_path / "store" / record.manifest.checkpoints[-1].objects["model.safetensors"].key)
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    checkpoint, files = next(again.usable_checkpoints())
    assert (checkpoint.step, files) == (10, {"model.safetensors": b"w1"})
    assert len(again.unusable) == 1
    assert "checkpoint of step 20" in again.unusable[0]


def test_resuming_from_an_older_checkpoint_drops_the_newer_damaged_one(store, tmp_path):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    commit(record, 2, 0.6)
    (tmp_path / "store" / record.manifest.checkpoints[-1].objects["model.safetensors"].key).write_bytes(b"x")
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(again, 2, 0.6)
    assert steps(again) == [10, 20]
    assert next(again.usable_checkpoints())[0].attempt == 2
    assert len(checkpoint_keys(store)) == 2


def test_without_a_usable_checkpoint_the_trial_restarts_from_step_0(store, tmp_path):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    for key in checkpoint_keys(store):
        (tmp_path / "store" / key).unlink()
    assert next(TrialRecord.open(store, PLAN, retention=KEEP).usable_checkpoints(), None) is None


def test_finishing_deletes_uncommitted_uploads(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    for place in ("checkpoints/00000099-1/model.safetensors", "pictures/0009-1/predictions.png"):
        store.write(f"demo/{PLAN.trial_id}/{place}", b"orphan")
    record.finish()
    assert not [key for key in store.keys("demo/") if "/pictures/" in key]
    assert checkpoint_keys(store) == [record.manifest.checkpoints[0].objects["model.safetensors"].key]


def test_a_failed_deletion_does_not_undo_a_commit(store, monkeypatch, caplog):
    record = TrialRecord.open(store, PLAN, retention=Retention(last=1, best=False))

    def refuse(self, keys):
        raise StoreError("no permission to delete")

    monkeypatch.setattr(type(store), "delete", refuse)
    for epoch in (1, 2):
        commit(record, epoch, 0.5)
    record.finish()
    assert read_manifest(store, "demo", PLAN.trial_id).status == "finished"
    assert "old checkpoints were not removed: no permission to delete; `rrn-sweep gc` removes them" in caplog.text


def test_a_finished_trial_is_opened_without_a_new_attempt(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    record.finish()
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    assert (again.manifest.status, again.manifest.attempt) == ("finished", 1)


def test_a_failed_trial_can_be_opened_again_and_loses_its_reason(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    record.fail(failure="data", reason="ValueError: no", traceback="...")
    assert read_manifest(store, "demo", PLAN.trial_id).reason == "ValueError: no"
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    assert (again.manifest.status, again.manifest.attempt, again.manifest.reason) == ("running", 2, None)


def test_an_invalid_manifest_is_refused_and_not_changed(store):
    store.write(manifest_key("demo", PLAN.trial_id), b"{}")
    with pytest.raises(StoreError, match="not a manifest"):
        TrialRecord.open(store, PLAN, retention=KEEP)
    assert store.read(manifest_key("demo", PLAN.trial_id))[0] == b"{}"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def unavailable(*_: Any, **__: Any) -> str:
    raise StoreUnavailable("no answer")


def account(record: TrialRecord) -> list[tuple]:
    return [(a.outcome, a.first_step, a.last_step, a.useful_s, a.repeated_s, a.lost_s) for a in record.manifest.attempts]


def test_every_second_of_an_attempt_is_useful_repeated_or_lost(store, tmp_path):
    clock = Clock()
    record = TrialRecord.open(store, PLAN, retention=KEEP, clock=clock)
    for epoch in (1, 2):
        clock.now_s += 10
        commit(record, epoch, 0.5)
    clock.now_s += 3
    record.fail(failure="code", reason="ZeroDivisionError: x")
    assert account(record) == [("code", 0, 20, 20.0, 0.0, 3.0)]

    again = TrialRecord.open(store, PLAN, retention=KEEP, clock=clock)
    again.begin_at(10)  # the checkpoint of step 20 was damaged
    clock.now_s += 8
    record_at_s = clock.now_s
    clock.now_s += 1  # the upload waits
    entry = EpochMetrics(epoch=3, step=30, time_ms=1, metrics={"val/miou": 0.6})
    again.commit(step=30, epoch=3, files={"model.safetensors": b"w3"}, entries=[entry], seconds=3.0, at_s=record_at_s)
    clock.now_s += 1
    again.finish()
    assert account(again)[1] == ("finished", 10, 30, 4.0 + 2.0, 4.0, 0.0)
    assert read_manifest(store, "demo", PLAN.trial_id) == again.manifest


def test_the_seconds_of_a_commit_that_the_store_did_not_take_are_not_forgotten(store, monkeypatch):
    clock = Clock()
    stopped, retried = (TrialRecord.open(store, plan, retention=KEEP, clock=clock) for plan in (PLAN, replace(PLAN, sweep="retried")))
    clock.now_s += 4
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "replace", unavailable)
        for record in (stopped, retried):
            with pytest.raises(StoreUnavailable):
                commit(record, 1, 0.5)
    clock.now_s += 1
    stopped.stop()
    commit(retried, 1, 0.5)
    assert account(stopped) == [("interrupted", 0, 0, 0.0, 0.0, 5.0)]
    assert account(retried) == [(None, 0, 10, 5.0, 0.0, 0.0)]


def test_a_wall_clock_that_jumps_changes_no_account(store):
    clock, wall_ms = Clock(), iter([10**12, 10**12 + 5, 10**12 - 86_400_000, *[10**12 + 86_400_000] * 9])
    record = TrialRecord.open(store, PLAN, retention=KEEP, clock=clock, now_ms=lambda: next(wall_ms))
    clock.now_s += 10
    commit(record, 1, 0.5)
    record.finish()
    assert account(record) == [("finished", 0, 10, 10.0, 0.0, 0.0)]


def test_the_time_that_the_store_takes_to_settle_is_not_the_attempt_s(store, monkeypatch):
    TrialRecord.open(store, PLAN, retention=KEEP, driver=1, now_ms=lambda: 10_000)
    wall, read = Clock(), type(store).read
    wall.now_s = 20.0

    def slow(self, key):
        wall.now_s += 7
        return read(self, key)

    monkeypatch.setattr(type(store), "read", slow)
    found = settle(store, "demo", PLAN.trial_id, driver=1, failure="lost", reason="", worked_s=10.0, now_ms=lambda: int(1000 * wall.now_s))
    (attempt,) = found.attempts
    assert (attempt.ended_ms - attempt.started_ms, attempt.lost_s) == (10_000, 10.0)


def test_a_dead_writer_is_settled_and_fenced(store):
    zombie = TrialRecord.open(store, PLAN, retention=KEEP, driver=1, clock=(clock := Clock()))
    clock.now_s += 5
    commit(zombie, 1, 0.5)
    manifest = settle(store, "demo", PLAN.trial_id, driver=2, failure="lost", reason="driver 1 died", worked_s=7.0)
    (attempt,) = manifest.attempts
    assert (attempt.outcome, attempt.useful_s, attempt.lost_s) == ("lost", 5.0, 2.0)
    assert (manifest.status, manifest.failure, manifest.driver) == ("interrupted", "lost", 2)
    with pytest.raises(Fenced):
        commit(zombie, 2, 0.5)
    with pytest.raises(Fenced, match="driver 2 has taken the sweep over from driver 1"):
        TrialRecord.open(store, PLAN, retention=KEEP, driver=1)
    assert settle(store, "demo", PLAN.trial_id, driver=2, failure="code", reason="again") == manifest


def test_the_next_attempt_closes_the_attempt_of_a_dead_worker(store):
    TrialRecord.open(store, PLAN, retention=KEEP)
    second = TrialRecord.open(store, PLAN, retention=KEEP)
    assert [attempt.outcome for attempt in second.manifest.attempts] == ["lost", None]
    assert second.manifest.attempts[0].reason == WORKER_DIED


def test_each_class_of_failure_has_its_own_budget_for_each_driver(store):
    retries = Retries(lost=1, memory=0)
    for driver, failure, spent in [(1, "lost", False), (1, "lost", True), (2, "lost", False), (2, "memory", True), (2, "lost", True)]:
        TrialRecord.open(store, PLAN, retention=KEEP, driver=driver)
        manifest = settle(store, "demo", PLAN.trial_id, driver=driver, failure=failure, reason="", retries=retries)
        assert (budget_spent(manifest, retries, driver=driver), manifest.status) == (spent, "failed" if spent else "interrupted")


def test_a_trial_that_never_started_has_nothing_to_settle(store):
    assert settle(store, "demo", PLAN.trial_id, driver=1, failure="lost", reason="") is None


def test_a_commit_whose_reply_was_lost_past_the_deadline_is_adopted(store, monkeypatch):
    clock = Clock()
    record = TrialRecord.open(store, PLAN, retention=KEEP, clock=clock)
    clock.now_s += 4
    real = type(store).replace

    def lost_reply(self, *args, **options):
        real(self, *args, **options)
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "replace", lost_reply)
        with pytest.raises(StoreUnavailable):
            commit(record, 1, 0.5)
    clock.now_s += 1
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "replace", lost_reply)
        with pytest.raises(StoreUnavailable):
            record.fail(failure="unavailable", reason="no answer")
    record.stop()  # the attempt has ended: it stays as it ended
    assert account(record) == [("unavailable", 0, 10, 4.0, 0.0, 1.0)]
    assert read_manifest(store, "demo", PLAN.trial_id) == record.manifest


def test_every_stored_configuration_is_validated_once(store, monkeypatch):
    manifest, calls = TrialRecord.open(store, PLAN, retention=KEEP).manifest, []
    real = stored_trials.build_config
    monkeypatch.setattr(stored_trials, "build_config", lambda *args, **options: (calls.append(1), real(*args, **options))[1])
    stored_trials.StoredTrials([manifest, manifest])
    restored_plan(manifest)
    assert len(calls) == 3
