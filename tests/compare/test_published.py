"""published.py: the tables of a paper in their own form, ours beside them."""

from __future__ import annotations

import re

import pytest
from finished import train
from places import ROOT

from orchestration.compare.published import Reproduction, published_table, reproductions
from orchestration.plan.spec import Published, SweepSpec
from orchestration.plan.sweep_file import check, load
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import read_manifests
from orchestration.store.base import Store
from orchestration.store.open import open_store

FOLDER = ROOT / "sweeps"
SWEEPS = [path for path in sorted(FOLDER.glob("*.yaml")) if "\npublished:" in path.read_text()]


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def sweep(rows: list[dict], **document) -> SweepSpec:
    return check({"name": "demo", "preset": "digits", "published": {"source": "a paper, Table I", "rows": rows}, **document})


def finish(store: Store, plan, *epochs: tuple[float, float], finished: bool = True) -> None:
    """A trial with branch 1 and ensemble mIoU (0..1) of each epoch."""
    metrics = [{"val/miou": both, "val/miou_branch1": one, "val/miou_ensemble": both} for one, both in epochs]
    train(store, plan, metrics, finished=finished)


def compared(store: Store, spec: SweepSpec) -> list[Reproduction]:
    return reproductions(published(spec), expand(spec), read_manifests(store, spec.name))


def shown(store: Store, spec: SweepSpec, **form) -> str:
    return published_table(published(spec), expand(spec), read_manifests(store, spec.name), **form)


def published(spec: SweepSpec) -> Published:
    assert spec.published
    return spec.published


def test_a_published_number_stands_beside_the_mean_over_seeds_at_the_last_and_at_the_highest_epoch(store):
    spec = sweep([{"when": {"partition": "1/8"}, "value": 50.5}], grid={"partition": ["1/16", "1/8"]}, seeds=[0, 1])
    for plan, last in zip(expand(spec), (0.1, 0.2, 0.50, 0.52), strict=True):
        finish(store, plan, (0, 0.3), (0, 0.6), (0, last))
    head, row, *notes = shown(store, spec).splitlines()
    assert head.split("  ")[0] == "row"
    assert row.split() == ["1/8", "mIoU", "50.50", "51.00", "+-", "1.41", "+0.50", "60.00", "+-", "0.00", "+9.50", "2"]
    assert notes[0] == "published: a paper, Table I"
    assert "finished trials (seeds 0, 1)" in notes[1]
    assert notes[1].endswith(
        "highest: at the epoch where the row's own metric is highest, chosen on the very images that it is measured on"
    )
    assert notes[2] == "split: measured on the validation list of digits of 64 images, labelled images by partition_by: every_kth"


def test_each_row_reads_its_own_metric_at_the_epoch_where_that_is_highest(store):
    rows = [{"when": {"eps": 0.3}, "metric": metric, "value": 1} for metric in ("val/miou_branch1", "val/miou_ensemble")]
    spec = sweep(rows, grid={"eps": [0.3]})
    finish(store, expand(spec)[0], (0.5, 0.1), (0.25, 0.75), (0.25, 0.5))
    assert [(row.last, row.highest) for row in compared(store, spec)] == [((25.0,), (50.0,)), ((50.0,), (75.0,))]


def test_a_row_without_a_finished_trial_or_without_a_published_value_shows_a_dash(store):
    rows = [
        {"when": {"eps": eps}, "value": value, "name": name}
        for eps, value, name in ((0.3, 70, "new"), (0.6, 70, "cut"), (0.7, None, "own"))
    ]
    spec = sweep([*rows, {"when": {"eps": 0.9}, "value": 70, "name": "elsewhere"}], grid={"eps": [0.3, 0.6, 0.7]})
    _, cut, own = expand(spec)
    finish(store, cut, (0.5, 0.5), finished=False)
    finish(store, own, (0.5, 0.5))
    assert [line.split() for line in shown(store, spec).splitlines()[1:5]] == [
        ["new", "mIoU", "70.00", *"-----"],
        ["cut", "mIoU", "70.00", *"-----"],
        ["own", "mIoU", "-", "50.00", "-", "50.00", "-", "1"],
        ["elsewhere", "mIoU", "70.00", *"-----"],
    ]


def test_trials_that_differ_in_more_than_the_seed_are_never_averaged(store):
    spec = sweep([{"when": {"partition": "1/8"}, "value": 40}], grid={"partition": ["1/8"], "eps": [0.3, 0.6]}, seeds=[0, 1])
    for plan, score in zip(expand(spec), (0.1, 0.2, 0.3, 0.4), strict=True):
        finish(store, plan, (0, score))
    assert {row.name: row.last for row in compared(store, spec)} == {"1/8 eps=0.3": (10.0, 20.0), "1/8 eps=0.6": (30.0, 40.0)}


def test_a_row_that_names_a_setting_fits_only_trials_whose_method_has_it(store):
    rows = [{"when": {"partition": "1/8"}, "value": 40, "name": "any"}, {"when": {"eps": 0.3}, "value": 50, "name": "eps"}]
    spec = sweep(rows, grid={"method": ["supervised", "rrn"], "eps": [0.3, 0.6]})
    for plan, score in zip(expand(spec), (0.1, 0.2, 0.3), strict=True):
        finish(store, plan, (0, score))
    assert {row.name: row.last for row in compared(store, spec)} == {
        "any method=supervised": (10.0,),
        "any method=rrn eps=0.3": (20.0,),
        "any method=rrn eps=0.6": (30.0,),
        "eps": (20.0,),
    }


