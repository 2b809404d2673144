"""Run Ray in a process of its own. Ray may end the process that uses it at any time; the driver then starts another."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from orchestration.errors import ClusterError, ClusterLost
from orchestration.plan.spec import Resources
from orchestration.run.dispatch import Dispatch
from orchestration.run.job import Job

STARTS = 3
"""How often Ray starts until a trial commits something. Then the sweep ends, and the same command resumes it."""

PAUSE_S = 5.0
"""Before Ray starts again: a cluster needs time to restart its head."""

POLL_S = 0.2
CLOSE_WITHIN_S = 30.0
"""How long Ray may take to shut down."""


@dataclass(frozen=True)
class Setup:
    """What the process is given. `address`: of a Ray cluster; None starts Ray on this machine. `program`: path of the driver's program."""

    address: str | None
    job: Job
    resources: Resources
    program: str


@dataclass(frozen=True)
class Ended:
    """How the process ended. `fault`: None if no trial is left. `expected`: the user can fix it, and another start would not."""

    fault: str | None = None
    expected: bool = False


def train(dispatch: Dispatch, job: Job, *, address: str | None, resources: Resources) -> None:
    """Train all trials of `dispatch` on Ray. Returns when each has ended, or when the sweep was stopped.

    Raises:
        ClusterError: Ray cannot start, or no node can hold a trial.
        ClusterLost: Ray ended STARTS times, and no trial committed anything in between.
        LeaseLost: another driver has taken the sweep over.
    """
    setup = Setup(address, job, resources, sys.argv[0])
    starts = commits = 0
    while dispatch.left:
        ended = _run_once(setup, dispatch)
        if dispatch.stop_requested() or not dispatch.left:
            break
        fault = ended.fault or "Ray ended before the trials"
        if ended.expected and not dispatch.began:
            raise ClusterError(fault)
        starts, commits = 1 if dispatch.commits > commits else starts + 1, dispatch.commits
        dispatch.interrupted(fault, again=starts < STARTS)
        if starts >= STARTS:
            raise ClusterLost(f"{fault}; Ray ended {starts} times without a commit in between")
        time.sleep(PAUSE_S)
    dispatch.interrupted("the sweep was stopped", again=False)


def _run_once(setup: Setup, dispatch: Dispatch) -> Ended:
    """Start the process, and answer its calls until it ends."""
    called = False
    with _process() as ray:
        ray.connection.send(setup)
        while called or not dispatch.stop_requested():  # before the first call, no trial has a checkpoint to commit
            try:
                message = ray.connection.recv() if ray.connection.poll(POLL_S) else None
            except (EOFError, OSError):
                return Ended(ray.death)
            if isinstance(message, Ended):
                with suppress(subprocess.TimeoutExpired):
                    ray.child.wait(CLOSE_WITHIN_S)  # Ray shuts down
                ray.keep_log = message.fault is not None and not message.expected
                return replace(message, fault=f"{message.fault} (log: {ray.log})") if ray.keep_log else message
            if message:
                method, arguments = message
                called = called or method != "warned"
                answer = getattr(dispatch, method)(*arguments)
                with suppress(OSError):  # it has died: the next `recv` says so
                    ray.connection.send(answer)
        return Ended()


@dataclass
class _Process:
    """The running process. Its output, with Ray's own messages and tracebacks, is in `log`."""

    child: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    log: Path
    keep_log: bool = False

    @property
    def death(self) -> str:
        """How it ended, where it sent no `Ended`."""
        self.keep_log = True
        with suppress(subprocess.TimeoutExpired):
            code = self.child.wait(CLOSE_WITHIN_S)
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return f"Ray ended its process with {how} (log: {self.log})"
        return f"Ray closed its connection to the driver (log: {self.log})"


@contextmanager
def _process() -> Iterator[_Process]:
    """Start it. At the end it is killed if it still runs; Ray's own processes on this machine end with it."""
    ours, theirs = socket.socketpair()
    code = f"import sys; sys.path[:] = {sys.path!r}; from orchestration.run.ray_tune import main; main({theirs.fileno()})"
    with tempfile.NamedTemporaryFile(prefix="rrn-sweep-ray-", suffix=".log", delete=False) as log:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,  # closed when this process dies
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C and SIGHUP of the terminal reach only the driver, which decides
            )
        ray = _Process(child, Connection(ours.detach()), Path(log.name))
        try:
            yield ray
        finally:
            ray.connection.close()
            child.kill()
            child.wait()
            assert child.stdin
            child.stdin.close()
            if not ray.keep_log:
                ray.log.unlink(missing_ok=True)
