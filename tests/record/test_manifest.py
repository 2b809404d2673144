"""manifest.py: manifests are read and checked. tracking_note.py: the note of trials that MLflow shows."""

from __future__ import annotations

import json

import pytest

from orchestration.errors import Fenced, StoreError
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
    write_tracked(store, "demo", "sqlite:///a", ["t2", "t1"], driver=1)
    assert tracked(store, "demo", "sqlite:///a") == {"t1", "t2"}
    assert tracked(store, "demo", "sqlite:///b") == set()


def test_trials_can_be_removed_from_the_tracking_note(store):
    forget_tracked(store, "demo", ["t1"], driver=1)
    assert list(store.keys("")) == []
    write_tracked(store, "demo", "sqlite:///a", ["t1", "t2", "t3"], driver=1)
    forget_tracked(store, "demo", ["t1", "t3", "t9"], driver=1)
    assert tracked(store, "demo", "sqlite:///a") == {"t2"}


@pytest.mark.parametrize("key", [manifest_key("demo", "a-copy"), manifest_key("other", PLAN.trial_id)])
def test_a_manifest_that_was_copied_by_hand_is_refused(store, key, caplog):
    record = TrialRecord.open(store, PLAN, retention=Retention())
    store.write(key, dump_manifest(record.manifest))
    sweep, trial_id, _ = key.split("/")
    with pytest.raises(StoreError, match=f"{key}: this is the manifest of sweep 'demo', trial '{PLAN.trial_id}'; move copied folders out"):
        read_manifest(store, sweep, trial_id)
    assert read_manifests(store, sweep).keys() <= {PLAN.trial_id}
    assert f"{key}: this is the manifest of sweep 'demo'" in caplog.text
    assert read_manifest(store, "demo", PLAN.trial_id) == record.manifest


def test_an_epoch_whose_score_is_undefined_is_read(store):
    record = TrialRecord.open(store, PLAN, retention=Retention())
    entry = EpochMetrics(epoch=1, step=1, time_ms=1, metrics={"val/miou": 0.5, "train/loss": 1.0})
    record.commit(step=1, epoch=1, files={"state.pt": b"s"}, entries=[entry], seconds=1.0)
    key = manifest_key("demo", PLAN.trial_id)
    body = dump_manifest(record.manifest).replace(b'"val/miou"', b'"val/else"')
    read = parse_manifest(body, "", key=key)[0]
    assert read.last.score is None
    assert read.best is None


def test_a_manifest_of_an_older_version_without_pictures_and_machines_is_read(store):
    record = TrialRecord.open(store, PLAN, retention=Retention())
    body = dump_manifest(record.manifest).replace(b', "pictures": []', b"").replace(b', "machine": {}', b"")
    assert b"pictures" not in body
    assert b"machine" not in body
    key = manifest_key("demo", PLAN.trial_id)
    assert parse_manifest(body, "", key=key)[0] == record.manifest


@pytest.fixture
def written(store) -> dict:
    """A manifest with everything in it, as JSON."""
    record = TrialRecord.open(store, PLAN, retention=Retention())
    entry = EpochMetrics(epoch=1, step=1, time_ms=1, metrics={"val/miou": 0.5})
    pictures = {1: {"predictions.png": b"p"}}
    record.commit(step=1, epoch=1, files={"model.safetensors": b"s"}, entries=[entry], seconds=1.0, pictures=pictures)
    return json.loads(dump_manifest(record.manifest))


KEY = manifest_key("demo", PLAN.trial_id)


@pytest.mark.parametrize(
    "key",
    [
        "../../x/model.safetensors",
        "demo/other/checkpoints/1-1/model.safetensors",
        "/etc/model.safetensors",
        f"demo/{PLAN.trial_id}/../model.safetensors",
    ],
)
def test_an_object_elsewhere_than_below_its_trial_is_not_a_manifest(written, key):
    written["checkpoints"][0]["objects"]["model.safetensors"]["key"] = key
    with pytest.raises(StoreError, match=r"not a manifest .*must lie below"):
        parse_manifest(json.dumps(written).encode(), "", key=KEY)


def test_an_object_with_the_name_of_another_place_is_not_a_manifest(written):
    objects = written["checkpoints"][0]["objects"]
    objects["../../passwd"] = objects.pop("model.safetensors")
    with pytest.raises(StoreError, match="not a manifest"):
        parse_manifest(json.dumps(written).encode(), "", key=KEY)


def test_a_manifest_of_a_newer_release_says_so(written):
    body = json.dumps(written | {"version": 3, "attempts": "in a form of its own"}).encode()
    with pytest.raises(StoreError, match=f"{KEY}: written by a newer release .manifest version 3, this release reads up to 2.; update"):
        parse_manifest(body, "", key=KEY)


@pytest.mark.parametrize("attempts", [5, [5], {"a": 1}, None, "x"])
def test_damaged_attempts_of_version_1_are_a_store_error(written, attempts):
    with pytest.raises(StoreError, match="not a manifest"):
        parse_manifest(json.dumps(written | {"version": 1, "attempts": attempts}).encode(), "", key=KEY)


def test_one_damaged_manifest_is_named_and_the_others_are_read(store, written, caplog):
    store.write(manifest_key("demo", "t2"), b'{"version": 2}')
    assert list(read_manifests(store, "demo")) == [PLAN.trial_id]
    assert "demo/t2/manifest.json: not a manifest" in caplog.text


def test_an_overtaken_driver_does_not_write_the_tracking_note(store):
    write_tracked(store, "demo", "sqlite:///a", ["t1"], driver=2)
    for write in (lambda: write_tracked(store, "demo", "b", [], driver=1), lambda: forget_tracked(store, "demo", ["t1"], driver=1)):
        with pytest.raises(Fenced, match="driver 2 has taken the sweep over from driver 1"):
            write()
    assert tracked(store, "demo", "sqlite:///a") == {"t1"}
