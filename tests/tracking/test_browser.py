"""What a person sees in a real browser: the pages of a real `mlflow server` on a sweep, and the page that `compare` writes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, chromium
from compared import CLASSES, entry
from PIL import Image
from processes import run_sweep
from selenium.webdriver.common.keys import Keys
from servers import MlflowServer

from orchestration.plan.spec import Retention
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import EpochMetrics
from orchestration.record.trial_record import TrialRecord
from orchestration.run.epoch_pictures import CONFUSION, PREDICTIONS
from orchestration.run.runner import facts, overview
from orchestration.sweep import Sweep, open_sweep
from orchestration.tracking.mlflow_private import artifact_url
from orchestration.tracking.sync import sync
from orchestration.tracking.ui_links import runs_url
from rrn_core.config import Runtime, TrainConfig
from rrn_core.data.dataset import open_validation
from rrn_core.methods import build_networks
from rrn_core.pictures import panels, spread

pytestmark = pytest.mark.slow

NAME, FILE = "browsed", "browsed.yaml"
SWEEP = f"""
name: {NAME}
description: How eps and the share of labels act on the embedded digits.
preset: digits
base: {{epochs: 6, val_images: 12}}
grid: {{partition: ["1/16", "1/4"], eps: [0.2, 0.4, 0.6]}}
seeds: [0, 1]
published:
  source: a paper, Table I
  rows: [{{when: {{partition: "1/16"}}, value: 30.5}}, {{when: {{partition: "1/4"}}, value: 41.2}}]
"""
LABELS = [f"{partition} eps={eps} seed {seed}" for partition in ("1/16", "1/4") for eps in (0.2, 0.4, 0.6) for seed in (0, 1)]
TRIAL = "1/4 eps=0.4 seed 1"
BEGUN_MS, EPOCH_MS = 1_790_000_000_000, 47_000


@dataclass(frozen=True)
class Shown:
    """A sweep of finished trials, and where MLflow shows it."""

    sweep: Sweep
    base: str
    experiment: str
    parent: str
    runs: dict[str, str]
    """Run by the label of its trial."""

    def file(self, name: str, *, trial: str | None = None) -> str:
        return artifact_url(self.base, self.experiment, self.runs[trial] if trial else self.parent, name)

    def page(self, rest: str = "") -> str:
        return f"{self.base}/#/experiments/{self.experiment}/runs{rest}?workflowType=machine_learning"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer) -> Sweep:
    """As if all of its trials had trained."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / FILE).write_text(SWEEP)
    places = {"RRN_STORE": str(folder / "store"), "MLFLOW_TRACKING_URI": mlflow_server.uri}
    planned = open_sweep(folder / FILE, [], data_root=None, environment=places)
    for number, plan in enumerate(planned.plans):
        fill(planned, plan, BEGUN_MS + 6 * number * EPOCH_MS)
    return planned.reread()


@pytest.fixture(scope="module")
def shown(sweep: Sweep) -> Shown:
    from mlflow import MlflowClient

    command, trial_ids = f"rrn-sweep {FILE}", [plan.trial_id for plan in sweep.plans]
    sync(sweep.tracking, NAME, sweep.store, trial_ids=trial_ids, facts=facts(sweep, command), overview=overview(sweep, command))
    client = MlflowClient(tracking_uri=sweep.tracking)
    experiment = client.get_experiment_by_name(NAME).experiment_id
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment])}
    return Shown(sweep, sweep.tracking, experiment, runs.pop(NAME), runs)


@pytest.fixture
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    screenshots = Path(request.config.getoption("--screenshots") or tmp_path_factory.mktemp("screenshots"))
    screenshots.mkdir(parents=True, exist_ok=True)
    with chromium(tmp_path_factory.mktemp("profile"), screenshots=screenshots) as window:
        yield window


