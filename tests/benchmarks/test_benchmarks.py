"""The committed results are what the benchmarks make of their numbers, and their sweeps can be planned."""

import importlib.util
import json

import pytest
from places import ROOT

from orchestration.cli.main import main

FOLDER = ROOT / "benchmarks"


def module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_table_of_camvid_follows_from_its_numbers():
    trials = json.loads((FOLDER / "results" / "camvid_table.json").read_text())
    text = (FOLDER / "results" / "camvid_table.md").read_text()
    command, where = text.splitlines()[2].removesuffix(".").split("`, ")
    assert module("camvid_table").table(trials, command=command.strip("`"), where=where) == text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_sweep_of_a_benchmark_can_be_planned(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path)])
    assert end.value.code == 0
    assert "0 of " in capsys.readouterr().out
