"""ray_tune.py and runner.py: what the driver does while the store does not answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestration.errors import StoreUnavailable
from orchestration.plan.spec import Retention
from orchestration.record import trial_record
from orchestration.record.lease import Lease
from orchestration.record.trial_record import TrialRecord
from orchestration.record.trial_state import TrialState
from orchestration.run import ray_tune
from orchestration.run.runner import settle_dead
from orchestration.run.stopping import Stop
from orchestration.run.trial import Job
from orchestration.store.directory import DirectoryStore
from orchestration.sweep import open_sweep
from rrn_core import Runtime


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "demo.yaml").write_text("{name: demo, preset: digits}")
    return open_sweep(tmp_path / "demo.yaml", [], data_root=None, environment={"RRN_STORE": str(tmp_path / "store")})


@pytest.fixture
def lease(sweep):
    lease = Lease.acquire(sweep.store, "demo", say=print)
    yield lease
    lease.release()


def away(*_, **__):
    raise StoreUnavailable("the store is away")


def test_a_trial_that_ends_while_the_store_is_away_has_not_failed_and_its_last_report_is_kept(sweep, lease, monkeypatch):
    (plan,), events = sweep.plans, []
    TrialRecord.open(sweep.store, plan, retention=Retention(), driver=lease.token)
    job = Job(sweep.store.uri, Runtime(), Retention(), driver=lease.token)
    ended = ray_tune._Events(job, None, [events.append], Stop(print), lease)
    lease.see(plan.trial_id, 1, 77.0)
    trial = SimpleNamespace(config={"plan": plan}, last_result={}, error_file=None)
    monkeypatch.setattr(DirectoryStore, "read", away)
    for callback in (ended.on_trial_complete, ended.on_trial_error):
        callback(0, [], trial)
    assert [(event.state, event.reason) for event in events] == [(TrialState.INTERRUPTED, "the store is away")] * 2
    assert lease._seen[plan.trial_id].worked_s == 77.0


def test_the_seconds_of_a_dead_driver_s_trial_outlive_an_outage_of_the_store(sweep, monkeypatch):
    (plan,) = sweep.plans
    TrialRecord.open(sweep.store, plan, retention=Retention(), driver=1)
    first = Lease.acquire(sweep.store, "demo", say=print)
    first.see(plan.trial_id, 1, 77.0)
    first.release()
    second = Lease.acquire(sweep.store, "demo", say=print)
    begun = sweep.reread()
    with monkeypatch.context() as patch:
        patch.setattr(trial_record, "parse_manifest", away)
        with pytest.raises(StoreUnavailable):
            settle_dead(begun, second)
    second.release()
    third = Lease.acquire(sweep.store, "demo", say=print)
    settled = settle_dead(sweep.reread(), third)
    third.release()
    assert settled.manifests[plan.trial_id].attempts[0].lost_s == 77.0
