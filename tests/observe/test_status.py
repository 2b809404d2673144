"""status.py: states, and the effort of attempts."""

from __future__ import annotations

import json

import pytest
from finished import manifest_of

from orchestration.observe import status
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import TrialPlan, expand
from orchestration.record.manifest import Attempt, EpochMetrics, Manifest
from orchestration.record.trial_state import TrialState

HEADS = ("val/miou", "val/miou_branch1", "val/miou_branch2", "val/miou_ensemble")


def varied(*eps: float) -> list[TrialPlan]:
    return expand(check({"name": "demo", "preset": "digits", "grid": {"eps": list(eps)}}))


def trial(plan, *attempts: Attempt, status: str = "running", failure: str | None = None) -> Manifest:
    return manifest_of(
        plan,
        status=status,
        failure=failure,
        reason="too little" if failure else None,
        attempt=len(attempts),
        attempts=attempts,
        history=tuple(EpochMetrics(epoch=epoch, step=epoch, time_ms=0, metrics=dict.fromkeys(HEADS, 0.5)) for epoch in (1, 2, 3)),
    )


def attempt(number: int, outcome: str | None, *seconds: float, node: str = "a") -> Attempt:
    useful, repeated, lost = seconds
    ended = None if outcome is None else number
    return Attempt(
        number=number, driver=1, node=node, started_ms=0, ended_ms=ended, outcome=outcome, useful_s=useful, repeated_s=repeated, lost_s=lost
    )


def test_effort_adds_up_by_trial_in_total_and_by_node():
    done, cut, _ = plans = varied(0.3, 0.6, 0.7)
    manifests = {
        done.trial_id: trial(
            done, attempt(1, "lost", 3600, 0, 61), attempt(2, "lost", 0, 0, 5, node="b"), attempt(3, "finished", 3599, 30, 0)
        ),
        cut.trial_id: trial(cut, attempt(1, None, 5, 0, 0, node="b")),
    }
    by_trial, by_node = (block.splitlines() for block in status.effort(plans, manifests).split("\n\n"))
    assert [" ".join(line.split()) for line in by_trial] == [
        "trial label attempts outcomes useful repeated lost sum useful share",
        f"{done.trial_id} {done.label} 3 2 lost, 1 finished 1:59:59 0:00:30 0:01:06 2:01:35 98.7%",
        f"{cut.trial_id} {cut.label} 1 1 open 0:00:05 0:00:00 0:00:00 0:00:05 100.0%",
        "all 4 2 lost, 1 finished, 1 open 2:00:04 0:00:30 0:01:06 2:01:40 98.7%",
        "useful 98.7%, repeated 0.4%, lost 0.9% of 2:01:40",
    ]
    assert [" ".join(line.split()) for line in by_node] == [
        "node attempts outcomes useful repeated lost sum useful share",
        "a 2 1 lost, 1 finished 1:59:59 0:00:30 0:01:01 2:01:30 98.8%",
        "b 2 1 lost, 1 open 0:00:05 0:00:00 0:00:05 0:00:10 50.0%",
    ]


def test_effort_of_a_sweep_that_has_not_started_is_nothing():
    assert status.effort(varied(0.3), {}).splitlines()[1].split() == ["all", "0", "-", *["0:00:00"] * 4, "-"]


@pytest.mark.parametrize(
    ("stored", "failure", "text", "cell"),
    [
        ("failed", "memory", "failed (memory) at epoch 3", "failed (memory)"),
        ("failed", None, "failed at epoch 3", "failed"),
        ("interrupted", "lost", "interrupted (lost) at epoch 3", "interrupted (lost)"),
        ("interrupted", None, "interrupted at epoch 3", "interrupted"),
    ],
)
def test_a_state_names_the_class_of_the_failure(stored, failure, text, cell):
    (plan,) = varied(0.3)
    manifests, state = {plan.trial_id: trial(plan, status=stored, failure=failure)}, TrialState(stored)
    assert status.state_text(state, manifests[plan.trial_id]) == text
    assert f"  {cell}  " in status.summary([plan], manifests, {plan.trial_id: state})


def test_a_failed_trial_has_class_and_reason_and_its_attempts_are_in_the_json():
    (plan,) = varied(0.3)
    memory = attempt(1, "memory", 1, 2, 3)
    manifests = {plan.trial_id: trial(plan, memory, status="failed", failure="memory")}
    states = {plan.trial_id: TrialState.FAILED}
    assert status.failures([plan], manifests, states) == [f"FAILED {plan.trial_id} {plan.label}: [memory] too little"]
    (known,) = json.loads(json.dumps(status.as_json([plan], manifests, states)))
    assert known["failure"] == "memory"
    assert [Attempt.model_validate(record) for record in known["attempts"]] == [memory]


def test_a_trial_that_its_driver_restarts_is_not_listed_as_failed():
    (plan,) = varied(0.3)
    manifests = {plan.trial_id: trial(plan, attempt(1, "lost", 1, 2, 3), status="failed", failure="lost")}
    _, row = status.summary([plan], manifests, {plan.trial_id: TrialState.RESTARTING}).splitlines()
    assert "  restarting (lost)  " in row


def test_a_head_without_a_metric_is_a_dash():
    (plan,) = varied(0.3)
    entry = EpochMetrics(epoch=1, step=1, time_ms=0, metrics={"val/miou": 0.5, "val/miou_branch1": 0.4})
    found = manifest_of(plan, status="finished", history=(entry,))
    row = status.summary([plan], {plan.trial_id: found}, {plan.trial_id: TrialState.FINISHED}).splitlines()[-1]
    assert row.split()[4:11] == ["40.0", "-", "-", "40.0", "-", "-", "1"]
