"""figures.py, heat_maps.py, curves.py: the numbers in the figures, against those calculated by hand; and which figures are left out."""

from __future__ import annotations

import subprocess
import sys

import pytest
from compared import CLASSES, GRID, TERMS, entry, swept, trials

from orchestration.compare.comparison import compare
from orchestration.compare.curves import by_class, learning_curves, loss_curves
from orchestration.compare.figures import by_setting, by_share, figures, parallel_coordinates
from orchestration.compare.heat_maps import heat_map
from orchestration.compare.plot_points import free, share
from orchestration.compare.results import results
from orchestration.compare.theme import COLOURS, CONFIG, NEUTRAL
from orchestration.plan.spec import PublishedRow

MEANS = {("1/16", 0.2): 30, ("1/16", 0.4): 32, ("1/16", 0.6): 31, ("1/4", 0.2): 40, ("1/4", 0.4): 41, ("1/4", 0.6): 45}
"""mIoU in percent after the last epoch, of seed 1; seed 0 has a point less, seed 2 one more. The epoch before has ten more."""


def by_hand(plan, epoch: int) -> float:
    last = MEANS[plan.config.partition, plan.config.eps] + plan.config.seed - 1
    return (last + 10 * (epoch == plan.config.epochs - 1)) / 100


def one_by_one(*points: dict, **base) -> list:
    return trials({"points": list(points), "base": {"epochs": 2, **base}}, score=lambda plan, epoch: 0.1 * epoch)


def lines_of(figure) -> dict[str, list[float]]:
    return {trace.name: pytest.approx(list(trace.y)) for trace in figure.data if trace.name and "lines" in trace.mode}


def words(figure) -> str:
    return figure.layout.title.subtitle.text.replace("<br>", " | ")


def test_the_metric_against_eps_has_a_line_a_partition_with_its_spread_and_every_seed():
    figure = by_setting(compare(trials(score=by_hand)), "eps")
    assert {trace.name: list(trace.x) for trace in figure.data if trace.name} == {"1/16": [0.2, 0.4, 0.6], "1/4": [0.2, 0.4, 0.6]}
    assert lines_of(figure) == {"1/16": [30, 32, 31], "1/4": [40, 41, 45]}
    assert [list(trace.error_y.array) for trace in figure.data if trace.name] == [pytest.approx([1, 1, 1])] * 2
    seeds = [trace for trace in figure.data if not trace.name]
    assert [list(trace.y) for trace in seeds] == [
        pytest.approx([29, 30, 31, 31, 32, 33, 30, 31, 32]),
        pytest.approx([39, 40, 41, 40, 41, 42, 44, 45, 46]),
    ]
    assert list(seeds[0].x) == [0.2] * 3 + [0.4] * 3 + [0.6] * 3
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("eps", "mIoU (%)")


@pytest.mark.parametrize(
    ("at", "rule", "first"),
    [
        ("last", "after the last epoch", 30),
        ("best", "at each trial's epoch with the best val/miou", 40),
        ("common", "after epoch 2, the last that every trial has completed", 30),
    ],
)
def test_a_figure_shows_the_values_of_the_rule_and_names_it_with_metric_split_and_seeds(at, rule, first):
    cut = trials(score=by_hand, epochs=lambda plan: 2 if plan.config.seed == 2 else 8)
    comparison = compare(cut, at=at)
    figure = by_setting(comparison, "eps")
    seeds = "0, 1, 2" if at == "common" else "0, 1"
    expected = f"mIoU (%) on the validation list of digits {rule} | mean and sample standard deviation over seeds {seeds}"
    assert words(figure) == expected
    assert figure.data[0].y[0] == pytest.approx(first - 0.5 * (at != "common"))
    assert [words(other).split(" | ")[0] for other in figures(comparison).values()].count(expected.split(" | ")[0]) == 4


def test_single_runs_have_no_spread_and_the_subtitle_says_so():
    figure = by_setting(compare(one_by_one({"eps": 0.2}, {"eps": 0.4})), "eps")
    assert "seed 0; one run each, so no spread" in words(figure)
    assert len(figure.data) == 1
    assert figure.data[0].error_y.array is None


