"""The addresses of a sweep in MLflow's UI, and the charts on those pages."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from orchestration.tracking.mlflow_private import artifact_url
from orchestration.tracking.run_content import BEST_SCORE
from orchestration.tracking.ui_links import MOST_COMPARED, comparison_url, grouped_by, runs_url, trials_url, ui_base, views


def test_no_address_contains_a_password() -> None:
    assert ui_base("https://user:secret@host:5000/mlflow/") == "https://host:5000/mlflow"
    assert ui_base("sqlite:////my/mlflow.db") is None


def test_links_within_the_ui_are_relative() -> None:
    assert comparison_url("", "7").startswith("#/experiments/7/runs?workflowType=machine_learning")
    assert comparison_url("http://host/mlflow/", "7").startswith("http://host/mlflow/#/experiments/7/runs?")
    page = "#/experiments/7/runs/abc/artifacts/a%20b/report.html?workflowType=machine_learning"
    assert artifact_url("", "7", "abc", "a b/report.html") == page


def test_runs_are_compared_by_their_ids_up_to_a_limit() -> None:
    ids = [f"{i:032x}" for i in range(MOST_COMPARED + 5)]
    url = runs_url("", "7", ids)
    assert url.startswith("#/compare-runs?runs=%5B%22")  # the UI expects them first
    query = parse_qs(urlsplit(urlsplit(url).fragment).query)
    assert (json.loads(query["runs"][0]), json.loads(query["experiments"][0])) == (ids[:MOST_COMPARED], ["7"])


@pytest.mark.parametrize(
    ("varied", "group"),
    [(("partition", "eps", "seed"), "partition"), (("seed", "eps"), "eps"), (("seed",), "partition"), ((), "partition")],
)
def test_charts_are_grouped_by_what_varies_first(varied: tuple[str, ...], group: str) -> None:
    assert grouped_by(varied) == group
    grouped, single = (json.loads(shared_view(url, varied)) for url in (comparison_url("", "7"), trials_url("", "7")))
    assert (grouped["groupBy"], single["groupBy"]) == (f"param.average.{group}", None)
    assert grouped["searchFilter"] == "tags.`rrn.kind` = 'trial'"


def test_every_varied_setting_but_the_seed_is_an_axis() -> None:
    charts = json.loads(shared_view(trials_url("", "7"), ("partition", "eps", "lambda1", "seed"), drawn=9))["compareRunCharts"]
    by_kind: dict[str, list[dict]] = {}
    for chart in charts:
        by_kind.setdefault(chart["type"], []).append(chart)
    (parallel,) = by_kind["PARALLEL"]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (["partition", "eps", "lambda1"], ["val/miou"])
    assert [chart["xaxis"]["key"] for chart in by_kind["SCATTER"]] == ["eps", "lambda1"]
    assert (by_kind["LINE"][0]["metricKey"], by_kind["BAR"][0]["metricKey"]) == ("val/miou", BEST_SCORE)
    assert (by_kind["IMAGE"][0]["imageKeys"], by_kind["IMAGE"][0]["step"]) == (["predictions"], 9)
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_the_views_of_twenty_varied_settings_fit_into_a_tag() -> None:
    assert max(map(len, views([f"some_long_setting_{i}" for i in range(20)], drawn=100).values())) < 20_000


def shared_view(url: str, varied: tuple[str, ...], **changes: int) -> str:
    """The shared view that the address opens."""
    (key,) = parse_qs(urlsplit(urlsplit(url).fragment).query)["viewStateShareKey"]
    return views(varied, **changes)[f"mlflow.sharedViewState.{key}"]