@pytest.fixture
def ui(browser: Browser, shown: Shown) -> Browser:
    """A browser that was here before: MLflow greets others with a chat that takes a quarter of the window."""
    browser.open(f"{shown.base}/health")
    for key, value in (("fab.autoOpenedOnFirstLoad_v1", "true"), ("panelOpen_v1", "false")):
        browser.ask("localStorage.setItem(`mlflow.assistant.${arguments[0]}`, arguments[1])", key, value)
    return browser


@pytest.fixture(scope="module")
def report(sweep: Sweep) -> Path:
    """What the command writes."""
    places = {"RRN_STORE": sweep.store.uri.removeprefix("file://"), "MLFLOW_TRACKING_URI": sweep.tracking}
    code, text = run_sweep("compare", FILE, "--out", "report.html", cwd=sweep.file.parent, environment=places, deadline_s=120)
    assert code == 0, text
    return sweep.file.with_name("report.html")


def test_the_experiment_opens_for_training_and_lists_the_trials_below_the_sweep(ui: Browser, shown: Shown) -> None:
    ui.open(shown.page())
    ui.wait_for_text("13 matching runs", "charts by partition")
    assert {"Runs", "Models"} <= set(ui.texts("aside a")), "the mode for language models has other pages"
    ui.click("[role=gridcell] button")
    ui.wait(lambda: {NAME, *LABELS} <= set(ui.texts("[role=gridcell] a")), "trials by their names")
    ui.screenshot("experiment")
    assert own_errors(ui) == []


def test_the_description_leads_to_charts_of_the_trials_grouped_by_partition(ui: Browser, shown: Shown) -> None:
    ui.open(shown.page())
    ui.follow("charts by partition")
    ui.wait_for_text("12 matching runs", "Group: 1/4", "Group: 1/16", "1/4 (val/miou)", "1/16 (val/miou)", *LABELS)
    ui.wait(lambda: len(ui.all(".js-plotly-plot .scatterlayer .js-line")) >= 2, "a line for each group")
    ui.wait(lambda: len(ui.all(".js-plotly-plot .barlayer .point")) == 2, "a bar for each group")
    ui.screenshot("charts-by-partition")
    assert "No charts in this section" not in ui.text
    assert own_errors(ui) == []


def test_the_description_leads_to_charts_of_every_trial_with_parallel_coordinates_and_predictions(ui: Browser, shown: Shown) -> None:
    ui.open(shown.page(), height=2400)
    ui.follow("charts of every trial")
    ui.wait_for_text("12 matching runs", "Parallel Coordinates", "eps vs. val/miou", *LABELS)
    ui.wait(lambda: len(ui.all(".js-plotly-plot .scatterlayer .js-line")) >= len(LABELS), "a line for each trial")
    ui.wait(lambda: len(ui.ask(LOADED, "compressed.webp")) >= 1, "predictions")
    ui.screenshot("charts-of-every-trial")
    assert ui.ask(LOADED, "compressed.webp")[0][0] == 1024
    assert own_errors(ui) == []


def test_finished_trials_of_two_partitions_are_set_side_by_side_in_parallel_coordinates(ui: Browser, shown: Shown) -> None:
    ui.open(runs_url(shown.base, shown.experiment, list(shown.runs.values())))
    ui.wait_for_text("Comparing 12 Runs from 1 Experiment", *LABELS[-2:])
    ui.wait(lambda: len(ui.all(".parcoords .y-axis")) == 4, "four axes")
    axes = {title: ticks for title, *ticks in ui.ask(AXES)}
    assert axes.keys() == {"partition", "eps", "seed", "best/miou"}
    assert set(axes["partition"]) == {"1/16", "1/4"}
    ui.wait(lambda: ui.colourful(*ui.ask(BETWEEN_AXES)) > 1000, "lines between the axes")
    ui.screenshot("side-by-side")
    assert own_errors(ui) == []


