"""report.py: published numbers beside those of finished trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration import report
from orchestration.manifest import Entry, TrialRecord, read_manifests
from orchestration.plan import expand
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
