"""live.py and status.py: the live table, the lines of a log, and the summary at the end."""

from __future__ import annotations

import io

from finished import manifest_of
from rich.console import Console

from orchestration.observe import status
from orchestration.observe.events import Event, TrialProgress
from orchestration.observe.live import LiveView
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import EpochMetrics, Manifest
from orchestration.record.trial_state import TrialState

PLANS = expand(check({"name": "demo", "preset": "digits", "grid": {"partition": ["1/8"], "eps": [0.3, 0.6, 0.7]}}))


def update(plan, **changes) -> TrialProgress:
    known = {"attempt": 1, "resumed_step": None, "epoch": 2, "epochs": 5, "iteration": 40, "iterations": 100}
    return TrialProgress(trial_id=plan.trial_id, **(known | {"loss": 1.25, "miou": 0.321, "eta_s": 75.0} | changes))


def screen(view: LiveView) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(view.render())
    return console.file.getvalue()


def test_the_table_counts_the_trials_and_shows_each_running_one():
    view = LiveView(Console(file=io.StringIO(), width=100), total=3, finished=0)
    first, second, _ = PLANS
    view(Event(first, TrialState.RUNNING))
    view(Event(second, TrialState.RUNNING))
    view(Event(first, TrialState.RUNNING, update(first)))
    text = screen(view)
    assert "3 trials: 1 waiting, 2 running, 0 finished, 0 failed" in text
    (line,) = [line for line in text.splitlines() if "eps=0.3" in line]
    assert [word for word in line.split() if "━" not in word] == ["1/8", "eps=0.3", "2/5", "1.250", "0.321", "1:15"]
    view(Event(first, TrialState.FINISHED))
    view(Event(second, TrialState.FAILED, reason="ValueError: no"))
    assert "3 trials: 1 waiting, 0 running, 1 finished, 1 failed" in screen(view)


def test_a_log_gets_plain_lines_for_events():
    console = Console(file=io.StringIO(), width=200)
    view = LiveView(console, total=3, finished=1)
    plan = PLANS[1]
    view(Event(plan, TrialState.RUNNING))
    view(Event(plan, TrialState.RUNNING, update(plan, attempt=2, resumed_step=40, note="checkpoint of step 60 is unusable")))
    view(Event(plan, TrialState.RESTARTING, reason="worker lost: killed"))
    view(Event(plan, TrialState.FINISHED))
    text = console.file.getvalue()
    assert "\x1b" not in text
    for line in (
        "[1/3 finished] 1/8 eps=0.6: started",
        "1/8 eps=0.6: checkpoint of step 60 is unusable",
        "1/8 eps=0.6: resumed at epoch 2 of 5 (step 40)",
        "1/8 eps=0.6: epoch 2/5, loss 1.250, mIoU 0.321, 1:15 left",
        "1/8 eps=0.6: worker lost: killed; restarting from the last checkpoint",
        "[2/3 finished] 1/8 eps=0.6: finished, mIoU 0.321",
    ):
        assert line in text


def manifest(plan, *, status: str, mious=(), reason=None) -> Manifest:
    heads = ("", "_branch1", "_branch2", "_ensemble")
    history = [
        EpochMetrics(epoch=n, step=n, time_ms=n, metrics={f"val/miou{head}": miou for head in heads})
        for n, miou in enumerate(mious, start=1)
    ]
    return manifest_of(plan, seconds=61.0, status=status, reason=reason, history=tuple(history))


def test_the_summary_lists_failures_first_and_separates_last_from_best():
    finished, failed, new = PLANS
    known = [manifest(finished, status="finished", mious=(0.1, 0.5, 0.4)), manifest(failed, status="failed", reason="ValueError: no")]
    states = dict(zip((plan.trial_id for plan in PLANS), (TrialState.FINISHED, TrialState.FAILED, TrialState.NEW), strict=True))
    lines = status.summary(PLANS, {m.trial_id: m for m in known}, states).splitlines()
    assert lines[0] == f"FAILED {failed.trial_id} 1/8 eps=0.6: ValueError: no"
    assert lines[2].split() == [finished.trial_id, "1/8", "0.3", "finished", "3/5", *["40.0"] * 3, *["50.0"] * 3, "2", "1:01"]
    assert lines[3].split()[3:5] == ["failed", "0/5"]
    assert lines[4].split()[:5] == [new.trial_id, "1/8", "0.7", "new", "0/5"]
