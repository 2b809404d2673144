"""results.py, comparison.py, notes.py: which trials are compared with which, at which epoch, and the notes about them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from finished import train

from orchestration.compare.comparison import Comparison, compare
from orchestration.compare.notes import notes
from orchestration.compare.results import TrialResult, common_epoch, results
from orchestration.errors import SweepError
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import TrialPlan, expand
from orchestration.record.manifest import read_manifests
from orchestration.store.base import Store
from orchestration.store.open import open_store


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path / "store"))


def sweep(**document) -> list[TrialPlan]:
    return expand(check({"name": "demo", "preset": "digits", **document}))


def known(store: Store, *sweeps: Sequence[TrialPlan]) -> list[TrialResult]:
    return results((plans, read_manifests(store, plans[0].sweep)) for plans in sweeps)


def grid(store: Store, scores: dict[tuple[str, float], Sequence[float]]) -> list[TrialResult]:
    """Finished trials of one epoch: val/miou by partition and eps, one for each seed."""
    partitions, eps = (list(dict.fromkeys(key[i] for key in scores)) for i in (0, 1))
    plans = sweep(grid={"partition": partitions, "eps": eps}, seeds=list(range(max(map(len, scores.values())))))
    for plan in plans:
        values = scores.get((plan.config.partition, plan.config.eps), ())
        if plan.config.seed < len(values):
            train(store, plan, [values[plan.config.seed]])
    return known(store, plans)


def values(comparison: Comparison) -> dict[str, dict[int, float]]:
    return {
        " ".join([group.label, cell.label]): {seed: round(value, 9) for seed, value in cell.values.items()}
        for group in comparison.groups
        for cell in group.cells
    }


def note(comparison: Comparison, start: str) -> str:
    (found,) = [note for note in notes(comparison) if note.startswith(start)]
    return found


def test_cells_are_trials_that_differ_in_nothing_but_the_seed_in_a_group_for_each_partition(store):
    found = compare(grid(store, {("1/8", 0.2): (0.5, 0.6), ("1/8", 0.4): (0.7, 0.9), ("1/4", 0.2): (0.1,), ("1/4", 0.4): (0.2,)}))
    assert values(found) == {
        "1/8 eps=0.2": {0: 50, 1: 60},
        "1/8 eps=0.4": {0: 70, 1: 90},
        "1/4 eps=0.2": {0: 10},
        "1/4 eps=0.4": {0: 20},
    }
    assert [group.settings for group in found.groups] == [{"partition": "1/8"}, {"partition": "1/4"}]
    assert [cell.settings for cell in found.groups[0].cells] == [{"eps": 0.2}, {"eps": 0.4}]


def test_a_cell_is_compared_with_the_first_of_its_group_on_the_seeds_that_both_have(store):
    found = compare(grid(store, {("1/8", 0.2): (0.5, 0.6, 0.5), ("1/8", 0.4): (0.7, 0.9)}))
    baseline, other = found.groups[0].cells
    assert (found.groups[0].baseline, baseline.label, baseline.difference) == (baseline, "eps=0.2", None)
    assert other.difference.seeds == (0, 1)
    assert other.difference.values == pytest.approx((20, 30))
    assert "1/8: eps=0.4 and eps=0.2 do not share seed 2, left out of their difference" in notes(found)


def test_another_baseline_is_named_by_its_label(store):
    found = compare(grid(store, {("1/8", 0.2): (0.5,), ("1/8", 0.4): (0.7,)}), baseline="eps=0.4")
    assert [cell.difference and cell.difference.mean for cell in found.groups[0].cells] == [pytest.approx(-20), None]


def test_a_group_without_the_baseline_says_so(store):
    plans = sweep(points=[{"partition": "1/8", "eps": 0.2}, {"partition": "1/8", "eps": 0.4}, {"partition": "1/4", "eps": 0.4}])
    for plan in plans:
        train(store, plan, [0.5])
    found = compare(known(store, plans), baseline="eps=0.2")
    assert [group.baseline and group.baseline.label for group in found.groups] == ["eps=0.2", None]
    assert "1/4: no such baseline, so no differences" in notes(found)


def test_holms_correction_goes_over_the_whole_table(store):
    rising = [0.5 + 0.01 * seed for seed in range(6)]
    scores = {(partition, eps): [value + eps / 10 for value in rising] for partition in ("1/8", "1/4") for eps in (0.2, 0.3, 0.4)}
    found = compare(grid(store, scores))
    assert [(d.p, d.p_holm) for d in found.differences] == [(0.03125, 0.125)] * 4
    assert "p (Holm): corrected over the 4 comparisons" in note(found, "p:")
    assert note(found, "with 6 seeds") == (
        "with 6 seeds no difference can be significant at 5 % (the smallest possible p is 0.031, "
        "0.12 after Holm's correction over 4 comparisons); 8 are needed"
    )


def three_epochs(store: Store) -> list[TrialResult]:
    """A finished trial whose second epoch was the best, and one that has completed two epochs."""
    plans = sweep(grid={"eps": [0.2, 0.4]})
    train(store, plans[0], [{"val/miou": 0.1, "train/loss": 3}, {"val/miou": 0.9, "train/loss": 2}, {"val/miou": 0.3, "train/loss": 1}])
    train(store, plans[1], [0.2, 0.4], finished=False)
    return known(store, plans)


@pytest.mark.parametrize(
    ("at", "value", "epoch", "words"),
    [
        ("last", 30, 3, "checkpoint: val/miou after the last epoch of each finished trial"),
        (
            "best",
            90,
            2,
            "checkpoint: val/miou at each trial's epoch with the best val/miou, chosen on the very images that it is measured on",
        ),
    ],
)
def test_only_finished_trials_have_a_last_and_a_best_epoch(store, at, value, epoch, words):
    found = compare(three_epochs(store), at=at)
    assert values(found) == {"1/8 eps=0.2": {0: value}, "1/8 eps=0.4": {}}
    assert found.groups[0].cells[0].epochs == {0: epoch}
    assert [result.label for result in found.left_out] == ["eps=0.4 seed 0"]
    assert notes(found)[0] == words
    assert "left out, interrupted at epoch 2: eps=0.4 seed 0" in notes(found)


def test_the_best_epoch_is_the_first_with_the_best_val_miou_whatever_is_compared(store):
    (plan,) = sweep(grid={"eps": [0.2]})
    train(store, plan, [{"val/miou": 0.9, "train/loss": 3}, {"val/miou": 0.9, "train/loss": 1}, {"val/miou": 0.8, "train/loss": 0.5}])
    found = compare(known(store, [plan]), metric="train/loss", at="best")
    assert values(found) == {"1/8 eps=0.2": {0: 3}}
    assert notes(found)[0].endswith("at each trial's epoch with the best val/miou, chosen on the validation list")


def test_the_common_epoch_is_that_of_the_least_advanced_trial_that_has_started(store):
    plans = sweep(grid={"eps": [0.2, 0.4, 0.6, 0.8]})
    for plan, epochs in zip(plans, ([0.1, 0.9, 0.3], [0.2, 0.4], [0.5, 0.6, 0.7], []), strict=True):
        train(store, plan, epochs, finished=len(epochs) == 3)
    found = compare(known(store, plans), at="common")
    assert common_epoch(known(store, plans)) == 2
    assert values(found) == {"1/8 eps=0.2": {0: 90}, "1/8 eps=0.4": {0: 40}, "1/8 eps=0.6": {0: 60}, "1/8 eps=0.8": {}}
    assert notes(found)[0] == (
        "checkpoint: val/miou after epoch 2, the last that every trial has completed (the least advanced: eps=0.4 seed 0, interrupted at"
        " epoch 2); training goes on after it, so differences may still change"
    )
    assert "left out, interrupted at epoch 0: eps=0.8 seed 0" in notes(found)


def test_at_the_end_of_every_trial_the_common_epoch_is_the_last_one(store):
    plans = sweep(grid={"eps": [0.2, 0.4]}, base={"epochs": 2})
    for plan in plans:
        train(store, plan, [0.1, 0.2])
    found = compare(known(store, plans), at="common")
    assert notes(found)[0] == "checkpoint: val/miou after epoch 2, the last that every trial has completed"
    assert values(found) == values(compare(known(store, plans), at="last"))


def test_before_any_epoch_there_is_nothing_to_compare_and_nothing_breaks(store):
    plans = sweep(grid={"eps": [0.2, 0.4]})
    for at in ("last", "best", "common"):
        found = compare(known(store, plans), at=at, metric="val/anything")
        assert values(found) == {"1/8 eps=0.2": {}, "1/8 eps=0.4": {}}
        assert "left out, new: eps=0.2 seed 0; eps=0.4 seed 0" in notes(found)
    assert compare([]).groups == ()


def test_a_failed_trial_is_left_out_with_the_class_of_its_failure(store):
    plans = sweep(grid={"eps": [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}, seeds=[0, 1])
    for plan in plans[1:]:
        train(store, plan, [0.5], failure="memory")
    train(store, plans[0], [0.5])
    assert (
        "left out, failed (memory) at epoch 1: eps=0.2 seed 1; eps=0.4 seeds 0, 1; eps=0.5 seeds 0, 1; eps=0.6 seeds 0, 1;"
        " eps=0.7 seeds 0, 1 and 2 more"
    ) in notes(compare(known(store, plans)))


def test_a_finished_trial_without_the_metric_is_left_out(store):
    plans = sweep(grid={"method": ["cps", "rrn"]})
    train(store, plans[0], [0.5])
    train(store, plans[1], [{"train/loss_dr": 1.0}])
    found = compare(known(store, plans), metric="train/loss_dr")
    assert values(found) == {"1/8 method=cps": {}, "1/8 method=rrn": {0: 1}}
    assert "left out, finished without this metric: method=cps seed 0" in notes(found)


def test_of_a_loss_less_is_better_and_it_is_not_shown_in_percent(store):
    plans = sweep(grid={"eps": [0.2, 0.4]}, seeds=[0, 1])
    for plan, loss in zip(plans, (2.0, 3.0, 1.5, 2.0), strict=True):
        train(store, plan, [{"train/loss": loss}])
    found = compare(known(store, plans), metric="train/loss")
    (difference,) = found.differences
    assert (difference.values, difference.better) == ((-0.5, -1.0), 1.0)
    assert "share of the seeds in which it is lower" in note(found, "difference:")
    assert "in its own unit" in note(found, "difference:")


@pytest.mark.parametrize(
    "metric", ["val/miou", "val/miou_branch1", "val/iou_ensemble/0", "train/pseudo_accuracy_inside", "train/selected1"]
)
def test_shares_are_shown_in_percent(store, metric):
    (plan,) = sweep(grid={"eps": [0.2]})
    train(store, plan, [{metric: 0.25}])
    assert values(compare(known(store, [plan]), metric=metric)) == {"1/8 eps=0.2": {0: 25}}


def test_settings_that_follow_from_the_group_do_not_stand_in_a_label(store):
    points = [
        {"method": method, "partition": partition, "epochs": epochs}
        for partition, epochs in (("1/8", 2), ("1/4", 3))
        for method in ("cps", "rrn")
    ]
    found = compare(known(store, sweep(points=points)), baseline="method=rrn")
    assert [(cell.label, cell.settings["epochs"]) for group in found.groups for cell in group.cells] == [
        ("method=cps", 2),
        ("method=rrn", 2),
        ("method=cps", 3),
        ("method=rrn", 3),
    ]


def test_without_by_all_trials_are_one_group(store):
    found = compare(grid(store, {("1/8", 0.2): (0.5,), ("1/4", 0.2): (0.7,)}), by=())
    assert [(group.label, [cell.label for cell in group.cells]) for group in found.groups] == [("all trials", ["1/8", "1/4"])]


def test_several_settings_part_the_trials_by_their_combinations(store):
    found = compare(grid(store, {("1/8", 0.2): (0.5,), ("1/8", 0.4): (0.5,), ("1/4", 0.2): (0.7,)}), by=("eps", "partition"))
    assert [group.label for group in found.groups] == ["1/8 eps=0.2", "1/8 eps=0.4", "1/4 eps=0.2", "1/4 eps=0.4"]


def mixed(**document) -> Sequence[TrialResult]:
    """Trials of which only those of rrn have the setting eps."""
    return results([(sweep(grid={"method": ["supervised", "rrn"], "eps": [0.2, 0.4]}, **document), {})])


@pytest.mark.parametrize(
    ("by", "labels"),
    [
        ((), {"all trials": ["method=supervised", "method=rrn eps=0.2", "method=rrn eps=0.4"]}),
        (("method",), {"method=supervised": ["eps=-"], "method=rrn": ["eps=0.2", "eps=0.4"]}),
        (("eps",), {"eps=-": ["method=supervised"], "eps=0.2": ["method=rrn"], "eps=0.4": ["method=rrn"]}),
        (("eps", "method"), {"method=supervised": ["base"], "eps=0.2 method=rrn": ["base"], "eps=0.4 method=rrn": ["base"]}),
    ],
)
def test_a_setting_that_a_method_does_not_have_is_absent_from_its_labels(by, labels):
    found = compare(mixed(), by=by)
    assert {group.label: [cell.label for cell in group.cells] for group in found.groups} == labels
    assert "eps" not in found.groups[0].settings
    assert "eps" not in found.groups[0].cells[0].settings


def test_an_unknown_setting_is_answered_with_all_that_vary_also_those_that_the_first_trial_does_not_have():
    with pytest.raises(SweepError, match=r"settings that vary in this sweep: method, eps$"):
        compare(mixed(), by=("nothing",))


def test_sweeps_are_distinguished_by_settings_that_differ_only_between_their_files(store):
    ours = sweep(grid={"eps": [0.2, 0.4]}, seeds=[0, 1])
    theirs = sweep(name="other", base={"method": "cps"}, seeds=[0, 1])
    for plan in (*ours, *theirs):
        train(store, plan, [0.5])
    found = compare(known(store, theirs, ours))
    assert found.sweeps == ("other", "demo")
    assert [cell.label for cell in found.groups[0].cells] == ["method=cps", "method=rrn eps=0.2", "method=rrn eps=0.4"]


def test_a_trial_of_two_sweeps_counts_once_and_the_finished_one_counts(store):
    ours, theirs = sweep(grid={"eps": [0.2, 0.4]}), sweep(name="other", grid={"eps": [0.2]})
    train(store, ours[0], [0.3], finished=False)
    train(store, ours[1], [0.4])
    train(store, theirs[0], [0.5])
    found = compare(known(store, ours, theirs))
    assert values(found) == {"1/8 eps=0.2": {0: 50}, "1/8 eps=0.4": {0: 40}}
    assert "in several of the sweeps, counted once: eps=0.2 seed 0" in notes(found)
    assert values(compare(known(store, ours, ours))) == {"1/8 eps=0.2": {}, "1/8 eps=0.4": {0: 40}}


def test_trials_that_differ_only_in_their_images_are_never_one_cell(store):
    (plan,) = sweep(grid={"eps": [0.2]})
    split = {"labeled": 2, "unlabeled": 6, "val": 3}
    others = [
        TrialPlan(name, plan.config.model_validate(plan.config.model_dump() | {"split": split | {"sha256": digit * 64}}), plan.varied)
        for name, digit in (("demo", "0"), ("other", "1"))
    ]
    for other in others:
        train(store, other, [0.5])
    found = compare(known(store, others[:1], others[1:]))
    assert len(found.groups[0].cells) == 2
    assert note(found, "split: measured") == (
        "split: measured on the validation list of digits of 3 images, labelled images by partition_by: every_kth"
    )
    assert "1/8 with 2 labelled, 6 unlabelled images, sha256 000000000000; 1/8 with 2" in note(found, "split: lists")


def test_every_note_that_a_table_needs_is_there(store):
    scores = [0.5 + 0.01 * seed for seed in range(6)]
    found = compare(grid(store, {("1/8", 0.2): scores, ("1/8", 0.4): scores[::-1]}))
    assert [note.partition(":")[0] for note in notes(found)] == [
        "checkpoint",
        "mean",
        "difference",
        "p",
        "with 6 seeds the smallest possible p is 0.031",
        "split",
    ]
    assert "over seeds 0 to 5" in note(found, "mean:")
    assert "BCa bootstrap" in note(found, "difference")
    assert found.title == "mIoU (%) after the last epoch"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"by": ["partitoin"]},
            '--by: unknown setting "partitoin"; settings that vary in this sweep: partition, eps; did you mean "partition"?',
        ),
        ({"by": ["seed"]}, "--by seed: not possible, because trials are paired by seed; leave it out"),
        ({"metric": "val/mIoU"}, '--metric val/mIoU: must be one of val/miou, val/iou_ensemble/CLASS; did you mean "val/miou"?'),
        ({"baseline": "eps=0.20"}, '--baseline "eps=0.20": must be one of "eps=0.2", "eps=0.4"; did you mean "eps=0.2"?'),
    ],
)
def test_a_name_that_does_not_exist_is_one_line_with_those_that_do(store, asked, words):
    plans = sweep(grid={"partition": ["1/8"], "eps": [0.2, 0.4]})
    train(store, plans[0], [{"val/miou": 0.5, "val/iou_ensemble/car": 0.5, "val/iou_ensemble/bus": 0.5}])
    with pytest.raises(SweepError) as fault:
        compare(known(store, plans), **asked)
    assert str(fault.value) == words


def test_classes_are_those_of_the_validation_list_in_their_order(store):
    (plan,) = sweep(grid={"eps": [0.2]})
    train(store, plan, [{"val/iou_branch1/sky": 0.1, "val/iou_branch1/road": 0.1, "val/iou_ensemble/sky": 0.2}])
    assert known(store, [plan])[0].classes == ("sky", "road")
