"""trial_state.py: the state of a trial for every combination of attempt, driver and budget."""

from __future__ import annotations

import pytest

from orchestration.plan.spec import Retries
from orchestration.record.manifest import Attempt, Manifest
from orchestration.record.trial_state import TrialState, state_of

RETRIES = Retries(lost=1)
CASES = [
    # status of the manifest, outcomes of the attempts of driver 1 (None: open), driver that is alive, expected state
    ("running", [], 1, "new"),
    ("running", [None], 1, "running"),
    ("running", [None], None, "interrupted"),
    ("running", [None], 2, "interrupted"),
    ("interrupted", ["interrupted"], 1, "interrupted"),
    ("interrupted", ["lost"], 1, "restarting"),
    ("failed", ["lost"], 1, "restarting"),
    ("failed", ["lost"], None, "failed"),
    ("failed", ["lost", "lost"], 1, "failed"),
    ("failed", ["diverged"], 1, "failed"),
    ("finished", ["lost", "finished"], None, "finished"),
    ("finished", [], None, "finished"),
]


def manifest(status: str, outcomes: list[str | None]) -> Manifest:
    attempts = [
        Attempt(number=i, driver=1, node="n", started_ms=0, ended_ms=None if outcome is None else 1, outcome=outcome)
        for i, outcome in enumerate(outcomes, start=1)
    ]
    times = {"created_ms": 0, "updated_ms": 0}
    return Manifest(
        sweep="s", trial_id="t", label="l", config={}, varied=(), iterations=1, status=status, attempts=tuple(attempts), **times
    )


@pytest.mark.parametrize(("status", "outcomes", "driver", "state"), CASES)
def test_the_state_follows_from_attempts_driver_and_budget(status, outcomes, driver, state):
    assert state_of(manifest(status, outcomes), driver=driver, retries=RETRIES) is TrialState(state)


def test_a_trial_that_never_started_is_new():
    assert state_of(None, driver=1, retries=RETRIES) is TrialState.NEW


def test_each_property_holds_for_its_states_only():
    assert {state for state in TrialState if state.is_open} == {"running", "restarting"}
    assert {state for state in TrialState if state.is_final} == {"finished", "stopped", "failed"}
    assert {state for state in TrialState if state.resumable} == {"interrupted", "failed"}
