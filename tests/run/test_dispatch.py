"""dispatch.py and runner.py: what the driver makes of the ends of attempts."""

from __future__ import annotations

import time

import pytest

from orchestration.errors import StoreError, StoreUnavailable
from orchestration.observe import status
from orchestration.plan.spec import Retention, Retries
from orchestration.record import trial_record
from orchestration.record.lease import Lease
from orchestration.record.trial_record import TrialRecord
from orchestration.record.trial_state import TrialState
from orchestration.run import dispatch as dispatching
from orchestration.run.dispatch import Dispatch
from orchestration.run.job import Job
from orchestration.run.runner import settle_dead
from orchestration.run.stopping import Stop
from orchestration.run.trial_source import FixedSource
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


OUT_OF_MEMORY = "ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory."


def refuses(*_, **__):
    raise StoreError("no permission")


def away(*_, **__):
    raise StoreUnavailable("the store is away")


def dispatch(sweep, lease, events, **budgets) -> Dispatch:
    job = Job(sweep.store.uri, Runtime(), Retention(), Retries.model_validate(budgets), driver=lease.token)
    return Dispatch(FixedSource(sweep.plans), job, listeners=[events.append], stop=Stop(print), lease=lease)


def opened(sweep, lease):
    return TrialRecord.open(sweep.store, sweep.plans[0], retention=Retention(), driver=lease.token, machine={"python": "3"})


def states(events):
    return [event.state for event in events]


def test_a_trial_that_ends_while_the_store_is_away_has_not_failed_and_its_last_report_is_kept(sweep, lease, monkeypatch):
    (plan,) = sweep.plans
    opened(sweep, lease)
    lease.see(plan.trial_id, 1, 77.0)
    monkeypatch.setattr(DirectoryStore, "read", away)
    for end in (lambda d: d.completed(plan.trial_id), lambda d: d.died(plan.trial_id, "killed", "killed")):
        events = []
        ended = dispatch(sweep, lease, events, lost=0)
        ended.next()
        end(ended)
        assert [(event.state, event.reason) for event in events] == [(TrialState.INTERRUPTED, "the store is away")]
        assert not ended.left
    assert lease._seen[plan.trial_id].worked_s == 77.0


def test_a_death_that_the_store_cannot_record_counts_too(sweep, lease, monkeypatch):
    events = []
    ended = dispatch(sweep, lease, events, lost=2)
    monkeypatch.setattr(DirectoryStore, "read", away)
    monkeypatch.setattr(dispatching, "LONGEST_PAUSE_S", 0.0)
    for _ in range(3):
        plan, _more = ended.next()
        ended.died(plan.trial_id, "killed", "killed")
    assert states(events) == [TrialState.RESTARTING] * 2 + [TrialState.INTERRUPTED]
    assert ended.next() == (None, False)


def test_a_death_before_the_record_was_opened_is_classed_counted_and_waited_for(sweep, lease):
    (plan,), events, now_s = sweep.plans, [], time.monotonic()
    ended = dispatch(sweep, lease, events, memory=1)
    assert ended.next() == (plan, True)
    ended.died(plan.trial_id, "killed for memory: 22.2 of 23.5 GB used", OUT_OF_MEMORY)
    assert ended.next() == (None, True), "it waits"
    ((due_s, again),) = ended._again
    assert (again, 1 < due_s - now_s < 10) == (plan, True)
    ended._again[:] = [(0.0, plan)]
    ended.next()
    ended.died(plan.trial_id, "killed for memory: 22.3 of 23.5 GB used", OUT_OF_MEMORY)
    assert [(event.state, event.reason) for event in events] == [
        (TrialState.RESTARTING, "[memory] killed for memory: 22.2 of 23.5 GB used; start 1 of 2"),
        (TrialState.FAILED, "[memory] killed for memory: 22.3 of 23.5 GB used; start 2 of 2"),
    ]
    found = sweep.reread().manifests[plan.trial_id]
    assert [attempt.outcome for attempt in found.attempts] == ["memory", "memory"]
    assert (found.status, found.traceback) == (TrialState.FAILED, OUT_OF_MEMORY)


