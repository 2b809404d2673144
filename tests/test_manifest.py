"""manifest.py: one writer a trial, objects before the manifest, and what is kept."""

from __future__ import annotations

import pytest

from orchestration.errors import Fenced, StoreError
from orchestration.manifest import Entry, TrialRecord, manifest_key, read_manifest, read_manifests, restored_plan, tracked, write_tracked
from orchestration.plan import expand
from orchestration.spec import Retention, check
from orchestration.store import open_store

(PLAN,) = expand(check({"name": "demo", "preset": "digits"}))
KEEP = Retention(last=2, best=True)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def commit(record: TrialRecord, epoch: int, miou: float, *, body: bytes | None = None) -> None:
    entry = Entry(epoch=epoch, step=10 * epoch, time_ms=1000 + epoch, metrics={"val/miou": miou})
    record.commit(step=10 * epoch, epoch=epoch, files={"model.safetensors": body or b"w%d" % epoch}, entries=[entry], seconds=float(epoch))


def steps(record: TrialRecord) -> list[int]:
    return [checkpoint.step for checkpoint in record.manifest.checkpoints]


def checkpoint_keys(store) -> list[str]:
    return [key for key in store.keys("demo/") if "/checkpoints/" in key]


def test_a_trial_that_never_started_has_no_manifest(store):
    assert read_manifest(store, "demo", PLAN.trial_id) is None
    assert read_manifests(store, "demo") == {}


def test_what_was_committed_is_read_back(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    manifest = read_manifest(store, "demo", PLAN.trial_id)
    assert manifest == record.manifest
    assert (manifest.status, manifest.attempt, manifest.epochs) == ("running", 1, 1)
    assert restored_plan(manifest) == PLAN
    checkpoint, files = TrialRecord.open(store, PLAN, retention=KEEP).load_checkpoint()
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
    heir = TrialRecord.open(store, PLAN, retention=KEEP)
    for act in (lambda: commit(zombie, 2, 0.6), zombie.finish, lambda: zombie.fail(reason="x", traceback="")):
        with pytest.raises(Fenced, match="attempt 1 was replaced"):
            act()
    commit(heir, 2, 0.7)
    assert read_manifest(store, "demo", PLAN.trial_id).history[-1].metrics == {"val/miou": 0.7}


def test_a_zombie_does_not_delete_what_its_heir_still_names(store):
    zombie = TrialRecord.open(store, PLAN, retention=Retention(last=1, best=False))
    commit(zombie, 1, 0.5)
    heir = TrialRecord.open(store, PLAN, retention=KEEP)
    with pytest.raises(Fenced):
        commit(zombie, 2, 0.6)
    assert heir.load_checkpoint()[0].step == 10


def test_an_epoch_that_is_trained_again_changes_no_history(store):
    commit(TrialRecord.open(store, PLAN, retention=KEEP), 1, 0.5)
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    before = again.manifest.history
    commit(again, 1, 0.5)
    assert again.manifest.history == before
    assert len(again.manifest.checkpoints) == 1


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(store, tmp_path, damage):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    commit(record, 2, 0.6)
    damage(tmp_path / "store" / record.manifest.checkpoints[-1].objects["model.safetensors"].key)
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    checkpoint, files = again.load_checkpoint()
    assert (checkpoint.step, files) == (10, {"model.safetensors": b"w1"})
    assert len(again.unusable) == 1
    assert "checkpoint of step 20" in again.unusable[0]


def test_going_on_from_an_older_checkpoint_drops_the_newer_damaged_one(store, tmp_path):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    commit(record, 2, 0.6)
    (tmp_path / "store" / record.manifest.checkpoints[-1].objects["model.safetensors"].key).write_bytes(b"x")
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(again, 2, 0.6)
    assert steps(again) == [10, 20]
    assert again.load_checkpoint()[0].attempt == 2
    assert len(checkpoint_keys(store)) == 2


def test_no_usable_checkpoint_means_from_the_start(store, tmp_path):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    for key in checkpoint_keys(store):
        (tmp_path / "store" / key).unlink()
    assert TrialRecord.open(store, PLAN, retention=KEEP).load_checkpoint() is None


def test_finishing_removes_what_uncommitted_uploads_left(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    store.write(f"demo/{PLAN.trial_id}/checkpoints/00000099-1/model.safetensors", b"orphan")
    record.finish()
    assert checkpoint_keys(store) == [record.manifest.checkpoints[0].objects["model.safetensors"].key]


def test_litter_that_cannot_be_removed_undoes_no_commit(store, monkeypatch, caplog):
    record = TrialRecord.open(store, PLAN, retention=Retention(last=1, best=False))

    def refuse(self, keys):
        raise StoreError("no permission to delete")

    monkeypatch.setattr(type(store), "delete", refuse)
    for epoch in (1, 2):
        commit(record, epoch, 0.5)
    record.finish()
    assert read_manifest(store, "demo", PLAN.trial_id).status == "finished"
    assert "old checkpoints were not removed: no permission to delete" in caplog.text


def test_a_finished_trial_is_opened_without_a_new_attempt(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    commit(record, 1, 0.5)
    record.finish()
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    assert (again.manifest.status, again.manifest.attempt) == ("finished", 1)


def test_a_failed_trial_can_be_opened_again_and_loses_its_reason(store):
    record = TrialRecord.open(store, PLAN, retention=KEEP)
    record.fail(reason="ValueError: no", traceback="...")
    assert read_manifest(store, "demo", PLAN.trial_id).reason == "ValueError: no"
    again = TrialRecord.open(store, PLAN, retention=KEEP)
    assert (again.manifest.status, again.manifest.attempt, again.manifest.reason) == ("running", 2, None)


def test_a_manifest_that_is_not_ours_is_refused_and_left_alone(store):
    store.write(manifest_key("demo", PLAN.trial_id), b"{}")
    with pytest.raises(StoreError, match="not a manifest"):
        TrialRecord.open(store, PLAN, retention=KEEP)
    assert store.read(manifest_key("demo", PLAN.trial_id))[0] == b"{}"


def test_the_tracking_note_counts_only_for_its_own_server(store):
    assert tracked(store, "demo", "sqlite:///a") == set()
    write_tracked(store, "demo", "sqlite:///a", ["t2", "t1"])
    assert tracked(store, "demo", "sqlite:///a") == {"t1", "t2"}
    assert tracked(store, "demo", "sqlite:///b") == set()