def test_the_run_of_the_sweep_shows_the_comparison_with_its_figures_drawn(ui: Browser, shown: Shown) -> None:
    ui.open(shown.page(f"/{shown.parent}"))
    ui.wait_for_text("Sweep browsed compares partition, eps", "Child runs", *LABELS[-2:])
    ui.screenshot("sweep")
    ui.follow("comparison.html")
    ui.enter_frame("iframe")
    drawn = figures(ui)
    ui.screenshot("comparison")
    assert {"figure-labelled-share", "figure-against-eps", "figure-heat-map-partition-eps", "figure-parallel-coordinates"} <= drawn
    ui.wait_for_text("12 of 12 trials of browsed finished.", "a paper, Table I")
    ui.ask("document.getElementById('figures').scrollIntoView()")
    ui.screenshot("comparison-figures")
    assert own_errors(ui) == []


def test_the_comparison_is_also_there_as_tables(ui: Browser, shown: Shown) -> None:
    ui.open(shown.file("comparison.json"))
    ui.wait_for_text("View as table")
    ui.wait(lambda: len(ui.ask(ROWS)) == 1 + 6, "a row for each setting")
    head, *rows = ui.ask(ROWS)
    assert head[:3] == ["partition", "cell", "seeds"]
    assert [row[:3] for row in rows] == [[partition, f"eps={eps}", "2"] for partition in ("1/16", "1/4") for eps in (0.2, 0.4, 0.6)]
    ui.screenshot("comparison-json")
    ui.open(shown.file("comparison.csv"))
    ui.wait_for_text("Previewing the first 12 rows", *(plan.trial_id for plan in shown.sweep.plans))
    ui.screenshot("comparison-csv")
    ui.open(shown.file("comparison.md"))
    ui.wait(lambda: len(ui.all("[role=table]")) == 2, "our table and the published one")
    ui.screenshot("comparison-md")
    assert own_errors(ui) == []


def test_the_run_of_a_trial_says_what_it_is_on_which_data_and_what_came_of_it(ui: Browser, shown: Shown) -> None:
    ui.open(shown.page(f"/{shown.runs[TRIAL]}"))
    ui.click("button", "Show more")
    ui.wait_for_text(f"of the sweep {NAME}: {TRIAL}", "128 labelled, 384 unlabelled, 12 validation images", "after the last epoch, 6:")
    ui.wait_for_text("Datasets", "digits 1/4 (", "Parent run")
    ui.screenshot("trial")
    ui.click("[role=tab]", "System metrics")
    ui.wait_for_text("cpu_utilization_percentage", "system_memory_usage_")
    ui.wait(lambda: len(ui.all(".js-plotly-plot .scatterlayer .point")) == 2 * 6, "two curves with a point for each epoch")
    ui.screenshot("trial-system-metrics")
    assert own_errors(ui) == []


def test_the_run_of_a_trial_shows_its_predictions_and_confusions(ui: Browser, shown: Shown) -> None:
    with Image.open(io.BytesIO(predictions(shown.sweep.plans[0].config))) as picture:
        width, height = picture.size
    ui.open(shown.file("predictions.png", trial=TRIAL))
    ui.wait_for_text("predictions.png", "iou_per_class.json", "config.yaml")
    ui.wait(lambda: [width, height] in ui.ask(LOADED, ""), "whole picture")
    ui.screenshot("trial-predictions")
    ui.open(shown.file("confusion.png", trial=TRIAL))
    ui.wait(lambda: ui.ask(LOADED, ""), "picture")
    ui.screenshot("trial-confusion")
    ui.open(shown.file("iou_per_class.json", trial=TRIAL))
    ui.wait(lambda: [row[0] for row in ui.ask(ROWS)[1:]] == ["mean", *CLASSES[:-1]], "a row for each class")
    ui.screenshot("trial-iou")
    assert own_errors(ui) == []


def test_the_page_of_compare_loads_nothing_and_draws_every_figure(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri(), width=1300, height=1000)
    assert len(figures(browser)) >= 6
    browser.screenshot("report")
    browser.ask("document.getElementById('figure-parallel-coordinates').scrollIntoView()")
    browser.wait(lambda: browser.colourful(*browser.ask(BETWEEN_AXES)) > 1000, "lines between the axes")
    browser.screenshot("report-parallel-coordinates")
    assert browser.ask("performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert (
        browser.ask("[...document.querySelectorAll('[src], [href]')].filter(e => !(e.getAttribute('href') ?? '').startsWith('#')).length")
        == 0
    )
    assert browser.errors() == []


