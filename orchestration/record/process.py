"""A process of any machine, named so that it can be told from every other one that ever had its pid."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt


class Process(BaseModel):
    """What a system cannot tell is empty."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    boot: str
    """Boot and pid namespace: only where both are the same can `pid` be looked up."""
    pid: PositiveInt
    started: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"

    def runs(self) -> bool | None:
        """Whether it runs; None where that can't be seen from here."""
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
    """Empty where /proc is missing, or is that of another pid namespace."""
    try:
        if Path("/proc/self").readlink().name != str(pid):
            return ""
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, str]:
    """State (such as R, or Z for a zombie) and start time (in ticks since boot) of a process; empty where they can't be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
    except OSError:
        return "", ""
    return fields[0], fields[19]
