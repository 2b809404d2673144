"""trial_plan.py: the trials of a sweep, their identities, and that planning needs nothing heavy."""

import subprocess
import sys

import pytest

from orchestration.errors import SpecError
from orchestration.formatting import label
from orchestration.plan.plan_table import render
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand

BASE = {"name": "demo", "preset": "digits"}


def plans_of(**document):
    return expand(check(BASE | document))


def test_a_grid_is_the_product_in_the_order_of_the_file():
    plans = plans_of(grid={"partition": ["1/8", "1/4"], "eps": [0.3, 0.6]})
    assert [plan.label for plan in plans] == ["1/8 eps=0.3", "1/8 eps=0.6", "1/4 eps=0.3", "1/4 eps=0.6"]


def test_every_point_and_cell_runs_with_every_seed():
    plans = plans_of(base={"lambda1": 1}, grid={"eps": [0.3]}, points=[{"eps": 0.4, "lambda1": 2}], seeds=[1, 2])
    values = [(plan.config.eps, plan.config.lambda1, plan.config.seed) for plan in plans]
    assert values == [(0.3, 1, 1), (0.3, 1, 2), (0.4, 2, 1), (0.4, 2, 2)]


def test_a_sweep_without_a_grid_is_one_trial():
    (plan,) = plans_of()
    assert plan.label == "base"


def test_the_identity_follows_the_value_and_not_its_spelling():
    (whole,), (fraction,), (other,) = plans_of(base={"lambda1": 1}), plans_of(base={"lambda1": 1.0}), plans_of(base={"lambda1": 1.5})
    assert whole.trial_id == fraction.trial_id
    assert whole.trial_id != other.trial_id


def test_the_identity_is_stable():
    """A changed identity orphans every finished trial of every user: change it only with a reason in the commit."""
    (plan,) = plans_of()
    assert plan.trial_id == plan.config.digest[:12]
    (again,) = plans_of(name="another")
    assert plan.trial_id == again.trial_id


def test_equal_trials_are_refused_by_name():
    with pytest.raises(SpecError) as caught:
        plans_of(grid={"eps": [0.3]}, points=[{"eps": 0.3}])
    assert caught.value.faults == ["points[0] (eps=0.3): is the same trial as grid (eps=0.3); remove one"]


def test_a_combination_that_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(SpecError) as caught:
        plans_of(grid={"region_kernel": [4, 5]})
    (fault,) = caught.value.faults
    assert fault.startswith("grid (region_kernel=5): region_kernel 5 does not fit: crop 64 gives a conv4 map of 4 x 4 (crop / 16); ")
    assert fault.endswith("set region_kernel <= 4 or crop >= 80")


def test_iterations_follow_the_longer_stream():
    eighth, half = plans_of(grid={"partition": ["1/8", "1/2"]}, base={"epochs": 3, "batch_size": 8, "train_images": 512})
    assert eighth.iterations == 3 * (448 // 8)
    assert half.iterations == 3 * (256 // 8)


def test_a_plan_renders_as_a_table():
    plans = plans_of(grid={"eps": [0.3, 0.6]})
    lines = render(plans, {plans[0].trial_id: "finished"}).splitlines()
    assert lines[0].split() == ["trial", "eps", "epochs", "iterations", "state"]
    assert lines[1].split()[0] == plans[0].trial_id
    assert lines[1].endswith("finished")
    assert lines[2].endswith("new")


def test_a_label_puts_the_partition_first():
    assert label({"eps": 0.6, "partition": "1/8", "drlc": False}) == "1/8 eps=0.6 drlc=false"


def test_planning_imports_nothing_heavy(tmp_path):
    (tmp_path / "s.yaml").write_text("name: demo\npreset: digits\ngrid: {eps: [0.3, 0.6]}\n")
    code = (
        "import sys\nfrom orchestration.cli import main as cli\n"
        "try:\n cli.main(['plan', 's.yaml'])\nexcept SystemExit as end:\n assert end.code == 0, end.code\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'optuna', 'boto3', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_combination_is_compared_with_all_others_that_make_its_trial():
    points = [{"method": "cps", "eps": eps} for eps in (0.3, 0.6, 0.6)] + [{"method": "rrn", "eps": 0.6}]
    with pytest.raises(SpecError, match=r"points\[2\] .*: is the same trial as points\[1\] .*; remove one"):
        expand(check({"name": "x", "preset": "digits", "points": points}))
    points.pop(2)
    first, other = expand(check({"name": "x", "preset": "digits", "points": points}))
    assert (len(first.same_as), other.same_as) == (1, ())


def test_a_fault_of_several_settings_shows_no_whole_configuration():
    with pytest.raises(SpecError) as caught:
        expand(check({"name": "x", "preset": "digits", "base": {"partition_by": "list"}}))
    assert str(caught.value).endswith("partition_by: list and labeled_list need each other")