def test_a_table_sorts_by_mouse_and_by_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri(), width=1300)
    heading = browser.visible("#comparison th:nth-child(2) button")
    heading.click()
    upwards = [float(text) for text in browser.texts(COLUMN.format(2))]
    assert upwards == sorted(upwards)
    assert sort_order(browser, 2) == "ascending"
    heading.send_keys(Keys.ENTER)
    assert [float(text) for text in browser.texts(COLUMN.format(2))] == upwards[::-1]
    assert sort_order(browser, 2) == "descending"
    heading.send_keys(Keys.SHIFT, Keys.TAB)
    focused = browser.driver.switch_to.active_element
    assert focused.text.startswith("cell")
    focused.send_keys(Keys.SPACE)
    assert browser.texts(COLUMN.format(1)) == ["eps=0.2", "eps=0.4", "eps=0.6"]
    assert (sort_order(browser, 1), sort_order(browser, 2)) == ("ascending", "none")
    browser.click("#comparison .card:nth-of-type(2) th:nth-child(4) button")
    assert browser.texts("#comparison .card:nth-of-type(2) td:nth-child(4)") == ["+1.18", "+1.21", "baseline"]
    assert browser.errors() == []


def test_light_and_dark_are_a_click_apart_for_text_and_figures_and_remembered(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri(), width=1300)
    figures(browser)
    light = browser.ask(LIGHTNESS)
    browser.click("#theme", "Dark")
    dark = browser.ask(LIGHTNESS)
    browser.screenshot("report-dark")
    assert all(value > 200 for value in light)
    assert all(value < 60 for value in dark)
    browser.open(report.as_uri(), width=1300)
    figures(browser)
    assert browser.ask(LIGHTNESS) == dark
    browser.click("#theme", "Light")
    assert browser.ask(LIGHTNESS) == light
    assert browser.errors() == []


@pytest.mark.parametrize("turned", [False, True], ids=["narrow from the start", "narrowed"])
def test_nothing_overflows_on_a_phone(browser: Browser, report: Path, turned: bool) -> None:
    browser.open(report.as_uri(), width=1300 if turned else 360, height=800)
    figures(browser)
    browser.resize(360, 800)
    browser.wait(lambda: browser.ask("document.scrollingElement.scrollWidth <= innerWidth && innerWidth === 360"), "page that fits")
    browser.wait(lambda: all(width <= 360 for width in browser.ask(LEGEND_ENDS)), "legends that fit")
    browser.screenshot(f"report-phone{'-turned' if turned else ''}")
    browser.ask("document.getElementById('figures').scrollIntoView()")
    browser.screenshot(f"report-phone{'-turned' if turned else ''}-figures")
    assert browser.errors() == []


def figures(browser: Browser) -> set[str]:
    """The figures of our page, once each is drawn."""
    browser.wait(lambda: browser.ask(UNDRAWN) == [], "figure that is drawn")
    assert "needs WebGL" not in browser.text
    return set(browser.ask("[...document.querySelectorAll('[id^=figure-]')].map(place => place.id)"))


def own_errors(ui: Browser) -> list[str]:
    """Errors on the console, but for what is not ours: MLflow asks who is logged in, which a server without accounts does not know, and is
    slow to lay out its charts; Chromium may ask for a picture of the site before MLflow's page names one."""
    foreign = ("/mlflow/users/current", "ResizeObserver loop", "/favicon.ico")
    return [line for line in ui.errors() if not any(words in line for words in foreign)]


def sort_order(browser: Browser, column: int) -> str | None:
    return browser.all(f"#comparison th:nth-child({column})")[0].get_attribute("aria-sort")


