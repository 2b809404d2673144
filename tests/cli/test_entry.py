"""entry.py: Ctrl-C while modules load gives no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from small_sweep import SMALL

DELAYS_S = [0.0, *(0.04 * step for step in range(1, 13)), 0.7, 1.0]


@pytest.mark.parametrize("arguments", [["--version"], ["plan", "small.yaml"], ["status", "small.yaml"]], ids=lambda words: words[0])
def test_ctrl_c_at_any_time_gives_no_traceback(tmp_path, arguments):
    (tmp_path / "small.yaml").write_text(SMALL)
    codes = set()
    for delay_s in DELAYS_S:
        code, text = interrupted(arguments, cwd=tmp_path, delay_s=delay_s)
        if "<frozen site>" in text or "<frozen runpy>" in text:
            continue  # Python's own start, before the first line of the program
        assert "Traceback" not in text, (delay_s, text)
        assert "ignored" not in text, (delay_s, text)
        assert code in (0, 130, -signal.SIGINT), (delay_s, text)
        assert code != 130 or text.splitlines()[-1] == "interrupted"
        codes.add(code)
    assert 130 in codes


def interrupted(arguments, *, cwd, delay_s: float) -> tuple[int, str]:
    """Exit code and output of a command that gets SIGINT after `delay_s`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestration.cli", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have started the tests with SIGINT ignored
    )
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=30), process.stdout.read()
