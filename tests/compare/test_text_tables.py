"""text_tables.py, long_table.py: a comparison for the terminal, for papers and for other programs."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess

import pyarrow.parquet as pq
import pytest
from compared import MIXED, trials
from finished import train

from orchestration.compare.comparison import Comparison, compare
from orchestration.compare.long_table import _cell, as_csv, as_parquet, long_table
from orchestration.compare.notes import notes
from orchestration.compare.results import results
from orchestration.compare.text_tables import as_latex, as_markdown, as_mlflow_table, as_text
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import read_manifests
from orchestration.store.open import open_store


@pytest.fixture
def made(tmp_path):
    """A comparison of finished trials, from the rows of a sweep file and the epochs of its trials in their order."""
    store = open_store(str(tmp_path / "store"))

    def make(epochs, *, metric="val/miou", by=("partition",), at="last", **document) -> Comparison:
        plans = expand(check({"name": "demo", "preset": "digits", **document}))
        for plan, given in zip(plans, epochs, strict=True):
            if given:
                train(store, plan, given)
        return compare(results([(plans, read_manifests(store, "demo"))]), metric=metric, by=by, at=at)

    return make


@pytest.fixture
def six(made) -> Comparison:
    """Two partitions, two values of eps, six seeds; eps=0.4 is better in 1/8 and has not begun in 1/4."""
    scores = [0.5, 0.501, 0.502, 0.503, 0.504, 0.505]
    better = [0.51, 0.512, 0.513, 0.514, 0.516, 0.519]
    epochs = [[[0.1, score]] for score in (*scores, *better, *scores)]
    grid = {"partition": ["1/8", "1/4"], "eps": [0.2, 0.4]}
    return made([given[0] for given in epochs] + [None] * 6, grid=grid, seeds=list(range(6)))


def rows(comparison: Comparison) -> list[dict]:
    """The long table by rows."""
    columns = long_table(comparison)
    return [dict(zip(columns, values, strict=True)) for values in zip(*(values for _, values in columns.values()), strict=True)]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_a_cell_of_a_csv_is_no_formula_and_a_negative_number_stays_one(made, start):
    found = made([[0.1, 0.5], None], grid={"init_weights": [f"{start}HYPERLINK(1)", "a"]})
    trained = next(iter(found.results)).trial_id
    row = next(row for row in csv.DictReader(io.StringIO(as_csv(found))) if trained in row.values())
    assert row["init_weights"] == f"'{start}HYPERLINK(1)"
    assert not any(cell.startswith(start) for cell in row.values())
    assert (_cell(-1.5), _cell(-2), _cell("a")) == ("-1.5", "-2", "a")


def test_the_terminal_shows_a_block_for_each_group_with_the_rule_above_and_the_notes_below(six):
    title, first, second, below = as_text(six).split("\n\n")
    assert title == "mIoU (%) after the last epoch"
    assert [re.split(r" {2,}", line) for line in first.splitlines()] == [
        ["1/8"],
        ["cell", "seeds", "mean", "sd", "difference", "95 % interval", "p", "p (Holm)", "P(better)"],
        ["eps=0.2", "6", "50.25", "0.19", "baseline", *"----"],
        ["eps=0.4", "6", "51.40", "0.32", "+1.15", "[+1.03, +1.35]", "0.031", "0.031", "100 % of 6"],
    ]
    assert second.splitlines()[3].split() == ["eps=0.4", "0", *"-------"]
    assert below.splitlines() == list(notes(six))


def test_columns_of_all_blocks_stand_below_each_other(six):
    _, first, second, _ = as_text(six).split("\n\n")
    assert first.splitlines()[1] == second.splitlines()[1]
    assert first.splitlines()[2].index("baseline") == second.splitlines()[2].index("baseline")


def test_markdown_has_one_table_with_the_best_mean_of_each_group_in_bold(six):
    _, table, below = as_markdown(six).split("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert lines[0] == ["partition", "cell", "seeds", "mean ± sd", "difference", "95 % interval", "p", "p (Holm)", "P(better)"]
    assert lines[2][:5] == ["1/8", "eps=0.2", "6", "50.25 ± 0.19", "baseline"]
    assert lines[3][:5] == ["1/8", "eps=0.4", "6", "**51.40 ± 0.32**", "+1.15"]
    assert lines[4][3] == "50.25 ± 0.19"  # alone in its group
    assert {len(line) for line in lines if line[0] != "---"} == {9}
    assert below.splitlines() == [f"- {note}" for note in (*notes(six), "bold: the best mean of its group, significant or not")]


def test_of_a_loss_the_lowest_mean_is_the_best_and_equal_ones_are_all_bold(made):
    losses = [[{"train/loss": value}] for value in (2.0, 1.0, 1.00001)]
    text = as_markdown(made(losses, metric="train/loss", by=(), grid={"eps": [0.2, 0.4, 0.6]}))
    assert re.findall(r"\| (eps=\S+) \| 1 \| (\S+)", text) == [("eps=0.2", "2"), ("eps=0.4", "**1**"), ("eps=0.6", "**1**")]
    assert "−1" in text


def test_latex_is_a_booktabs_table_whose_caption_says_how_it_was_measured(six):
    text = as_latex(six)
    rows = [line.strip().removesuffix(" \\\\").split(" & ") for line in text.splitlines() if line.endswith("\\\\")]
    assert {len(row) for row in rows} == {9}
    assert rows[2][3:6] == ["\\textbf{51.40 $\\pm$ 0.32}", "+1.15", "{[}+1.03, +1.35{]}"]
    assert text.count("\\midrule") == 2
    assert "\\begin{tabular}{llrrrrrrr}" in text
    (caption,) = re.findall(r"\\caption\{(.*)\}", text)
    assert "Checkpoint: val/miou after the last epoch of each finished trial" in caption
    assert "partition\\_by: every\\_kth" in caption


@pytest.mark.parametrize("by", [("partition",), ()])
def test_latex_text_is_escaped_and_its_braces_and_dollars_are_balanced(made, by):
    text = as_latex(made([[0.5], [0.4]], by=by, grid={"drlc_weighting": ["eq3_mean_all", "eq3_mean_selected"]}))
    body = "\n".join(text.splitlines()[1:])
    assert "drlc\\_weighting=eq3\\_mean\\_all" in body
    assert not re.search(r"(?<!\\)[_%#^]", body)
    assert len(re.findall(r"(?<!\\)\{", body)) == len(re.findall(r"(?<!\\)\}", body))
    assert body.count("$") % 2 == 0
    assert "$-$10.00" in body


def test_latex_compiles(six, tmp_path):
    (tmp_path / "table.tex").write_text(
        f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{as_latex(six)}\n\\end{{document}}"
    )
    try:
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "table.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no pdflatex")
    assert done.returncode == 0, done.stdout


def test_the_long_form_has_a_row_a_trial_with_its_settings_value_rule_epoch_and_split(six):
    found = rows(six)
    assert len(found) == 24
    first = found[0]
    assert (first["sweep"], first["group"], first["cell"], first["seed"]) == ("demo", "1/8", "eps=0.2", 0)
    assert (first["checkpoint"], first["epoch"], first["metric"], first["unit"]) == ("last", 2, "val/miou", "%")
    assert (first["value"], first["val/miou"]) == (50.0, 0.5)
    assert (first["partition"], first["eps"], first["method"], first["scales"]) == ("1/8", 0.2, "rrn", "[0.8, 1.0, 1.25]")
    assert (first["split_sha256"], first["state"]) == (None, "finished")
    assert (found[-1]["state"], found[-1]["value"], found[-1]["epoch"], found[-1]["val/miou"]) == ("new", None, None, None)
    assert all(list(row) == list(first) for row in found)
    assert len({row["trial_id"] for row in found}) == 24


def test_csv_says_the_same(six):
    found = list(csv.DictReader(io.StringIO(as_csv(six))))
    assert [{name: float(row[name]) for name in ("value", "eps", "seed", "epoch")} for row in found[:12]] == [
        {name: float(row[name]) for name in ("value", "eps", "seed", "epoch")} for row in rows(six)[:12]
    ]
    assert (found[0]["drlc"], found[0]["split_val"], found[-1]["value"]) == ("True", "", "")


def test_parquet_comes_back_with_types_rule_and_notes(six):
    table = pq.read_table(io.BytesIO(as_parquet(six)))
    assert table.to_pylist() == rows(six)
    assert {name: str(table.schema.field(name).type) for name in ("value", "epoch", "seed", "drlc", "partition")} == {
        "value": "double",
        "epoch": "int64",
        "seed": "int64",
        "drlc": "bool",
        "partition": "string",
    }
    assert table.schema.metadata[b"notes"].decode().splitlines() == list(notes(six))


def test_a_setting_that_is_a_number_here_and_a_word_there_is_a_text_in_parquet(made):
    found = made([[0.5], [0.4], [0.3]], grid={"feature_pool": ["auto", "global", 4]})
    assert pq.read_table(io.BytesIO(as_parquet(found)))["feature_pool"].to_pylist() == ["auto", "global", "4"]


def test_a_setting_that_only_some_methods_have_is_in_their_labels_alone_and_empty_in_files():
    found = compare(trials({**MIXED, "base": {"epochs": 1}}))
    labels = ["method=supervised", "method=cps", *(f"method=rrn eps={eps}" for eps in (0.2, 0.4, 0.6))]
    _, first, *_ = as_text(found).split("\n\n")
    assert [re.split(r" {2,}", line)[0] for line in first.splitlines()] == ["1/8", "cell", *labels]
    assert [line.split(" | ")[1] for line in as_markdown(found).splitlines()[4:14]] == 2 * labels
    assert [row["eps"] for row in csv.DictReader(io.StringIO(as_csv(found)))] == 2 * [*[""] * 4, *["0.2"] * 2, *["0.4"] * 2, *["0.6"] * 2]
    table = pq.read_table(io.BytesIO(as_parquet(found)))
    assert (str(table.schema.field("eps").type), table["eps"].to_pylist()[3:5]) == ("double", [None, 0.2])


def test_every_column_is_described_in_parquet(six):
    schema = pq.read_table(io.BytesIO(as_parquet(six))).schema
    assert all(schema.field(name).metadata[b"description"] for name in schema.names)
    assert b"Threshold" in schema.field("eps").metadata[b"description"]


def test_mlflow_heads_the_means_with_the_checkpoint_rule(six):
    shown = json.loads(as_mlflow_table(six))
    assert shown["columns"] == [
        *("partition", "cell", "seeds", "mIoU (%) after the last epoch"),
        *("difference", "95 % interval", "p", "p (Holm)", "P(better)"),
    ]
    assert shown["data"][1] == ["1/8", "eps=0.4", "6", "51.40 +- 0.32", "+1.15", "[+1.03, +1.35]", "0.031", "0.031", "100 % of 6"]
    assert len(shown["data"]) == 4


def test_an_empty_comparison_is_an_empty_table_in_every_form():
    empty = compare([])
    assert as_text(empty).startswith("mIoU (%) after the last epoch")
    assert "\\toprule" in as_latex(empty)
    assert as_markdown(empty).count("\n| --- |") == 1
    assert as_csv(empty).strip() == ""
    assert pq.read_table(io.BytesIO(as_parquet(empty))).num_rows == 0
