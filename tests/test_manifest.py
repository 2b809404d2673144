"""manifest.py: what is read back of a trial, and what MLflow was told."""

from __future__ import annotations

import pytest

from orchestration.manifest import read_manifest, read_manifests, tracked, write_tracked
from orchestration.plan import expand
from orchestration.spec import check
from orchestration.store import open_store

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
