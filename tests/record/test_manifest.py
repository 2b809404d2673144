"""manifest.py: manifests are read and checked. tracking_note.py: the note of trials that MLflow shows."""

from __future__ import annotations

import pytest

from orchestration.errors import StoreError
from orchestration.plan.spec import Retention
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import EpochMetrics, dump_manifest, manifest_key, parse_manifest, read_manifest, read_manifests
from orchestration.record.tracking_note import forget_tracked, tracked, write_tracked
from orchestration.record.trial_record import TrialRecord
from orchestration.store.open import open_store

(PLAN,) = expand(check({"name": "demo", "preset": "digits"}))


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def test_a_trial_that_never_started_has_no_manifest(store):
    assert read_manifest(store, "demo", PLAN.trial_id) is None
    assert read_manifests(store, "demo") == {}


def test_the_tracking_note_counts_only_for_its_own_server(store):
    assert tracked(store, "demo", "sqlite:///a") == set()
    write_tracked(store, "demo", "sqlite:///a", ["t2", "t1"])
    assert tracked(store, "demo", "sqlite:///a") == {"t1", "t2"}
    assert tracked(store, "demo", "sqlite:///b") == set()


def test_trials_can_be_removed_from_the_tracking_note(store):
    forget_tracked(store, "demo", ["t1"])
    assert list(store.keys("")) == []
    write_tracked(store, "demo", "sqlite:///a", ["t1", "t2", "t3"])
    forget_tracked(store, "demo", ["t1", "t3", "t9"])
    assert tracked(store, "demo", "sqlite:///a") == {"t2"}


@pytest.mark.parametrize("key", [manifest_key("demo", "a-copy"), manifest_key("other", PLAN.trial_id)])
def test_a_manifest_that_was_copied_by_hand_is_refused(store, key):
    record = TrialRecord.open(store, PLAN, retention=Retention())
    store.write(key, dump_manifest(record.manifest))
    sweep, trial_id, _ = key.split("/")
    with pytest.raises(StoreError, match=f"{key}: this is the manifest of sweep 'demo', trial '{PLAN.trial_id}'; move copied folders out"):
        read_manifest(store, sweep, trial_id)
    with pytest.raises(StoreError, match="this is the manifest of sweep 'demo'"):
        read_manifests(store, sweep)
    assert read_manifest(store, "demo", PLAN.trial_id) == record.manifest


def test_an_epoch_without_a_score_is_not_a_manifest(store):
    record = TrialRecord.open(store, PLAN, retention=Retention())
    entry = EpochMetrics(epoch=1, step=1, time_ms=1, metrics={"val/miou": 0.5, "train/loss": 1.0})
    record.commit(step=1, epoch=1, files={"state.pt": b"s"}, entries=[entry], seconds=1.0)
    key = manifest_key("demo", PLAN.trial_id)
    body = dump_manifest(record.manifest).replace(b'"val/miou"', b'"val/else"')
    with pytest.raises(StoreError, match=f"{key}: not a manifest"):
        parse_manifest(body, "", key=key)


def test_a_manifest_of_an_older_version_without_pictures_and_machines_is_read(store):
    record = TrialRecord.open(store, PLAN, retention=Retention())
    body = dump_manifest(record.manifest).replace(b', "pictures": []', b"").replace(b', "machine": {}', b"")
    assert b"pictures" not in body
    assert b"machine" not in body
    key = manifest_key("demo", PLAN.trial_id)
    assert parse_manifest(body, "", key=key)[0] == record.manifest
