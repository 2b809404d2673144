"""Starts and stops a server together with its child processes, and finds it again in a later command. Linux only."""

from __future__ import annotations

import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "RRN_PART"
"""Environment variable of a part's processes, set to its log file. It identifies processes that outlive their parent."""

FOREIGN = ("AWS_", "MLFLOW_", "PG", "RAY_")
"""Prefixes of variables that are not passed from the shell to a part."""

INSTALL = 'pip install -c constraints.txt -e ".[stack]", and apt-get install postgresql'


class StackError(Exception):
    """A part cannot start or does not answer. The text is one line."""


class StackPart:
    """A server process with its own process group. A file beside its log records its PID."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        check: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
        owner: str | None = None,
        end_signal: signal.Signals = signal.SIGTERM,
        deadline_s: float = 120.0,
    ) -> None:
        """`check`: whether the server answers; must return soon. `prepare`: runs before each start. `owner`: the user that runs it."""
        self.name, self.log = name, log.resolve()
        self._command, self._check, self._prepare = list(command), check, prepare
        self._environment, self._owner, self._end_signal, self._deadline_s = dict(environment or {}), owner, end_signal, deadline_s
        self._record = self.log.with_suffix(".pid")
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """PID of the recorded process if it is alive. A later process with the same PID has another start time."""
        if self._child is not None:
            self._child.poll()  # reap a dead child, which otherwise stays a zombie
        try:
            pid, started = (int(field) for field in self._record.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return pid if _started(pid) == started else None

    def start(self) -> None:
        """Start and wait until healthy. If that fails, stop all its processes.

        Raises:
            StackError: the server exited, or did not answer in time.
        """
        try:
            self.launch()
            self.wait()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start without waiting. Does nothing if it already runs. The previous log is kept as `.log.old`.

        Raises:
            StackError: its program is not installed.
        """
        if self.running():
            return
        if shutil.which(self._command[0]) is None:
            raise StackError(f"{self.name}: program {self._command[0]} is not beside this Python or on the PATH; install: {INSTALL}")
        self.kill()  # children of a dead leader
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._prepare()
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.old"))
        with self.log.open("xb") as log:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",  # the owner may have no access to the current folder
                env=clean_environment() | self._environment | {MARK: str(self.log)},
                start_new_session=True,
                **as_user(self._owner),
            )
        self._record.write_text(f"{self._child.pid} {_started(self._child.pid)}")

    def wait(self) -> None:
        """Wait until healthy.

        Raises:
            StackError: the server exited, or did not answer in time.
        """
        with suppress(TimeoutError):
            wait_until(lambda: self.healthy() or not self.running(), deadline_s=self._deadline_s, what=self.name)
        if not self.running():
            raise StackError(f"{self.name}: exited during start: {self.tail()} (log: {self.log})")
        if not self.healthy():
            raise StackError(f"{self.name}: no answer within {self._deadline_s:g} s: {self.tail()} (log: {self.log})")

    def healthy(self) -> bool:
        return self.running() and self._check()

    def running(self) -> bool:
        return self.pid is not None

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Signal the whole group to end. Send SIGKILL after `grace_s`."""
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, self._end_signal)
            with suppress(TimeoutError):
                wait_until(lambda: not self._processes(), deadline_s=grace_s, what=self.name)
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to all its processes. They are stopped first, so that none can fork a child that would not be found."""
        found: set[int] = set()
        while more := self._processes() - found:
            _signal(more, signal.SIGSTOP)
            found |= more

        def killed() -> bool:
            living = self._processes() | (found & _parents().keys())
            _signal(living, signal.SIGKILL)
            return not living

        wait_until(killed, deadline_s=20, what=f"the end of {self.name}")
        self._record.unlink(missing_ok=True)

    def tail(self) -> str:
        """The end of its log, as one line. A Go server prints all its goroutines after the fatal line, which then stands alone."""
        with suppress(FileNotFoundError):
            lines = [line.strip() for line in self.log.read_text(errors="replace").split("\n") if line.strip()]
            fatal = [line for line in lines if re.match(r"F\d{4} ", line)]
            return " | ".join(fatal or lines)[-400:]
        return "no log"

    def _processes(self) -> set[int]:
        """Its living processes: the leader, processes with the mark, and all their descendants."""
        parents = _parents()
        found = {pid for pid in parents if _carries(pid, f"{MARK}={self.log}")} | ({pid} if (pid := self.pid) else set())
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def free_ports(count: int, *, above: int = 0) -> list[int]:
    """Free ports of 127.0.0.1, below the range for outgoing connections, so that they are probably still free after a restart.

    With `above`, each port + `above` is free too. Raises StackError if too few are free.
    """
    anywhere = random.SystemRandom()  # training seeds the global generator: two processes with the same seed would choose the same ports
    candidates = anywhere.sample(range(20_000, 22_700) if above else range(23_000, 29_900), 200)
    found = [port for port in candidates if port_is_free(port) and (not above or port_is_free(port + above))]
    if len(found) < count:
        raise StackError(f"too few free TCP ports on 127.0.0.1: {count} needed, {len(found)} of 200 tried are free")
    return found[:count]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def program(name: str) -> str | None:
    """The path of a program: beside this Python, on the PATH, or in Debian's folder of PostgreSQL programs. None if not found."""
    packaged = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name) or (str(packaged[-1]) if packaged else None)


def wait_until(ready: Callable[[], bool], *, deadline_s: float, what: str) -> None:
    """Poll `ready` ten times a second. Raises TimeoutError after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline_s:g} s")
        time.sleep(0.1)


def clean_environment() -> dict[str, str]:
    """This process's environment without the settings of other servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


def as_user(owner: str | None) -> dict[str, Any]:
    """Arguments of `subprocess` to run as `owner`. None: this user."""
    return {} if owner is None else {"user": owner, "group": pwd.getpwnam(owner).pw_gid, "extra_groups": []}


def _parents() -> dict[int, int]:
    """PIDs of all living processes, with the PID of the parent."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return {pid: int(fields[1]) for pid in pids if (fields := _stat(pid))}


def _started(pid: int) -> int | None:
    """Start time of a living process, in clock ticks since boot."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (the second, the name, may contain spaces). Empty for a dead process or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _carries(pid: int, setting: str) -> bool:
    try:
        return setting.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
