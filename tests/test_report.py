"""report.py: published numbers beside those of finished trials, states, and the ledger of effort."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestration import report
from orchestration.manifest import Attempt, Entry, Manifest, read_manifests
from orchestration.plan import TrialPlan, expand
from orchestration.record import TrialRecord
from orchestration.spec import Published, Retention, SweepSpec, check, load
from orchestration.store import Store, open_store

SWEEPS = [path for path in sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml")) if "\npublished:" in path.read_text()]
HEADS = ("val/miou", "val/miou_branch1", "val/miou_branch2", "val/miou_ensemble")


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def sweep(rows: list[dict], **document) -> SweepSpec:
    return check({"name": "demo", "preset": "digits", "published": {"source": "a paper, Table I", "rows": rows}, **document})


def finish(store: Store, plan, *epochs: tuple[float, float], finished: bool = True) -> None:
    """A trial with branch 1 and ensemble mIoU (0..1) of each epoch."""
    record = TrialRecord.open(store, plan, retention=Retention())
    for epoch, (branch1, ensemble) in enumerate(epochs, start=1):
        entry = Entry(epoch=epoch, step=epoch, time_ms=0, metrics=dict(zip(HEADS, (ensemble, branch1, 0.0, ensemble), strict=True)))
        record.commit(step=epoch, epoch=epoch, files={"w": b"w"}, entries=[entry], seconds=1)
    if finished:
        record.finish()


def compared(store: Store, spec: SweepSpec) -> list[report.Comparison]:
    plans = expand(spec)
    return report.comparisons(published(spec), plans, read_manifests(store, spec.name, [plan.trial_id for plan in plans]))


def published(spec: SweepSpec) -> Published:
    assert spec.published
    return spec.published


def test_a_published_number_stands_beside_the_mean_over_seeds_at_the_last_and_at_the_best_epoch(store):
    spec = sweep([{"when": {"partition": "1/8"}, "value": 50.5}], grid={"partition": ["1/16", "1/8"]}, seeds=[0, 1])
    for plan, last in zip(expand(spec), (0.1, 0.2, 0.50, 0.52), strict=True):
        finish(store, plan, (0, 0.3), (0, 0.6), (0, last))
    plans = expand(spec)
    text = report.published(published(spec), plans, read_manifests(store, "demo"))
    head, row, *notes = text.splitlines()
    assert head.split("  ")[0] == "row"
    assert row.split() == ["1/8", "miou", "50.50", "51.00", "+-", "1.41", "+0.50", "60.00", "+-", "0.00", "+9.50", "2"]
    assert notes[0] == "published: a paper, Table I"
    assert "highest" in notes[1]
    assert notes[2] == "split: measured on the validation list of digits, labelled images by partition_by: every_kth"


def test_each_row_reads_its_own_metric_at_the_epoch_where_that_is_highest(store):
    rows = [{"when": {"eps": 0.3}, "metric": metric, "value": 1} for metric in ("val/miou_branch1", "val/miou_ensemble")]
    spec = sweep(rows, grid={"eps": [0.3]})
    finish(store, expand(spec)[0], (0.5, 0.1), (0.25, 0.75), (0.25, 0.5))
    assert [(row.last, row.best) for row in compared(store, spec)] == [((25.0,), (50.0,)), ((50.0,), (75.0,))]


def test_a_row_without_a_finished_trial_or_without_a_published_value_shows_a_dash(store):
    rows = [
        {"when": {"eps": eps}, "value": value, "name": name}
        for eps, value, name in ((0.3, 70, "new"), (0.6, 70, "cut"), (0.7, None, "own"))
    ]
    spec = sweep([*rows, {"when": {"eps": 0.9}, "value": 70, "name": "elsewhere"}], grid={"eps": [0.3, 0.6, 0.7]})
    _, cut, own = expand(spec)
    finish(store, cut, (0.5, 0.5), finished=False)
    finish(store, own, (0.5, 0.5))
    lines = report.published(published(spec), expand(spec), read_manifests(store, "demo")).splitlines()[1:5]
    assert [line.split() for line in lines] == [
        ["new", "miou", "70.00", *"-----"],
        ["cut", "miou", "70.00", *"-----"],
        ["own", "miou", "-", "50.00", "-", "50.00", "-", "1"],
        ["elsewhere", "miou", "70.00", *"-----"],
    ]


def test_trials_that_differ_in_more_than_the_seed_are_never_averaged(store):
    spec = sweep([{"when": {"partition": "1/8"}, "value": 40}], grid={"partition": ["1/8"], "eps": [0.3, 0.6]}, seeds=[0, 1])
    for plan, score in zip(expand(spec), (0.1, 0.2, 0.3, 0.4), strict=True):
        finish(store, plan, (0, score))
    assert {row.name: row.last for row in compared(store, spec)} == {"1/8 eps=0.3": (10.0, 20.0), "1/8 eps=0.6": (30.0, 40.0)}


def test_a_row_is_matched_by_value_and_not_by_spelling(store):
    spec = sweep([{"when": {"lambda1": 1, "scales": [1, 2]}, "value": 40}], grid={"lambda1": [1.0]}, base={"scales": [1.0, 2.0]})
    finish(store, expand(spec)[0], (0, 0.5))
    assert [row.last for row in compared(store, spec)] == [(50.0,)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_published_row_of_a_shipped_sweep_names_one_trial_and_every_trial_is_worth_its_cost(path):
    spec = load(path)
    plans = expand(spec)
    for row in published(spec).rows:
        assert sum(all(getattr(plan.config, key) == value for key, value in row.when.items()) for plan in plans) == 1, row
    heads = {(row.metric, tuple(row.when.items())) for row in published(spec).rows}
    assert len(heads) == len(published(spec).rows)


def varied(*eps: float) -> list[TrialPlan]:
    return expand(check({"name": "demo", "preset": "digits", "grid": {"eps": list(eps)}}))


def trial(plan, *attempts: Attempt, status: str = "running", failure: str | None = None) -> Manifest:
    return Manifest(
        sweep=plan.sweep,
        trial_id=plan.trial_id,
        label=plan.label,
        config=plan.config.model_dump(mode="json"),
        varied=plan.varied,
        iterations=plan.iterations,
        status=status,
        failure=failure,
        reason="too little" if failure else None,
        attempt=len(attempts),
        attempts=attempts,
        created_ms=0,
        updated_ms=1,
        history=tuple(Entry(epoch=epoch, step=epoch, time_ms=0, metrics=dict.fromkeys(HEADS, 0.5)) for epoch in (1, 2, 3)),
    )


def attempt(number: int, outcome: str | None, *seconds: float, node: str = "a") -> Attempt:
    useful, repeated, lost = seconds
    ended = None if outcome is None else number
    return Attempt(
        number=number, driver=1, node=node, started_ms=0, ended_ms=ended, outcome=outcome, useful_s=useful, repeated_s=repeated, lost_s=lost
    )


def test_effort_adds_up_by_trial_in_all_and_by_node():
    done, cut, _ = plans = varied(0.3, 0.6, 0.7)
    manifests = {
        done.trial_id: trial(
            done, attempt(1, "lost", 3600, 0, 61), attempt(2, "lost", 0, 0, 5, node="b"), attempt(3, "finished", 3599, 30, 0)
        ),
        cut.trial_id: trial(cut, attempt(1, None, 5, 0, 0, node="b")),
    }
    by_trial, by_node = (block.splitlines() for block in report.effort(plans, manifests).split("\n\n"))
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
    assert report.effort(varied(0.3), {}).splitlines()[1].split() == ["all", "0", "-", *["0:00:00"] * 4, "-"]


@pytest.mark.parametrize(
    ("status", "failure", "state", "cell"),
    [
        ("failed", "memory", "failed (memory) at epoch 3", "failed (memory)"),
        ("failed", None, "failed at epoch 3", "failed"),
        ("running", "lost", "resumable (lost) at epoch 3", "unfinished (lost)"),
        ("running", None, "resumable at epoch 3", "unfinished"),
    ],
)
def test_a_state_names_the_class_of_the_failure(status, failure, state, cell):
    (plan,) = varied(0.3)
    manifests = {plan.trial_id: trial(plan, status=status, failure=failure)}
    assert report.state(manifests[plan.trial_id]) == state
    assert f"  {cell}  " in report.summary([plan], manifests)


def test_a_failed_trial_is_told_with_its_class_and_reason_and_the_ledger_is_there_for_other_programs():
    (plan,) = varied(0.3)
    ledger = attempt(1, "memory", 1, 2, 3)
    manifests = {plan.trial_id: trial(plan, ledger, status="failed", failure="memory")}
    assert report.failures([plan], manifests) == [f"FAILED {plan.trial_id} {plan.label}: [memory] too little"]
    (known,) = json.loads(json.dumps(report.as_json([plan], manifests)))
    assert known["failure"] == "memory"
    assert [Attempt.model_validate(record) for record in known["attempts"]] == [ledger]
