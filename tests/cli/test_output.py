"""output.py: what happens to a command whose reader is gone, whose disk is full, or whose terminal cannot write a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from places import ROOT
from screen import terminal
from small_sweep import SMALL

from orchestration.plan.spec import Retention
from orchestration.record.trial_record import TrialRecord
from orchestration.store.open import open_store
from orchestration.sweep import open_sweep

COMMAND = f"PYTHONPATH={ROOT} {sys.executable} -m orchestration.cli"
LOST = ("| head -1", "| true", "> /dev/full", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full 2> /dev/full", "1< /dev/null")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def shell(line: str, here: Path, **environment: str) -> subprocess.CompletedProcess:
    """What bash makes of `rrn-sweep LINE`; the exit code is that of rrn-sweep."""
    words = ["bash", "-c", f"{COMMAND} {line}; exit ${{PIPESTATUS[0]}}"]
    return subprocess.run(words, cwd=here, env=os.environ | environment, capture_output=True, timeout=300, check=False)


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize(
    ("command", "code"), [("plan small.yaml", 0), ("settings", 0), ("--help", 0), ("completion bash", 0), ("nowhere.yaml", 2)]
)
def test_a_lost_stream_changes_no_exit_code_and_gives_no_traceback(here, command, code, lost):
    done = shell(f"{command} {lost}", here)
    assert (done.returncode, b"Traceback" in done.stderr, b"Exception" in done.stderr) == (code, False, False), done.stderr


def test_a_full_disk_under_the_output_is_one_line(here):
    done = shell("plan small.yaml > /dev/full", here)
    assert done.stderr == b"standard output: No space left on device; output is incomplete, the command continues\n"


def test_a_closed_stream_never_becomes_a_file_that_the_command_writes(here):
    code = "import os, sys; os.close(0); os.close(1); sys.stdout = sys.__stdout__ = None; from orchestration.output import install\n"
    code += "install(); file = open('made', 'w'); print('lost'); os.write(1, b'lost'); print(file.fileno(), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert int(done.stderr) > 2
    assert (here / "made").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["| head -1", "| true", "> /dev/full", ">&- 2>&-"])
def test_a_sweep_whose_reader_is_gone_trains_to_its_end(here, lost):
    few = "small.yaml --set epochs=1 --set train_images=32"
    done = shell(f"{few} {lost}", here)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert shell(few, here).stdout == b"2 of 2 finished, nothing to do\n"
    failing = "small.yaml --set grid='{lr: [1.0e+9]}' --set epochs=1 --set train_images=32 --set retries=0"
    assert shell(f"{failing} {lost}", here).returncode == 1


@pytest.mark.parametrize("command", ["watch small.yaml --every 0.1", "logs small.yaml --follow eps=0.4"])
def test_following_ends_when_its_reader_is_gone(here, command):
    trial, *_ = open_sweep(here / "small.yaml", [], data_root=None, environment={}).plans
    store = open_store(str(here / "runs" / "store"))
    TrialRecord.open(store, trial, retention=Retention()).stop()
    words = [sys.executable, "-m", "orchestration.cli", *command.split()]
    process = subprocess.Popen(words, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        process.stdout.close()
        for _ in range(200):  # each attempt is news, and a line
            TrialRecord.open(store, trial, retention=Retention()).stop()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
                break
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()


ODD = "b\udcffd \u00e9\x1b[31m\n\u202ename.yaml"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_a_name_that_the_terminal_cannot_write_is_written_as_escapes(here, encoding):
    (here / ODD).write_text("name: x\nbase: {esp: 1}\n")
    words = [sys.executable, "-m", "orchestration.cli", "plan", ODD]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count(b"\n"), b"Traceback" in done.stderr) == (2, 1, False), done.stderr
    assert b"\x1b" not in done.stderr
    assert rb"b\udcffd" in done.stderr
    assert rb"\x1b[31m\n\u202ename.yaml: base.esp: unknown setting" in done.stderr


@pytest.mark.parametrize("command", ["plan", "status", "watch --once", "logs", "plan --show-config"])
def test_a_name_controls_no_terminal(here, command):
    names = ["\x1b[2J\x1b]0;title\x07a\nFAILED b\u202e.safetensors", "\x9b2Jc"]
    (here / "odd.yaml").write_text(json.dumps({"name": "odd", "preset": "digits", "grid": {"init_weights": names}}))
    first, *options = command.split()
    words = [sys.executable, "-m", "orchestration.cli", first, "odd.yaml", *options, *(["init_weights=x"] if first == "logs" else [])]
    with terminal(160) as (descriptor, screen):  # which fails at any sequence that rich does not write
        streams = {"stdout": descriptor, "stderr": descriptor}
        subprocess.run(words, cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False, **streams)
    assert screen.lines
    assert not any(line.startswith("FAILED b") or "\u202e" in line or "\x9b" in line for line in screen.lines), screen.lines


@pytest.mark.parametrize("only", ["", "zz"])
def test_an_empty_or_unknown_start_of_an_identity_is_refused(here, only):
    done = shell(f"small.yaml --only '{only}'", here)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr
    assert b"no trial ID of this sweep starts with it; rrn-sweep plan FILE lists them" in done.stderr
    assert not (here / "runs" / "mlflow.db").exists()
