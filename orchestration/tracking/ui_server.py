"""`ui`: serves MLflow's UI of a sweep's database in the foreground, and prints the address of the sweep's charts."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from urllib.request import ProxyHandler, build_opener

from rich.console import Console

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.plan.tracking_address import checked_address, database_of
from orchestration.sweep import Sweep
from orchestration.tracking.experiment import MlflowUnavailable, RunGone, known_experiment
from orchestration.tracking.mlflow_private import SERVER_SETTINGS
from orchestration.tracking.ui_links import comparison_url

HOST = "127.0.0.1"
"""Loopback only: everyone who reaches the UI may change and delete all that it shows."""

DEFAULT_PORT = 5000
"""MLflow's own."""

PORTS = 100
"""Ports that are tried from DEFAULT_PORT on."""

START_WITHIN_S = 240.0
"""In a new database MLflow first creates its tables."""

END_WITHIN_S = 10.0
_ANSWER_WITHIN_S = 2.0
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ui(sweep: Sweep, console: Console, *, port: int | None = None, environment: Mapping[str, str]) -> None:
    """Serve the UI of a database until SIGINT, SIGTERM or SIGHUP, and print the address of the sweep's charts; of a server only print it.

    Args:
        port: to listen on; unset, DEFAULT_PORT or the next one that is free.
        environment: for the server that is started.

    Raises:
        SweepError: there is no database yet, or the port is in use.
        TrackingError: the database cannot be used, the server ended by itself, or did not answer within START_WITHIN_S.
    """
    database = database_of(checked_address(sweep.tracking))
    if database is None:
        _print(console, f"MLflow: {_charts(without_password(sweep.tracking).rstrip('/'), sweep)}")
        return
    if not database.exists():
        raise SweepError(f"{database}: no run yet: rrn-sweep {sweep.file} first")
    chosen = _port(port, say=lambda line: _print(console, line))
    base = f"http://{HOST}:{chosen}"
    with _signals_as_interrupts(), suppress(KeyboardInterrupt), tempfile.TemporaryFile() as log:
        if not console.is_terminal:
            _print(console, f"starting MLflow on {database}")
        with console.status(f"starting MLflow on {database}"):
            experiment_id = _known_experiment(sweep)  # before the server, which would upgrade or complete the database on its own
        with _server(sweep.tracking, database.parent, chosen, environment, log=log.fileno()) as server:
            with console.status(f"starting MLflow on {database}"):
                failure = _wait_until_ready(server, base)
            if failure is None:
                _print(console, f"MLflow: {_page(base, experiment_id, sweep.name)}\nCtrl-C ends it")
                server.wait()
        log.seek(0)
        raise TrackingError(f"MLflow on {database} {failure or 'ended by itself'}: {_last_error(log.read())}")


def free_port(*, first: int = DEFAULT_PORT) -> int:
    """The first free port of this machine from `first` on. Raises SweepError if none of PORTS is free."""
    free = next((port for port in range(first, first + PORTS) if _is_free(port)), None)
    if free is None:
        raise SweepError(f"--port: the ports {first} to {first + PORTS - 1} of {HOST} are in use; give another")
    return free


def _port(wanted: int | None, *, say: Callable[[str], None]) -> int:
    if wanted is None:
        port = free_port()
        if port != DEFAULT_PORT:
            say(f"port {DEFAULT_PORT} is in use, taking {port}")
        return port
    if not 0 < wanted < 2**16:
        raise SweepError(f"--port: must be from 1 to 65535, got {wanted}")
    if not _is_free(wanted):
        raise SweepError(f"--port {wanted}: already in use, or not permitted; leave the option out, or give another port")
    return wanted


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    with socket.socket() as caller:  # outside Linux one may bind where another listens on all addresses
        caller.settimeout(_ANSWER_WITHIN_S)
        return caller.connect_ex((HOST, port)) != 0


def _known_experiment(sweep: Sweep) -> str | None:
    try:
        return known_experiment(sweep.tracking, sweep.name)
    except (MlflowUnavailable, RunGone) as error:
        raise TrackingError(f"MLflow cannot be used: {error}; check that it is running and that the address is right") from error


def _charts(base: str, sweep: Sweep) -> str:
    """The address of the sweep's charts; if MLflow does not name its experiment, the address of the UI, and why."""
    try:
        return _page(base, _known_experiment(sweep), sweep.name)
    except TrackingError as error:
        return f"{base}\nit did not name the experiment {sweep.name}: {error}"


def _page(base: str, experiment_id: str | None, sweep: str) -> str:
    return comparison_url(base, experiment_id) if experiment_id else f"{base}\nit has no experiment {sweep} yet: run the sweep first"


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Within, each of the signals that end a program raises KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _server(uri: str, folder: Path, port: int, environment: Mapping[str, str], *, log: int) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` in its own process group, which ends with the context. The user's MLflow settings are for clients: it gets none."""
    inherited = {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}
    files = (folder / "artifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--artifacts-destination", files]
    command += ["--host", HOST, "--workers", "1", "--port", str(port)]
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=inherited | SERVER_SETTINGS, start_new_session=True
    )
    try:
        yield server
    finally:
        _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the whole group with SIGTERM, after END_WITHIN_S with SIGKILL; a further Ctrl-C kills it at once."""
    with suppress(KeyboardInterrupt):
        _signal(server, signal.SIGTERM)
        since_s = time.monotonic()
        while _is_alive(server) and time.monotonic() - since_s < END_WITHIN_S:
            time.sleep(0.05)
    for number in _END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _signal(server, signal.SIGKILL)
    server.wait(END_WITHIN_S)


def _is_alive(server: subprocess.Popen[bytes]) -> bool:
    """Whether any process of its group is. The leader counts until it has been waited for, hence the poll."""
    server.poll()
    try:
        os.killpg(server.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal(server: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, number)


def _wait_until_ready(server: subprocess.Popen[bytes], base: str) -> str | None:
    """Wait until it answers; the failure where it does not."""
    opener, since_s = build_opener(ProxyHandler({})), time.monotonic()  # no proxy for loopback
    while server.poll() is None:
        with suppress(OSError, HTTPException), opener.open(f"{base}/health", timeout=_ANSWER_WITHIN_S) as reply:
            if reply.status == 200:
                return None
        if time.monotonic() - since_s > START_WITHIN_S:
            return f"does not answer within {START_WITHIN_S:.0f} s"
        time.sleep(0.1)
    return "ended instead of starting"


def _last_error(log: bytes) -> str:
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w*(Error|Exception)\b.*:", line)]
    return without_password((errors or lines or ["its log is empty"])[-1])[:500]


def _print(console: Console, text: str) -> None:
    """Without line breaks, so that addresses can be clicked."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
