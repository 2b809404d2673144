"""Every shipped sweep file has a golden plan, so that none can rot: `make golden` writes them."""

import pytest
from places import ROOT

from orchestration.cli.main import main

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


def test_there_are_sweeps():
    assert {"epsilon_grid", "lambda_tpe", "camvid_epsilon"} <= {path.stem for path in SWEEPS}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_plans_what_its_golden_plan_says(path, tmp_path, monkeypatch, capsys, pytestconfig):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RRN_STORE", raising=False)
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path)])
    assert end.value.code == 0
    plan = capsys.readouterr().out
    golden = ROOT / "tests" / "plan" / "plans" / f"{path.stem}.txt"
    if pytestconfig.getoption("--write-golden"):
        golden.write_text(plan)
    assert golden.is_file(), "a new sweep needs a golden plan: make golden"
    assert plan == golden.read_text()


def test_no_golden_plan_outlives_its_sweep():
    assert {path.stem for path in (ROOT / "tests" / "plan" / "plans").iterdir()} == {path.stem for path in SWEEPS}