def test_a_single_line_is_named_in_the_title_and_only_its_own_values_are_ticks():
    lambdas = one_by_one({"lambda1": 1.0, "lambda2": 3.0}, {"lambda1": 0.5}, {"lambda1": 2.0}, lambda1=1.0, lambda2=1.0)
    figure = by_setting(compare(lambdas, by=()), "lambda1")
    assert list(figure.data[0].x) == [0.5, 2.0] == list(figure.layout.xaxis.tickvals)
    assert words(figure).endswith("; lambda2=1")
    assert not figure.layout.showlegend


def test_where_no_two_cells_differ_in_one_setting_alone_every_cell_is_a_point_on_a_logarithmic_axis():
    found = [{"lambda1": 0.1 * 1.5**n, "eps": 0.3 + 0.01 * n} for n in range(10)]
    figure = by_setting(compare(one_by_one(*found), by=()), "lambda1")
    assert [(trace.mode, len(trace.x)) for trace in figure.data] == [("markers", 10)]
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["0.1", "0.2", "0.5", "1", "2"]


def test_the_metric_against_the_share_doubles_from_tick_to_tick_and_has_the_published_numbers_dashed():
    rows = [PublishedRow(when={"partition": partition}, value=value) for partition, value in (("1/4", 44.5), ("1/8", 38))]
    figure = by_share(compare(trials(score=by_hand)), [*rows, PublishedRow(when={"partition": "1/2"}, metric="val/miou_branch1", value=50)])
    assert figure.layout.xaxis.type == "log"
    ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    assert ticks == {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4}
    assert lines_of(figure) == {"eps=0.2": [30, 40], "eps=0.4": [32, 41], "eps=0.6": [31, 45], "published": [38, 44.5]}
    published = figure.data[-1]
    assert (published.line.dash, published.line.color, list(published.x)) == ("dash", NEUTRAL, [1 / 8, 1 / 4])


def test_a_published_curve_has_the_colour_of_the_line_it_belongs_to():
    document = {"grid": {"partition": ["1/8", "full"], "method": ["cps", "rrn"]}, "base": {"epochs": 2}}
    found = compare(trials(document, score=lambda plan, epoch: 0.3))
    rows = [
        PublishedRow(when={"method": "rrn", "partition": "1/8"}, metric="val/miou_ensemble", value=60),
        PublishedRow(when={"method": "cps", "partition": "1/8"}, metric="val/miou_branch1", value=50),
    ]
    by_name = {trace.name: trace for trace in by_share(found, rows).data}
    assert list(by_name) == ["method=cps", "method=rrn", "published method=rrn"]
    assert by_name["published method=rrn"].line.color == by_name["method=rrn"].line.color == COLOURS[1]


@pytest.mark.parametrize(
    ("partition", "config", "expected"),
    [
        ("full", {}, 1),
        ("1/16", {}, 1 / 16),
        ("n:128", {"dataset": "digits", "train_images": 512}, 0.25),
        ("n:92", {"dataset": "voc"}, 92 / 10582),
        ("n:5", {"dataset": "folder", "split": {"labeled": 5, "unlabeled": 15}}, 0.25),
        ("n:5", {"dataset": "folder"}, None),
        ("rrn", {}, None),
    ],
)
def test_the_share_of_a_partition(partition, config, expected):
    assert share(partition, config) == expected


def test_a_heat_map_holds_the_mean_of_every_pair():
    figure = heat_map(compare(trials(score=by_hand)), "partition", "eps")
    (tiles,) = figure.data
    assert (list(tiles.y), list(tiles.x)) == (["1/16", "1/4"], ["0.2", "0.4", "0.6"])
    assert [list(row) for row in tiles.z] == [pytest.approx([30, 32, 31]), pytest.approx([40, 41, 45])]
    assert tiles.texttemplate


