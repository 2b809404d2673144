"""Identifies a process on any machine, even after its PID is reused, and checks whether it runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt


class Process(BaseModel):
    """A process. Fields that the operating system does not provide are empty."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    boot: str
    """Boot ID and PID namespace. `pid` can be looked up only where both are the same."""
    pid: PositiveInt
    started: str
    """Start time, in clock ticks since boot."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"

    def runs(self) -> bool | None:
        """Whether it runs. None if this machine cannot check."""
        own = here()
        if not own.boot or (self.host, self.boot) != (own.host, own.boot):
            return None
        try:
            os.kill(self.pid, 0)  # unlike /proc, never hidden from other users
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        state, started = _state(self.pid)
        if not started or not self.started:
            return None
        return started == self.started and state not in "ZX"


def here() -> Process:
    """This process."""
    pid = os.getpid()
    return Process(host=socket.gethostname(), boot=_boot(pid), pid=pid, started=_state(pid)[1])


def _boot(pid: int) -> str:
    """Boot ID and PID namespace. Empty if /proc is missing or belongs to another PID namespace."""
    try:
        if Path("/proc/self").readlink().name != str(pid):
            return ""
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, str]:
    """State (R, or Z for a zombie, and so on) and start time (clock ticks since boot). Empty if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name in parentheses may contain anything
    except OSError:
        return "", ""
    return fields[0], fields[19]
