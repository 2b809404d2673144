"""Figures of a grid of methods and eps, of which only one method has the setting eps."""

from __future__ import annotations

import pytest
from compared import MIXED, trials

from orchestration.compare.comparison import compare
from orchestration.compare.curves import learning_curves, loss_curves
from orchestration.compare.figures import by_setting, by_share, figures, parallel_coordinates
from orchestration.compare.heat_maps import heat_map
from orchestration.compare.plot_points import free


def lines_of(figure) -> dict[str, list[float]]:
    return {trace.name: pytest.approx(list(trace.y)) for trace in figure.data if trace.name and "lines" in trace.mode}


def words(figure) -> str:
    return figure.layout.title.subtitle.text.replace("<br>", " | ")


def by_method(plan, epoch: int) -> float:
    """0.1 for supervised, 0.2 for cps, 0.3 + eps / 10 for rrn; 0.4 more in 1/4."""
    base = {"supervised": 0.1, "cps": 0.2, "rrn": 0.3}[plan.config.method]
    return base + getattr(plan.config, "eps", 0) / 10 + 0.4 * (plan.config.partition == "1/4")


@pytest.fixture(scope="module")
def mixed():
    return compare(trials({**MIXED, "base": {"epochs": 2}}, score=by_method))


@pytest.mark.parametrize("first", ["method", "eps"])
def test_the_method_is_free_although_a_cell_without_eps_could_only_be_of_another_method(first):
    grid = dict(sorted({"method": ["rrn", "supervised"], "eps": [0.2, 0.4]}.items(), key=lambda item: item[0] != first))
    found = trials({"grid": {"partition": ["1/8", "1/4"], **grid}, "base": {"epochs": 1}}, score=lambda plan, epoch: 0.3)
    assert free([result.settings for result in found]) == ("partition", *grid)


def test_one_value_of_a_setting_that_other_methods_do_not_have_is_no_variation():
    points = [{"method": "supervised"}, {"method": "cps"}, {"method": "rrn", "eps": 0.3}]
    assert free([result.settings for result in trials({"points": points}, epochs=lambda plan: 0)]) == ("method",)


def test_the_metric_against_a_setting_that_only_one_method_has_shows_the_cells_that_have_it(mixed):
    figure = by_setting(mixed, "eps")
    assert lines_of(figure) == {"1/8 method=rrn": [32, 34, 36], "1/4 method=rrn": [72, 74, 76]}
    assert list(figure.layout.xaxis.tickvals) == [0.2, 0.4, 0.6]
    assert words(figure).endswith("cells without eps are left out")


def test_the_lines_against_the_labelled_share_name_only_settings_that_exist(mixed):
    assert lines_of(by_share(mixed)) == {
        "method=supervised": [10, 50],
        "method=cps": [20, 60],
        **{f"method=rrn eps={eps}": [30 + 10 * eps, 70 + 10 * eps] for eps in (0.2, 0.4, 0.6)},
    }


def test_a_heat_map_of_methods_shows_one_choice_of_eps_beside_methods_without_it(mixed):
    figure = heat_map(mixed, "partition", "method")
    (tiles,) = figure.data
    assert (list(tiles.y), list(tiles.x)) == (["1/8", "1/4"], ["supervised", "cps", "rrn"])
    assert [list(row) for row in tiles.z] == [pytest.approx([10, 20, 32]), pytest.approx([50, 60, 72])]
    assert words(figure).endswith("at eps=0.2")


def test_a_heat_map_over_eps_leaves_out_cells_without_it(mixed):
    figure = heat_map(mixed, "partition", "eps")
    assert [list(row) for row in figure.data[0].z] == [pytest.approx([32, 34, 36]), pytest.approx([72, 74, 76])]
    assert words(figure).endswith("at method=rrn")
    assert heat_map(mixed, "method", "eps") is None


def test_parallel_coordinates_have_a_place_for_trials_without_the_setting(mixed):
    _, method, eps, _ = parallel_coordinates(mixed).data[0].dimensions
    assert list(eps.ticktext) == ["0.2", "0.4", "0.6", "no eps"]
    assert eps.tickvals[-1] == min(eps.values) < 0.2
    assert {(m, e == eps.tickvals[-1]) for m, e in zip(method.values, eps.values, strict=True)} == {(0, True), (1, True), (2, False)}
    assert list(eps.range) == [eps.tickvals[-1], 0.6]


@pytest.mark.parametrize("name", ["lambda2", "gate"])
def test_the_place_without_a_setting_lies_below_many_numbers_and_below_names(name):
    values = [10.0 ** (n / 4) for n in range(-6, 6)] if name == "lambda2" else ["gt", "ge"]
    found = compare(trials({"grid": {"method": ["supervised", "rrn"], name: values}, "base": {"epochs": 1}}, score=by_method), by=())
    _, axis, _ = parallel_coordinates(found).data[0].dimensions
    assert (axis.ticktext[-1], axis.values[0]) == (f"no {name}", axis.tickvals[-1])
    assert axis.values[0] < min(axis.values[1:])


def test_curves_of_methods_without_a_setting_are_named_without_it(mixed):
    shown = {trace.name for trace in learning_curves(mixed).data if trace.name}
    assert shown == {"method=supervised", "method=cps", *(f"method=rrn eps={eps}" for eps in (0.2, 0.4, 0.6))}
    assert {trace.name for trace in loss_curves(mixed).data} == shown


def test_a_mixed_grid_has_every_figure(mixed):
    assert list(figures(mixed)) == [
        "labelled-share",
        "against-eps",
        "heat-map-partition-method",
        "heat-map-partition-eps",
        "parallel-coordinates",
        "classes",
        "learning-curves",
        "losses",
    ]
