"""A server process with all that it starts: launched, awaited, ended as a whole, and found again by a later command. Linux only."""

from __future__ import annotations

import os
import pwd
import random
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
"""Set to the part's log file in the environment of its processes: some lead sessions of their own and outlive their parent."""

FOREIGN = ("AWS_", "MLFLOW_", "PG", "RAY_")
"""A part gets its settings from us alone: variables of the shell with these beginnings stay out."""

INSTALL = 'pip install -c constraints.txt -e ".[stack]", and apt-get install postgresql'


class StackError(Exception):
    """A part cannot start or does not answer; one line."""


class StackPart:
    """A server process that leads a group of its own; a record beside its log says which process that is."""

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
        """`check` says whether the server answers, and returns soon; `prepare` runs before each start; `owner` is the user that runs it."""
        self.name, self.log = name, log.resolve()
        self._command, self._check, self._prepare = list(command), check, prepare
        self._environment, self._owner, self._end_signal, self._deadline_s = dict(environment or {}), owner, end_signal, deadline_s
        self._record = self.log.with_suffix(".pid")
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The recorded process while it lives: a process that got the same number later started at another time."""
        if self._child is not None:
            self._child.poll()  # a dead child stays a zombie until somebody asks
        try:
            pid, started = (int(word) for word in self._record.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return pid if (_started(pid) == started) else None

    def start(self) -> None:
        """Start and wait until healthy; nothing of it is left otherwise.

        Raises:
            StackError: it ended or did not answer in time.
        """
        try:
            self.launch()
            self.wait()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start and return at once; nothing happens where it runs. The log of the start before is kept as `.log.old`.

        Raises:
            StackError: its program is not installed.
        """
        if self.running():
            return
        if shutil.which(self._command[0]) is None:
            raise StackError(f"{self.name}: no program {self._command[0]} beside this Python or on the PATH; {INSTALL}")
        self.kill()  # what a dead leader left behind
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
                cwd="/",  # the owner may have no right to be where we are
                env=clean_environment() | self._environment | {MARK: str(self.log)},
                start_new_session=True,
                **as_user(self._owner),
            )
        self._record.write_text(f"{self._child.pid} {_started(self._child.pid)}")

    def wait(self) -> None:
        """Until healthy.

        Raises:
            StackError: it ended or did not answer in time.
        """
        with suppress(TimeoutError):
            wait_until(lambda: self.healthy() or not self.running(), deadline_s=self._deadline_s, what=self.name)
        if not self.running():
            raise StackError(f"{self.name} ended instead of starting: {self.tail()} ({self.log})")
        if not self.healthy():
            raise StackError(f"{self.name} does not answer within {self._deadline_s:g} s: {self.tail()} ({self.log})")

    def healthy(self) -> bool:
        return self.running() and self._check()

    def running(self) -> bool:
        return self.pid is not None

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Ask the whole group to end, then SIGKILL after `grace_s`."""
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, self._end_signal)
            with suppress(TimeoutError):
                wait_until(lambda: not self._processes(), deadline_s=grace_s, what=self.name)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all of it, as a power cut would; frozen first, lest it fork a child that nobody finds once it is an orphan."""
        found: set[int] = set()
        while more := self._processes() - found:
            _signal(more, signal.SIGSTOP)
            found |= more

        def gone() -> bool:
            living = self._processes() | (found & _parents().keys())
            _signal(living, signal.SIGKILL)
            return not living

        wait_until(gone, deadline_s=20, what=f"the end of {self.name}")
        self._record.unlink(missing_ok=True)

    def tail(self) -> str:
        """The last words of its log, in one line."""
        with suppress(FileNotFoundError):
            lines = self.log.read_text(errors="replace").split("\n")
            return " | ".join(line.strip() for line in lines if line.strip())[-400:]
        return "no log"

    def _processes(self) -> set[int]:
        """What lives of it: the leader, whatever carries the mark, and all their descendants."""
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
    """Ports of 127.0.0.1 that are free now, below those that the system lends to outgoing connections: they stay ours over a restart.

    With `above`, each port + `above` is free too.
    """
    candidates = random.sample(range(20_000, 22_700) if above else range(23_000, 29_900), 200)
    found = [port for port in candidates if port_is_free(port) and (not above or port_is_free(port + above))]
    if len(found) < count:
        raise StackError(f"too few free TCP ports on 127.0.0.1: {count} are needed, {len(found)} of 200 tried are free")
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
    """The path of a program that lies beside this Python, on the PATH, or where Debian keeps PostgreSQL's."""
    packaged = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name) or (str(packaged[-1]) if packaged else None)


def wait_until(ready: Callable[[], bool], *, deadline_s: float, what: str) -> None:
    """Poll `ready` ten times a second; raises TimeoutError after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline_s:g} s")
        time.sleep(0.1)


def clean_environment() -> dict[str, str]:
    """This process's environment without the settings of other servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


def as_user(owner: str | None) -> dict[str, Any]:
    """Arguments of `subprocess` to run as `owner`; None means this user."""
    return {} if owner is None else {"user": owner, "group": pwd.getpwnam(owner).pw_gid, "extra_groups": []}


def _parents() -> dict[int, int]:
    """Every living process and its parent."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return {pid: int(fields[1]) for pid in pids if (fields := _stat(pid))}


def _started(pid: int) -> int | None:
    """When a living process started, in clock ticks after boot."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str]:
    """Fields 3 and on of /proc/PID/stat (2, the name, may hold anything); none for a process that is gone or a zombie."""
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
