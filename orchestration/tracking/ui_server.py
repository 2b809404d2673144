"""`ui`: MLflow's UI on the database of a sweep, in the foreground, with nothing left of it afterwards."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from rich.console import Console

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.sweep import Sweep
from orchestration.tracking.glance import experiment_id
from orchestration.tracking.ui_links import DEFAULT_PORT, SQLITE, UI_SETTINGS, comparison_url, ui_arguments

HOST = "127.0.0.1"
"""Loopback: whoever reaches the UI may change and delete all that it shows."""

PORTS = 100
"""So many ports are tried from MLflow's own on."""

START_WITHIN_S = 240.0
"""A fresh database is filled with tables first."""

END_WITHIN_S = 10.0
_ANSWER_WITHIN_S = 2.0
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ui(sweep: Sweep, console: Console, *, port: int | None = None, environment: Mapping[str, str]) -> None:
    """Serve the UI and say where the trials are compared, until SIGINT, SIGTERM or SIGHUP; of a server that is there say only where.

    Args:
        port: to listen on; unset, MLflow's own, or the next one that is free.
        environment: of the server; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are for one that is there and asks.

    Raises:
        SweepError: there is nothing to show yet, or the port is in use.
        TrackingError: the server ended by itself, or did not answer within START_WITHIN_S.
    """
    if not sweep.tracking.startswith(SQLITE):
        _say(console, f"MLflow: {_page(sweep, without_password(sweep.tracking), environment)}")
        return
    database = Path(sweep.tracking.removeprefix(SQLITE))
    _look_into(database, sweep.file)
    chosen = _port(port, say=lambda line: _say(console, line))
    base = f"http://{HOST}:{chosen}"
    with _told_to_end(), suppress(KeyboardInterrupt), tempfile.TemporaryFile() as log:
        with _server(sweep.tracking, chosen, environment, log=log.fileno()) as server:
            if not console.is_terminal:
                _say(console, f"starting MLflow on {database}")
            with console.status(f"starting MLflow on {database}"):
                fault = _fault(server, base)
            if fault is None:
                _say(console, f"MLflow: {_page(sweep, base, environment)}\nCtrl-C ends it")
                server.wait()
        log.seek(0)
        raise TrackingError(f"MLflow on {database} {fault or 'ended by itself'}: {_last_words(log.read())}")


def free_port(*, first: int = DEFAULT_PORT) -> int:
    """The first port of this machine, from `first` on, on which nothing listens. Raises SweepError where none of PORTS is."""
    free = next((port for port in range(first, first + PORTS) if _is_free(port)), None)
    if free is None:
        raise SweepError(f"--port: the ports {first} to {first + PORTS - 1} of {HOST} are in use; give another")
    return free


def _look_into(database: Path, file: Path) -> None:
    """Raise SweepError at once where MLflow would try for minutes."""
    if not database.exists():
        raise SweepError(f"{database}: no run yet: rrn-sweep {file} first")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True, timeout=_ANSWER_WITHIN_S)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise SweepError(f"{database}: cannot be read as a database: {error}") from error


def _port(wanted: int | None, *, say: Callable[[str], None]) -> int:
    if wanted is None:
        port = free_port()
        if port != DEFAULT_PORT:
            say(f"port {DEFAULT_PORT} is in use, taking {port}")
        return port
    if not 0 < wanted < 2**16:
        raise SweepError(f"--port: must be from 1 to 65535, got {wanted}")
    if not _is_free(wanted):
        raise SweepError(f"--port {wanted}: something listens there already, or it is not yours to use; leave it out, or give another")
    return wanted


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    with socket.socket() as caller:  # elsewhere than on Linux one may bind where another listens on all addresses
        caller.settimeout(_ANSWER_WITHIN_S)
        return caller.connect_ex((HOST, port)) != 0


def _page(sweep: Sweep, base: str, environment: Mapping[str, str]) -> str:
    """Where the sweep's trials are compared; the entrance where MLflow does not tell of them."""
    user, password = environment.get("MLFLOW_TRACKING_USERNAME"), environment.get("MLFLOW_TRACKING_PASSWORD")
    found = experiment_id(sweep.tracking, sweep.name, auth=(user, password) if user and password else None)
    return comparison_url(base, found) if found else f"{base}\nit tells of no sweep {sweep.name}: is it up, and has the sweep run?"


@contextmanager
def _told_to_end() -> Iterator[None]:
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
def _server(uri: str, port: int, environment: Mapping[str, str], *, log: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow in a process group of its own, of which nothing is left in the end. The user's settings for MLflow are for clients."""
    ours = {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")} | UI_SETTINGS
    folder = Path(uri.removeprefix(SQLITE)).parent
    arguments = [*ui_arguments(uri, port=port), "--artifacts-destination", str(folder / "artifacts")]
    server = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=ours, start_new_session=True)
    try:
        yield server
    finally:
        _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, and kill what is left of it; who is impatient meanwhile kills it at once."""
    with suppress(KeyboardInterrupt):
        _signal(server, signal.SIGTERM)
        since_s = time.monotonic()
        while _lives(server) and time.monotonic() - since_s < END_WITHIN_S:
            time.sleep(0.05)
    for number in _END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _signal(server, signal.SIGKILL)
    server.wait(END_WITHIN_S)


def _lives(server: subprocess.Popen[bytes]) -> bool:
    """Whether anything of its group does; a dead leader goes on being a member until it was waited for."""
    server.poll()
    try:
        os.killpg(server.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal(server: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, number)


def _fault(server: subprocess.Popen[bytes], base: str) -> str | None:
    """Wait until it answers; what is wrong where it does not."""
    since_s = time.monotonic()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands between us and loopback
    while server.poll() is None:
        with suppress(OSError, HTTPException), opener.open(f"{base}/health", timeout=_ANSWER_WITHIN_S) as reply:
            if reply.status == 200:
                return None
        if time.monotonic() - since_s > START_WITHIN_S:
            return f"does not answer within {START_WITHIN_S:.0f} s"
        time.sleep(0.1)
    return "ended instead of starting"


def _last_words(log: bytes) -> str:
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w*(Error|Exception)\b.*:", line)]
    return without_password((errors or lines or ["it said nothing"])[-1])[:500]


def _say(console: Console, text: str) -> None:
    """Addresses must stay whole, to be clicked on."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