COLUMN = "#comparison .card:first-of-type tbody td:nth-child({})"
LOADED = """[...document.images].filter(image => image.src.includes(arguments[0]) && image.complete && image.naturalWidth > 100)
  .map(image => [image.naturalWidth, image.naturalHeight])"""
ROWS = "[...document.querySelectorAll('[role=row]')].map(row => [...row.children].map(cell => cell.textContent))"
AXES = """[...document.querySelectorAll('.parcoords .y-axis')].map(axis =>
  [axis.querySelector('.axis-title').textContent, ...[...axis.querySelectorAll('.tick text')].map(tick => tick.textContent)])"""
BETWEEN_AXES = """(() => {
  const [first, ...others] = [...document.querySelectorAll('.parcoords .axis .domain')].map(line => line.getBoundingClientRect());
  return [first.right + 10, first.top, others.at(-1).left - 10, first.bottom];
})()"""
UNDRAWN = """[...document.querySelectorAll('[id^=figure-]')].filter(place =>
  place.querySelectorAll('svg.main-svg').length === 0 || place.clientHeight < 200
  || place.querySelectorAll('.trace, .point, .hm, .heatmaplayer image, canvas.gl-canvas, .js-line').length === 0).map(place => place.id)"""
LIGHTNESS = """[document.body, document.querySelector('.card'), document.querySelector('.main-svg')].map(element =>
  Math.max(...getComputedStyle(element).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)))"""
LEGEND_ENDS = "[...document.querySelectorAll('.legend .bg')].map(legend => legend.getBoundingClientRect().right)"


def fill(sweep: Sweep, plan: TrialPlan, begun_ms: int) -> None:
    """The record of a trial that finished."""
    clock_ms = iter(range(begun_ms, begun_ms + 100 * EPOCH_MS, EPOCH_MS))
    machine = {"python": "3.11.2", "torch": "2.13.0", "device": "CPU", "cpus": "2"}
    record = TrialRecord.open(sweep.store, plan, retention=Retention(), machine=machine, now_ms=lambda: next(clock_ms))
    epochs = plan.config.epochs
    for epoch in range(1, epochs + 1):
        found = measured(plan, epoch, begun_ms + epoch * EPOCH_MS)
        drawn = {epoch: {PREDICTIONS: predictions(plan.config), CONFUSION: confusions(plan)}} if epoch == epochs else {}
        record.commit(
            step=found.step, epoch=epoch, files={"model.safetensors": b"w"}, entries=[found], seconds=47.0 * epoch, pictures=drawn
        )
    record.finish()


def measured(plan: TrialPlan, epoch: int, time_ms: int) -> EpochMetrics:
    found, chance = entry(plan, epoch), random.Random(f"{plan.trial_id} {epoch} machine")
    more: dict[str, Any] = {
        "system/cpu_utilization_percentage": 90 + 8 * chance.random(),
        "system/system_memory_usage_megabytes": 610 + 5 * chance.random(),
        "perf/train_s": 35 + chance.random(),
    }
    return found.model_copy(update={"time_ms": time_ms, "metrics": found.metrics | more})


def predictions(config: TrainConfig) -> bytes:
    """As a network that has learnt nothing yet draws them."""
    return _drawn(config.model_copy(update={"partition": "1/4", "seed": 0}))


@cache
def _drawn(config: TrainConfig) -> bytes:
    data = open_validation(config, Runtime(device="cpu", threads=1))
    torch.manual_seed(0)
    quartet, body = build_networks(config, len(data.classes)), io.BytesIO()
    chosen = spread(4, len(data.val))
    Image.fromarray(panels(quartet, data.val, data.palette, data.classes, config, torch.device("cpu"), indices=chosen)).save(body, "PNG")
    return body.getvalue()


def confusions(plan: TrialPlan) -> bytes:
    chance = random.Random(plan.trial_id)
    counts = [[900 if row == column else chance.randint(0, 60) for column in range(len(CLASSES))] for row in range(len(CLASSES))]
    return json.dumps({"classes": CLASSES, "head": "ensemble", "counts": counts}).encode()