def test_a_heat_map_averages_over_other_settings_only_where_every_pair_has_the_same_of_them():
    document = {"grid": {"partition": ["1/8", "1/4"], "eps": [0.3, 0.6], "lambda1": [1.0, 2.0]}, "base": {"epochs": 1}}
    found = trials(document, score=lambda plan, epoch: plan.config.lambda1 / 10)
    whole = heat_map(compare(found), "partition", "eps")
    assert whole.data[0].z[0][0] == pytest.approx(15)
    assert words(whole).endswith("mean also over lambda1")
    partly = heat_map(compare([r for r in found if r.settings["lambda1"] == 1 or r.settings["eps"] == 0.3]), "partition", "eps")
    assert [list(row) for row in partly.data[0].z] == [pytest.approx([10, 10])] * 2
    assert words(partly).endswith("at lambda1=1")


def test_there_is_no_heat_map_of_values_that_hardly_ever_meet():
    found = compare(one_by_one(*({"eps": 0.2 + 0.1 * n, "lambda1": 1.0 + n} for n in range(5))), by=())
    assert heat_map(found, "eps", "lambda1") is None


def test_parallel_coordinates_have_a_line_a_trial_and_whole_labels_on_an_axis_of_names():
    document = {"grid": {"region_upsample": ["threshold_first", "nearest"], "partition": ["1/4", "1/16"]}, "seeds": [0, 1]}
    found = trials({**document, "base": {"epochs": 1}}, score=lambda plan, epoch: 0.1 + plan.config.seed / 10)
    partition, upsample, score = parallel_coordinates(compare(found)).data[0].dimensions
    assert (list(partition.ticktext), list(partition.values)) == (["1/16", "1/4"], [1, 1, 1, 1, 0, 0, 0, 0])
    assert (list(upsample.ticktext), list(upsample.values)) == (["threshold_first", "nearest"], [0, 0, 1, 1] * 2)
    assert (score.label, list(score.values)) == ("mIoU (%)", pytest.approx([10, 20] * 4))


def test_a_setting_that_follows_from_the_partition_is_no_axis():
    points = [
        {"partition": partition, "epochs": epochs, "eps": eps} for partition, epochs in (("1/8", 2), ("1/4", 3)) for eps in (0.3, 0.6)
    ]
    found = trials({"points": points}, score=lambda plan, epoch: 0.3)
    assert free([result.settings for result in found]) == ("partition", "eps")
    assert "against-epochs" not in figures(compare(found))


def test_the_iou_of_each_class_is_read_where_the_cell_was_and_an_absent_class_is_left_out():
    found = trials(score=by_hand)
    figure = by_class(compare(found, at="best"))
    assert list(figure.data[0].y) == list(CLASSES[:-1])
    assert [trace.name for trace in figure.data] == [f"{partition} eps={eps}" for partition, eps in MEANS]
    # background: 40 points above the mIoU and 7.5 below that; digit_0: 3 above
    assert list(figure.data[0].x[:2]) == pytest.approx([40 + 40 - 7.5, 40 + 3])
    assert figure.data[0].error_x.array[1] == pytest.approx(1)


def test_the_classes_of_branch_1_are_shown_where_nothing_is_ensembled():
    found = one_by_one({"eps": 0.2}, {"eps": 0.4}, ensemble="none")
    assert words(by_class(compare(found))).startswith("IoU (%) of branch 1 on")
    assert words(by_class(compare(found, metric="val/miou_branch2"))).startswith("IoU (%) of branch 2 on")


def test_many_cells_show_their_classes_as_a_heat_map():
    found = compare(one_by_one(*({"eps": 0.1 + 0.02 * n} for n in range(30))), by=())
    (tiles,) = by_class(found).data
    assert (len(tiles.y), list(tiles.x)) == (24, list(CLASSES[:-1]))
    assert words(by_class(found)).endswith("the 24 best of 30")


def test_learning_curves_have_a_panel_a_group_and_the_mean_of_the_finished_seeds_beside_each_seed():
    cut = trials(score=by_hand, epochs=lambda plan: 3 if plan.config.seed == 2 else 8)
    figure = learning_curves(compare(cut))
    means = [trace for trace in figure.data if trace.name]
    assert [(trace.meta, trace.yaxis) for trace in means] == [(f"{p} eps={e}", "y" if p == "1/16" else "y2") for p, e in MEANS]
    assert (list(means[0].x), list(means[0].y)) == ([*range(1, 9)], pytest.approx([29.5] * 6 + [39.5, 29.5]))
    thin = [trace for trace in figure.data if not trace.name]
    assert [len(trace.x) for trace in thin[:3]] == [8, 8, 3]
    assert sum(trace.showlegend for trace in means) == 3


