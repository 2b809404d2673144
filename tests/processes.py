"""`rrn-sweep` as its user runs it: a process of its own, awaited with a deadline, and always stopped with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from servers import wait_until

OURS = "RRN_TEST_RUN"
"""Set in the environment of every sweep that a test starts, so that its orphans can be found."""


class Sweep:
    """A running `rrn-sweep`; its output goes to a file, as in a batch job."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str], before: Callable[[], object] = lambda: None
    ) -> None:
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.log = cwd / f"log-{self._mark}.txt"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestration.cli", *arguments],
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment, OURS: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: (_take_ctrl_c(), before()),
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, *, deadline_s: float) -> int:
        try:
            return self.process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the sweep is not done within {deadline_s:g} s:\n{self.text}") from None

    def wait_for(self, words: str, *, deadline_s: float = 90) -> None:
        """Until `words` stand in the output."""
        wait_until(lambda: words in self.text or self.process.poll() is not None, deadline_s=deadline_s, what=f"{words!r} in the output")
        assert words in self.text, self.text

    def trial_processes(self) -> list[int]:
        """Pids of the processes in which Ray runs trials."""
        return [pid for pid in self._pids() if _command(pid).startswith("ray::ResourceTrainable")]

    def pid_of(self, words: str) -> int:
        """The one process with `words` in its command."""
        (pid,) = [pid for pid in self._pids() if words in _command(pid).split()[0]]
        return pid

    def end(self) -> None:
        """Kill whatever of it is left."""
        for pid in {self.process.pid, *self._pids()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    def _pids(self) -> list[int]:
        mark = f"{OURS}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found


@contextmanager
def sweep(
    *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None, before: Callable[[], object] = lambda: None
) -> Iterator[Sweep]:
    """Start `rrn-sweep ARGUMENTS`, in a process that calls `before` first; everything it started is gone when the context ends."""
    running = Sweep(arguments, cwd=cwd, environment=environment or {}, before=before)
    try:
        yield running
    finally:
        running.end()


def run_sweep(*arguments: str, cwd: Path, environment: Mapping[str, str] | None = None, deadline_s: float = 300) -> tuple[int, str]:
    """Exit code and output of a whole `rrn-sweep ARGUMENTS`."""
    with sweep(*arguments, cwd=cwd, environment=environment) as running:
        return running.wait(deadline_s=deadline_s), running.text


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _take_ctrl_c() -> None:
    """A shell starts background jobs, such as these tests may be, with SIGINT ignored, and children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
