"""page.py: one page that needs nothing else, explains its numbers, and shows everything that a user wrote as text."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import pytest
from compared import GRID, MIXED, entry, plausible, swept, trials
from plotly.offline import get_plotlyjs

from orchestration.compare import formats
from orchestration.compare.comparison import compare
from orchestration.compare.notes import notes
from orchestration.compare.page import page, summary
from orchestration.compare.published import reproductions
from orchestration.compare.results import results
from orchestration.plan.spec import Published, PublishedRow
from orchestration.plan.sweep_file import check
from orchestration.sweep import Sweep

HOSTILE = '</script><script>alert("1")</script><b>&amp; <!--'
PUBLISHED = Published(
    source="a paper, Table I",
    rows=[PublishedRow(when={"partition": "1/16"}, value=30.5), PublishedRow(when={"partition": "1/2"}, value=70)],
)


class Page(HTMLParser):
    """What a browser finds: elements with their attributes, their text, and tables as rows of texts."""

    def __init__(self, body: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._inside = ""
        self.feed(body)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self._inside = "" if tag in ("script", "style", "td", "th") else self._inside

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside != "style":
            self.text += data
            if self._inside in ("td", "th", "button") and self.tables and self.tables[-1]:
                self.tables[-1][-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(next(text for kind, text in self.scripts if kind == "application/json"))


def shown(sweep=None, *, numbers: Published | None = None, **options) -> str:
    sweep = sweep or swept()
    found = results([sweep])
    comparison = compare(found, at=options.pop("at", "last"), by=options.pop("by", ("partition",)))
    filled = {"title": "demo", "source": {"command": "rrn-sweep compare demo.yaml"}, "updated": "2026-01-02 03:04 UTC", **options}
    return page(comparison, published=[(numbers, reproductions(numbers, *sweep))] if numbers else [], **filled)


@pytest.fixture(scope="module")
def body() -> str:
    return shown(numbers=PUBLISHED)


@pytest.fixture(scope="module")
def parsed(body) -> Page:
    return Page(body)


def test_the_page_loads_nothing_and_forbids_it(parsed):
    links = [
        value for _, attributes in parsed.elements for name, value in attributes.items() if name in ("src", "href", "srcset", "action")
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.elements}
    (policy,) = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy


def test_the_library_stands_in_the_page_once_and_the_rest_is_small(body, parsed):
    assert body.startswith("<!doctype html>")
    assert [kind for kind, _ in parsed.scripts] == ["application/json", None, None]
    assert body.count(get_plotlyjs()) == 1
    assert len(body) < len(get_plotlyjs()) + 150_000


def test_every_figure_has_its_place_with_title_and_rule_as_text(parsed):
    figures = parsed.data["figures"]
    assert [figure["name"] for figure in figures][-1] == "parallel-coordinates"
    assert [div["id"] for div in parsed.all("div") if (div.get("id") or "").startswith("figure-")] == [
        f"figure-{f['name']}" for f in figures
    ]
    for figure in figures:
        assert figure["title"] in parsed.text
        assert "; ".join(figure["lines"]) in parsed.text
        assert not {"title", "template"} & set(figure["layout"])


def test_the_data_come_with_a_light_and_a_dark_theme_and_without_an_offer_to_send_them_away(parsed):
    assert set(parsed.data["themes"]) == {"light", "dark"}
    assert parsed.data["config"]["showSendToCloud"] is False


def test_everything_that_a_user_wrote_is_shown_as_text():
    sweep = swept({**GRID, "seeds": [0]}, classes=(HOSTILE, "other", "absent"))
    source = {HOSTILE: HOSTILE, "file": f"first\n{HOSTILE}"}
    numbers = Published(source=HOSTILE, rows=[PublishedRow(when={"eps": 0.2}, value=1, name=HOSTILE)])
    body = shown(sweep, numbers=numbers, title=HOSTILE, source=source, updated=HOSTILE)
    parsed = Page(body)
    assert len(parsed.scripts) == 3
    assert not parsed.all("b")
    # title of window and page, updated, name and value of the source, file, where it was published, its row of either partition
    assert parsed.text.count(HOSTILE) == 9
    names = [figure["data"][0]["y"][0] for figure in parsed.data["figures"] if figure["name"] == "classes"]
    assert names == [HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")]


def test_every_table_sorts_by_a_button_in_each_heading(parsed):
    headings = [attributes for tag, attributes in parsed.elements if tag == "th"]
    assert headings
    assert all(heading["aria-sort"] == "none" and heading["scope"] == "col" for heading in headings)
    follows = [after[0] for (tag, _), after in itertools.pairwise(parsed.elements) if tag == "th"]
    assert set(follows) == {"button"}
    assert all(region["tabindex"] == "0" for region in parsed.all("div") if region.get("role") == "region")


def test_numbers_sort_as_numbers_whatever_their_text(body):
    assert '<td class="n" data-order="8">8/8</td>' in body
    assert '<td class="n" data-order="0.2">0.2</td>' in body
    assert "<td>1/16</td>" in body


def test_the_comparison_is_a_table_a_group_with_its_rule_beside(parsed):
    first, second, published, every = parsed.tables
    head = ["cell", "mean", "sd", "difference", "95 % interval", "p (Holm)", "P(better)", "by seed"]
    assert first[0] == second[0] == head
    assert [row[0] for row in first[1:]] == ["eps=0.2", "eps=0.4", "eps=0.6"]
    plans = {plan.label: plan for plan in swept()[0]}
    low, high = ([100 * plausible(plans[f"1/16 eps={eps} seed {seed}"], 8) for seed in range(3)] for eps in (0.2, 0.4))
    assert first[2][1] == f"{sum(high) / 3:.2f}"
    assert first[2][3] == f"{(sum(high) - sum(low)) / 3:+.2f}".replace("-", "−")
    assert first[2][4] == "–"
    assert first[2][7] == ", ".join(f"{value:.2f}" for value in high)
    assert first[1][3:] == ["baseline", "–", "–", "–", first[1][7]]
    note = "mIoU (%) on the validation list of digits after the last epoch; mean and sample standard deviation over seeds 0, 1, 2"
    assert f"{note}; differences from eps=0.2" in parsed.text
    assert len(published) == 1 + 4
    assert len(every) == 1 + 18


def test_the_notes_of_the_numbers_are_on_the_page(parsed):
    found = notes(compare(trials()))
    assert found
    assert all(note in parsed.text for note in found)


def test_published_numbers_stand_beside_ours_of_each_kind_that_fits(parsed):
    head, *rows = parsed.tables[2]
    assert head == ["row", "metric", "published", "ours: last", "difference", "ours: highest", "difference", "seeds"]
    assert [row[0] for row in rows] == ["1/16 eps=0.2", "1/16 eps=0.4", "1/16 eps=0.6", "1/2"]
    values = [100 * entry(plan, 8).metrics["val/miou"] for plan in swept()[0][:3]]
    ours = sum(values) / 3
    assert rows[0][2] == "30.50"
    assert rows[0][3].startswith(f"{ours:.2f} ± ")
    assert rows[0][4] == f"{ours - 30.5:+.2f}".replace("-", "−")
    assert rows[3] == ["1/2", "mIoU", "70.00", *"–––––"]
    assert "Published: a paper, Table I." in parsed.text


def test_every_trial_is_listed_also_one_that_failed_and_one_that_never_began():
    some = swept({"grid": {"eps": [0.2, 0.4, 0.6]}, "base": {"epochs": 8}}, epochs=lambda plan: {0.2: 8, 0.4: 3, 0.6: 0}[plan.config.eps])
    every = Page(shown(some, plotly_js=False)).tables[-1]
    assert every[0] == ["trial_id", "eps", "seed", "state", "completed", "last", "best", "at epoch"]
    assert [row[1:5] for row in every[1:]] == [
        ["0.2", "0", "finished", "8/8"],
        ["0.4", "0", "failed (memory) at epoch 3", "3/8"],
        ["0.6", "0", "new", "0/8"],
    ]
    assert every[2][5:] == [f"{100 * plausible(some[0][1], 3):.2f}"] * 2 + ["3"]
    assert every[3][5:] == ["–", "–", "–"]


def test_a_setting_that_the_method_does_not_have_is_a_dash():
    parsed = Page(shown(swept({**MIXED, "base": {"epochs": 1}}), plotly_js=False))
    first, *_, every = parsed.tables
    assert [row[0] for row in first[1:4]] == ["method=supervised", "method=cps", "method=rrn eps=0.2"]
    assert every[0][:4] == ["trial_id", "method", "partition", "eps"]
    assert {(row[1], row[3]) for row in every[1:]} == {("supervised", "–"), ("cps", "–"), ("rrn", "0.2"), ("rrn", "0.4"), ("rrn", "0.6")}
    assert not [text for row in every for text in row if "None" in text]


def test_every_column_says_what_it_holds(parsed):
    assert all(heading["title"] for tag, heading in parsed.elements if tag == "th")


def test_the_summary_counts_finished_trials_and_names_the_best_and_what_the_seeds_can_show():
    def score(plan, epoch: int) -> float:
        return 0.3 + plan.config.eps / 10 + plan.config.seed / 100

    found = trials(score=score, epochs=lambda plan: 8 - 4 * (plan.config.partition == "1/4" and plan.config.eps == 0.6))
    assert summary(compare(found)) == [
        "15 of 18 trials of demo finished, 3 failed.",
        "1/16: eps=0.6 is highest with 37.00 ± 1.00 % mIoU after the last epoch (seeds 0, 1, 2); +4.00 from eps=0.2"
        " (p = 0.750 after Holm's correction).",
        "1/4: eps=0.4 is highest with 35.00 ± 1.00 % mIoU after the last epoch (seeds 0, 1, 2); +2.00 from eps=0.2"
        " (p = 0.750 after Holm's correction).",
        "None of 3 differences from a baseline is significant at 5 % after Holm's correction.",
        "With 3 seeds no difference can be significant at 5 % (the smallest possible p is 0.25, 0.75 after Holm's correction over"
        " 3 comparisons); 7 are needed.",
    ]


def test_the_summary_counts_what_is_significant_and_gives_its_interval():
    document = {"grid": {"eps": [0.2, 0.4]}, "seeds": [*range(8)], "base": {"epochs": 1}}
    found = trials(document, score=lambda plan, epoch: 0.3 + plan.config.eps / 10 * (1 + 0.01 * plan.config.seed))
    _, best, claim, possible = summary(compare(found, by=()))
    assert best.startswith(
        "eps=0.4 is highest with 34.14 ± 0.10 % mIoU after the last epoch (seeds 0 to 7); +2.07 from eps=0.2 (95 % interval ["
    )
    assert claim == "1 of 1 differences from a baseline is significant at 5 % after Holm's correction."
    assert possible.startswith("With 8 seeds the smallest possible p is")


def test_of_a_loss_the_lowest_is_best():
    found = trials({"grid": {"eps": [0.2, 0.4]}, "base": {"epochs": 2}})
    comparison = compare(found, by=(), metric="train/loss")
    values = {cell.label: cell.values[0] for cell in comparison.groups[0].cells}
    assert f"{min(values, key=values.__getitem__)} is lowest with" in summary(comparison)[1]


def test_without_the_library_there_are_only_tables():
    parsed = Page(shown(plotly_js=False))
    assert parsed.data["figures"] == []
    assert not parsed.all("figure")
    assert [kind for kind, _ in parsed.scripts] == ["application/json", None]


def test_a_sweep_that_has_not_begun_has_a_page():
    body = shown(swept(epochs=lambda plan: 0))
    parsed = Page(body)
    assert "0 of 18 trials of demo finished, 18 new." in parsed.text
    assert len(body) < 100_000
    assert not [link for link in parsed.all("a") if link["href"] in ("#comparison", "#figures", "#published")]


def test_how_to_reproduce_it_keeps_the_lines_of_a_file():
    body = shown(source={"command": "rrn-sweep compare a.yaml", "a.yaml": "name: a\nseeds: [0]\n"}, plotly_js=False)
    assert "<code>rrn-sweep compare a.yaml</code>" in body
    assert "<pre>name: a\nseeds: [0]\n</pre>" in body


def test_headings_go_down_one_level_at_a_time_and_every_link_has_its_target(parsed):
    levels = [int(tag[1]) for tag, _ in parsed.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    targets = {attributes.get("id") for _, attributes in parsed.elements}
    assert {link["href"][1:] for link in parsed.all("a")} <= targets
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")


def test_a_wrong_clock_of_a_node_does_not_prevent_the_page():
    plans, manifests = swept({"base": {"epochs": 1}})
    ahead = {trial_id: manifest.model_copy(update={"updated_ms": 10**17}) for trial_id, manifest in manifests.items()}
    sweep = Sweep(Path("demo.yaml"), check({"name": "demo", "preset": "digits"}), Mock(), "", Mock(), plans, ahead, [])
    assert "an unknown time" in Page(formats.rendered(formats.compared([sweep]), [sweep], "html", source={}).decode()).text