def test_a_finished_trial_without_the_rows_metric_is_not_counted(store):
    spec = sweep([{"when": {"eps": 0.3}, "metric": "val/miou_branch2", "value": 1}], grid={"eps": [0.3]})
    finish(store, expand(spec)[0], (0.5, 0.1))
    assert [(row.seeds, row.last) for row in compared(store, spec)] == [((), ())]


def test_a_row_is_matched_by_value_and_not_by_spelling(store):
    spec = sweep([{"when": {"lambda1": 1, "scales": [1, 2]}, "value": 40}], grid={"lambda1": [1.0]}, base={"scales": [1.0, 2.0]})
    finish(store, expand(spec)[0], (0, 0.5))
    assert [row.last for row in compared(store, spec)] == [(50.0,)]


def two_rows(store: Store) -> SweepSpec:
    """A paper's table with two rows and two partitions, of which one trial is not finished and one has a seed less."""
    rows = [
        {"name": f"{name} {partition}", "when": {"method": method, "partition": partition}, "value": value}
        for name, method, values in (("CPS", "cps", (50, 60)), ("RRN", "rrn", (55, None)))
        for partition, value in zip(("1/8", "1/4"), values, strict=True)
    ]
    spec = sweep(rows, grid={"method": ["cps", "rrn"], "partition": ["1/8", "1/4"]}, seeds=[0, 1])
    for plan, score in zip(expand(spec), (0.5, 0.52, 0.6, None, 0.58, 0.6, 0.7, 0.72), strict=True):
        finish(store, plan, (0, 0.8), (0, score or 0), finished=score is not None)
    return spec


def test_several_partitions_are_the_columns_of_the_table_as_in_a_paper(store):
    lines = shown(store, two_rows(store)).splitlines()
    assert [[cell for cell in re.split(" {2,}", line) if cell] for line in lines[:7]] == [
        ["row", "metric", "number", "seeds", "1/8", "1/4"],
        ["CPS", "mIoU", "published", "50.00", "60.00"],
        ["ours: last", "2, 1", "51.00 +- 1.41 (+1.00)", "60.00 (+0.00)"],
        ["ours: highest", "2, 1", "80.00 +- 0.00 (+30.00)", "80.00 (+20.00)"],
        ["RRN", "mIoU", "published", "55.00", "-"],
        ["ours: last", "2", "59.00 +- 1.41 (+4.00)", "71.00 +- 1.41"],
        ["ours: highest", "2", "80.00 +- 0.00 (+25.00)", "80.00 +- 0.00"],
    ]
    assert [line.partition(":")[0] for line in lines[7:]] == ["published", "ours", "split"]


def test_the_same_table_for_markdown_and_for_latex(store):
    spec = two_rows(store)
    assert "|  |  | ours: last | 2, 1 | 51.00 ± 1.41 (+1.00) | 60.00 (+0.00) |" in shown(store, spec, form="md").splitlines()
    assert "- published: a paper, Table I" in shown(store, spec, form="md")
    latex = shown(store, spec, form="latex")
    assert " &  & ours: last & 2, 1 & 51.00 $\\pm$ 1.41 (+1.00) & 60.00 (+0.00) \\\\" in latex
    assert latex.count("\\midrule") == 2
    assert "\\caption{Published: a paper, Table I. Ours: in percent, mean $\\pm$ sample" in latex


def test_a_row_that_is_nothing_but_a_partition_is_named_by_the_method(store):
    rows = [{"when": {"partition": partition}, "value": 50} for partition in ("1/8", "1/4")]
    spec = sweep(rows, grid={"partition": ["1/8", "1/4"]})
    assert shown(store, spec).splitlines()[1].split() == ["method=rrn", "mIoU", "published", "50.00", "50.00"]


def test_rows_that_do_not_fit_partition_columns_are_listed_one_by_one(store):
    rows = [{"when": {"partition": "1/8"}, "value": 50}, {"when": {"partition": "1/4"}, "value": 51}, {"when": {"eps": 0.6}, "value": 52}]
    spec = sweep(rows, grid={"partition": ["1/8", "1/4"]})
    assert [line.split()[0] for line in shown(store, spec).splitlines()[:5]] == ["row", "1/8", "1/4", "eps=0.6", "eps=0.6"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_published_row_of_a_shipped_sweep_names_one_trial_and_every_trial_is_worth_its_cost(path):
    spec = load(path)
    plans = expand(spec)
    for row in published(spec).rows:
        assert sum(all(getattr(plan.config, key) == value for key, value in row.when.items()) for plan in plans) == 1, row
    heads = {(row.metric, tuple(row.when.items())) for row in published(spec).rows}
    assert len(heads) == len(published(spec).rows)


def test_the_papers_tables_have_the_papers_columns(store):
    for name, rows in (("voc_partitions", 1), ("voc_ablation", 5)):
        lines = shown(store, load(FOLDER / f"{name}.yaml")).splitlines()
        assert lines[0].split() == ["row", "metric", "number", "seeds", "1/16", "1/8", "1/4", "1/2"]
        assert sum("published  " in line for line in lines) == rows
    rows = {row.name: (row.value, row.when["method"]) for row in load(FOLDER / "voc_ablation.yaml").published.rows}
    eni = [rows[f"CPS + ENI {partition}"] for partition in ("1/16", "1/8", "1/4", "1/2")]
    assert eni == [(73.11, "cps"), (74.00, "cps"), (75.40, "cps"), (76.30, "cps")]
