"""live.py and status.py: the live table, the lines of a log, and the summary at the end."""

from __future__ import annotations

import io
import os
import sys
import threading
import time

import pytest
from finished import manifest_of
from screen import terminal

from orchestration.observe import status
from orchestration.observe.events import Event, TrialProgress
from orchestration.observe.live import LiveView
from orchestration.observe.terminal import SharedTerminal
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import EpochMetrics, Manifest
from orchestration.record.trial_state import TrialState

PLANS = expand(check({"name": "demo", "preset": "digits", "grid": {"partition": ["1/8"], "eps": [0.3, 0.6, 0.7]}}))


def update(plan, **changes) -> TrialProgress:
    known = {"attempt": 1, "resumed_step": None, "epoch": 2, "epochs": 5, "iteration": 40, "iterations": 100}
    return TrialProgress(**(known | {"loss": 1.25, "miou": 0.321, "eta_s": 75.0} | changes))


def screen(view: LiveView) -> str:
    console = SharedTerminal(width=100, file=io.StringIO())
    console.print(view.render())
    return console.file.getvalue()


def test_the_table_counts_the_trials_and_shows_each_running_one():
    view = LiveView(SharedTerminal(file=io.StringIO(), width=100), total=3, finished=0)
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
    console = SharedTerminal(file=io.StringIO(), width=200)
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


@pytest.mark.parametrize("columns", [80, 160])
def test_no_event_line_is_lost_while_the_table_is_redrawn(columns, monkeypatch):
    plans = expand(check({"name": "demo", "preset": "digits", "grid": {"eps": [n / 100 for n in range(1, 61)]}}))
    monkeypatch.setattr("orchestration.observe.live.REDRAW_EVERY_S", 0.0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with terminal(columns) as (descriptor, screen), os.fdopen(os.dup(descriptor), "w") as file:
            console = SharedTerminal(file=file, force_terminal=True, width=columns, height=screen.rows)
            view = LiveView(console, total=len(plans), finished=0)
            with view:
                thread = threading.Thread(target=lambda: [view(Event(plan, TrialState.RUNNING)) for plan in plans])
                thread.start()
                for n in range(60):
                    print(f"line {n} of another part of the program")
                thread.join(60)
                for plan in plans:
                    view(Event(plan, TrialState.RUNNING, update(plan)))
                    view(Event(plan, TrialState.FAILED, reason=f"KeyError: {plan.trial_id}"))
                time.sleep(0.01)
    finally:
        sys.setswitchinterval(before)
    for plan in plans:
        assert sum(line.endswith(f" {plan.label}: started") for line in screen.lines) == 1, screen.lines
        assert sum(line.endswith(f" {plan.label}: failed: KeyError: {plan.trial_id}") for line in screen.lines) == 1, screen.lines
    for n in range(60):
        assert f"line {n} of another part of the program" in screen.lines


def test_a_reason_from_elsewhere_is_one_line_and_controls_no_terminal():
    console = SharedTerminal(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    view = LiveView(console, total=3, finished=0, notes=lambda: ["a\x1b[2Jnote"])
    view(Event(PLANS[0], TrialState.FAILED, reason="\x1b[31mKeyError\n12:00:00 all finished\u202e"))
    console.print(view.render())
    text = console.file.getvalue()
    assert r"1/8 eps=0.3: failed: \x1b[31mKeyError\n12:00:00 all finished\u202e" in text
    assert not {"\x1b", "\u202e"} & set(text)
    assert text.count("all finished") == 1
    console.print("raw \x1b]0;title\x07")
    assert "\x1b" not in console.file.getvalue()


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
