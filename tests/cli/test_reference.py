"""reference.py, init and list: pages that are true, shipped sweeps that run elsewhere, and suggestions at every level."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from finished import train
from places import ROOT

from orchestration.cli.main import main
from orchestration.cli.reference import PAGES
from orchestration.cli.sweep_commands import shipped_sweeps
from orchestration.plan.sweep_file import load
from orchestration.plan.trial_plan import expand
from orchestration.store.open import open_store
from rrn_core.methods import METHODS, all_settings


def output(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    found = capsys.readouterr()
    return end.value.code, found.out, found.err


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says(name, pytestconfig):
    page, text = ROOT / "docs" / name, PAGES[name]()
    if pytestconfig.getoption("--write-golden"):
        page.write_text(text)
    assert page.is_file(), "a generated page is missing: make golden"
    assert text == page.read_text()


def test_every_setting_has_a_description_and_stands_on_its_page():
    page = PAGES["settings.md"]()
    for name, field in all_settings().items():
        assert field.description, name
        assert f"### `{name}`" in page


def test_every_key_of_a_sweep_file_has_a_description():
    lines = [line for line in PAGES["sweep-file.md"]().splitlines() if line.startswith("- `")]
    assert len(lines) > 50
    assert all(": " in line for line in lines)


def test_settings_are_printed_in_short_by_method_and_one_in_full(capsys):
    assert "eps" in output(capsys, "settings")[1]
    code, text, _ = output(capsys, "settings", "supervised")
    assert code == 0
    assert "lr" in text
    assert "eps" not in text
    code, text, _ = output(capsys, "settings", "eps")
    assert "number > 0 and < 1; default 0.6; method rrn" in text
    assert "Threshold of the region-consistency map" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("settings", "epss"), 'epss: neither a setting nor a method; did you mean "eps"?'),
        (("statsu", "x.yaml"), 'statsu: neither a command nor a sweep file; did you mean "status"?'),
        (("init", "epsilon_gird"), 'epsilon_gird: no shipped sweep has this name; did you mean "epsilon_grid"?'),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(capsys, words, line):
    code, _, err = output(capsys, *words)
    assert code == 2
    assert err.startswith(line)


@pytest.mark.parametrize(
    ("text", "change", "line"),
    [
        ("name: s\npreset: digits\nepochs: 3\n", None, "s.yaml: epochs: is a setting: put it under base:"),
        ("name: s\npreset: digits\n", "epoch=3", 's.yaml: epoch: unknown key; did you mean "epochs"?'),
        ("name: s\npreset: digits\ntrials: 3\n", None, 's.yaml: trials: unknown key; did you mean "search.trials"?'),
        ("name: s\npreset: digits\nbase: {epoch: 3}\n", None, 's.yaml: base.epoch: unknown setting; did you mean "epochs"?'),
        (
            "name: s\npreset: digits\nbase: {method: rnn}\n",
            None,
            f'base.method: must be one of {", ".join(METHODS)}, got "rnn"; did you mean "rrn"?',
        ),
        ("name: s\nbase: {method: cps, eps: 0.3}\n", None, "s.yaml: base.eps: method cps has no such setting; rrn has it"),
        ("name: s\nresources: {gpus: 1}\n", None, 's.yaml: resources.gpus: unknown key; did you mean "gpu"?'),
    ],
)
def test_a_fault_of_a_sweep_file_says_what_was_meant(tmp_path, monkeypatch, capsys, text, change, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(text)
    code, _, err = output(capsys, "plan", "s.yaml", *(["--set", change] if change else []))
    assert code == 2
    assert line in err


def test_the_version_is_that_of_the_package(capsys):
    assert output(capsys, "--version")[1].strip() == f"rrn-sweep {version('rrn-sweep')}"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(capsys, shell):
    text = output(capsys, "completion", shell)[1]
    assert "compare" in text
    assert "--take-over" in text
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


class TestInit:
    def test_it_writes_a_shipped_sweep_that_can_be_planned(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert output(capsys, "init")[:2] == (0, "epsilon_grid.yaml written; run it with: rrn-sweep epsilon_grid.yaml\n")
        assert (tmp_path / "epsilon_grid.yaml").read_text() == (ROOT / "sweeps" / "epsilon_grid.yaml").read_text()
        code, text, _ = output(capsys, "plan", "epsilon_grid.yaml")
        assert code == 0
        assert "0 of 8 finished" in text

    def test_a_file_that_is_there_stays(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "epsilon_grid.yaml").write_text("mine")
        code, _, err = output(capsys, "init", "epsilon_grid.yaml")
        assert code == 2
        assert "exists already" in err
        assert (tmp_path / "epsilon_grid.yaml").read_text() == "mine"

    def test_the_list_names_every_shipped_sweep(self, capsys):
        text = output(capsys, "init", "--list")[1]
        assert [line.split()[0] for line in text.splitlines()] == list(shipped_sweeps())


def test_list_counts_the_trials_of_every_sweep_by_state(tmp_path, capsys):
    store = open_store(str(tmp_path / "store"))
    assert "no sweep yet" in output(capsys, "list", "--store", str(tmp_path / "store"))[1]
    for name in ("a", "b"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"name: {name}\npreset: digits\ngrid: {{eps: [0.3, 0.6]}}\n")
        first, second = expand(load(file))
        train(store, first, [0.5])
        train(store, second, [0.4], finished=False)
    rows = [line.split() for line in output(capsys, "list", "--store", str(tmp_path / "store"))[1].splitlines()]
    assert rows == [["sweep", "trials", "interrupted", "finished"], ["a", "2", "1", "1"], ["b", "2", "1", "1"]]


DUMMY = """
import json, sys
from typing import Annotated
from pydantic import Field, create_model
from rrn_core.methods import rrn
from rrn_core.setting import Setting

facts = Setting("objective", changes_cost=False, data="view", headline=True, neutral=0)
rrn.Settings = create_model("Settings", __base__=rrn.Settings, dummy=(Annotated[int, facts, Field(description="Does nothing.")], 0))

from orchestration.cli.reference import PAGES
from orchestration.plan.plan_table import render
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.preflight.check import data_settings
from orchestration.preflight.estimate import cost_group
from orchestration.record.manifest import Manifest
from orchestration.tracking.run_content import run_content

before, after = expand(check({"name": "s", "preset": "digits", "grid": {"dummy": [0, 1]}}))
known = {"sweep": "s", "trial_id": before.trial_id, "label": "l", "varied": (), "iterations": 1, "created_ms": 0, "updated_ms": 0}
content = run_content(Manifest(config=before.config.model_dump(mode="json"), **known), store="", live=False)
print(json.dumps({
    "plan": render([before, after]), "params": content.params, "page": PAGES["settings.md"](), "identity": before.trial_id,
    "checked": "dummy" in data_settings(before.config), "same cost": cost_group(before.config) == cost_group(after.config),
}))
"""


def test_a_new_setting_is_one_edit():
    """Declared at one place, it is in the plan, the check, MLflow's parameters, the estimate and the reference."""
    done = subprocess.run([sys.executable, "-c", DUMMY], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (unchanged,) = expand(load(ROOT / "sweeps" / "epsilon_grid.yaml", overrides=["name=s", 'grid={"eps": [0.6]}']))
    assert found["identity"] == unchanged.trial_id
    assert found["plan"].split()[:2] == ["trial", "dummy"]
    assert found["params"]["dummy"] == "0"
    assert "### `dummy`" in found["page"]
    assert found["checked"]
    assert found["same cost"]