def test_curves_of_a_partition_that_does_not_vary_are_named_without_it():
    found = trials({"grid": {"eps": [0.2, 0.4]}, "base": {"epochs": 2}})
    figure = learning_curves(compare(found))
    assert [trace.meta for trace in figure.data] == ["eps=0.2", "eps=0.4"]
    assert not figure.layout.annotations


def test_the_best_curve_of_each_of_several_groups_is_in_the_legend():
    document = {"grid": {"partition": ["1/8", "1/4"], "eps": [0.2 + 0.01 * n for n in range(15)]}, "base": {"epochs": 2}}
    found = trials(document, score=lambda plan, epoch: plan.config.eps * (1 if plan.config.partition == "1/8" else -1) + 0.5)
    figure = learning_curves(compare(found))
    assert [(trace.meta, trace.line.color) for trace in figure.data if trace.showlegend] == [
        ("1/8 eps=0.34", COLOURS[1]),
        ("1/4 eps=0.2", COLOURS[1]),
    ]


def test_of_too_many_learning_curves_the_best_stands_out():
    found = trials({"grid": {"eps": [0.2 + 0.01 * n for n in range(15)]}, "base": {"epochs": 2}}, score=lambda plan, epoch: plan.config.eps)
    figure = learning_curves(compare(found, by=()))
    assert [trace.name for trace in figure.data if trace.showlegend] == ["eps=0.34"]
    assert [trace.line.color for trace in figure.data].count(COLOURS[1]) == 1


def test_every_term_of_the_loss_is_in_the_menu_and_one_is_shown():
    found = trials()
    figure = loss_curves(compare(found))
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == sorted(TERMS)
    assert [trace.visible for trace in figure.data] == [True] * 6 + [False] * 36
    assert list(menu.buttons[1].args[0]["visible"]) == [False] * 6 + [True] * 6 + [False] * 30
    plan = swept()[0][0]
    expected = sum(entry(p, 8).metrics["train/loss"] for p in swept()[0][:3]) / 3
    assert plan.label == "1/16 eps=0.2 seed 0"
    assert figure.data[0].y[-1] == pytest.approx(expected, rel=1e-4)


def test_before_the_second_epoch_and_of_a_single_trial_there_are_no_figures_that_make_no_sense():
    for epochs in (0, 1):
        begun = trials(epochs=lambda plan, epochs=epochs: epochs)
        assert figures(compare(begun)) == {}
    running = trials(epochs=lambda plan: 2)
    assert list(figures(compare(running))) == ["learning-curves", "losses"]
    single = one_by_one({"eps": 0.3})
    assert list(figures(compare(single))) == ["classes", "learning-curves", "losses"]


def test_figures_come_in_reading_order():
    found = trials()
    assert list(figures(compare(found))) == [
        "labelled-share",
        "against-eps",
        "heat-map-partition-eps",
        "parallel-coordinates",
        "classes",
        "learning-curves",
        "losses",
    ]


def test_names_with_markup_are_shown_literally():
    found = trials({**GRID, "seeds": [0]}, classes=("a<b>&", "rest", "absent"))
    assert by_class(compare(found)).data[0].y[0] == "a&lt;b&gt;&amp;"


def test_several_sweeps_stand_in_one_figure():
    found = results([swept({**GRID, "base": {"epochs": 8, "lambda1": value}}, name=f"at_{value:.0f}") for value in (1.0, 2.0)])
    drawn = by_setting(compare(found), "eps")
    names = {trace.name for trace in drawn.data if trace.name}
    assert names == {f"{partition} lambda1={value}" for partition in ("1/16", "1/4") for value in (1, 2)}


def test_nothing_is_ever_sent_to_the_makers_of_the_library():
    assert CONFIG["showSendToCloud"] is False
    assert CONFIG["plotlyServerURL"] == ""


def test_importing_figures_and_page_imports_no_plotting_library():
    code = "import sys, orchestration.compare.page; print(sorted({'plotly', 'jinja2', 'numpy', 'pandas', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