def test_a_death_after_the_record_was_opened_is_counted_once_and_not_waited_for(sweep, lease):
    (plan,), events = sweep.plans, []
    ended = dispatch(sweep, lease, events, lost=1)
    for _ in range(2):
        ended.next()
        opened(sweep, lease)
        ended.died(plan.trial_id, "killed", "killed")
    assert states(events) == [TrialState.RESTARTING, TrialState.FAILED]
    assert [attempt.outcome for attempt in sweep.reread().manifests[plan.trial_id].attempts] == ["lost", "lost"]


def test_an_attempt_that_its_worker_closed_is_not_counted_again(sweep, lease):
    (plan,), events = sweep.plans, []
    ended = dispatch(sweep, lease, events, code=1)
    for _ in range(2):
        ended.next()
        opened(sweep, lease).fail(failure="code", reason="KeyError: 'x'")
        ended.died(plan.trial_id, "KeyError: 'x'", "KeyError: 'x'")
    assert [(event.state, event.reason) for event in events] == [
        (TrialState.RESTARTING, "[code] KeyError: 'x'; start 1 of 2"),
        (TrialState.FAILED, "[code] KeyError: 'x'; start 2 of 2"),
    ]


def test_a_trial_of_a_ray_that_ended_is_interrupted_and_no_budget_counts_it(sweep, lease):
    (plan,), events = sweep.plans, []
    ended = dispatch(sweep, lease, events, lost=0)
    ended.next()
    opened(sweep, lease)
    ended.interrupted("Ray ended", again=True)
    assert ended.next() == (plan, True)
    ended.interrupted("Ray ended", again=False)
    assert [(event.state, event.reason) for event in events] == [
        (TrialState.RESTARTING, "Ray ended"),
        (TrialState.INTERRUPTED, "Ray ended"),
    ]
    found = sweep.reread().manifests[plan.trial_id]
    assert (found.status, found.attempts[0].outcome) == (TrialState.INTERRUPTED, "interrupted")


def test_a_trial_that_the_store_refuses_fails_with_its_reason_even_if_no_record_can_say_so(sweep, lease, monkeypatch):
    (plan,), events = sweep.plans, []
    ended = dispatch(sweep, lease, events)
    ended.next()
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "replace", refuses)
        ended.refused(plan.trial_id, "no permission")
    assert [(event.state, event.reason) for event in events] == [(TrialState.FAILED, "no permission")]
    assert ended.unwritable == {plan.trial_id: "no permission"}
    shown = status.summary(sweep.plans, {}, {plan.trial_id: TrialState.FAILED}, unreadable=ended.unwritable)
    assert shown.splitlines()[0] == f"FAILED {plan.trial_id} {plan.label}: no permission"


def test_an_unwritable_trial_does_not_keep_the_next_driver_from_the_others(tmp_path, monkeypatch):
    (tmp_path / "demo.yaml").write_text("{name: demo, preset: digits, grid: {eps: [0.4, 0.6]}}")
    sweep = open_sweep(tmp_path / "demo.yaml", [], data_root=None, environment={"RRN_STORE": str(tmp_path / "store")})
    for plan in sweep.plans:
        TrialRecord.open(sweep.store, plan, retention=Retention(), driver=1)
    first, second = sorted(sweep.trial_ids)
    replace = DirectoryStore.replace

    def refuses_first(self, key, *arguments, **named):
        return refuses() if first in key else replace(self, key, *arguments, **named)

    monkeypatch.setattr(DirectoryStore, "replace", refuses_first)
    lease = Lease.acquire(sweep.store, "demo", say=print)
    settled = settle_dead(sweep.reread(), lease)
    lease.release()
    assert [settled.manifests[trial_id].is_open for trial_id in (first, second)] == [True, False]


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
