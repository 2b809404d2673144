"""`ui`: serves MLflow's UI of a sweep's database in the foreground, and prints the address of the sweep's charts."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlencode, urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from rich.console import Console

from orchestration.errors import SweepError, TrackingError, without_password
from orchestration.sweep import Sweep
from orchestration.tracking.experiment import SQLITE
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

LOOK_UP_WITHIN_S = 10.0
"""How long a server is waited for when it is asked for the sweep's experiment."""

END_WITHIN_S = 10.0
_ANSWER_WITHIN_S = 2.0
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ui(sweep: Sweep, console: Console, *, port: int | None = None, environment: Mapping[str, str]) -> None:
    """Serve the UI of a database until SIGINT, SIGTERM or SIGHUP, and print the address of the sweep's charts; of a server only print it.

    Args:
        port: to listen on; unset, DEFAULT_PORT or the next one that is free.
        environment: for the server that is started. For one that already runs: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
            MLFLOW_TRACKING_TOKEN.

    Raises:
        SweepError: there is no database yet, or the port is in use.
        TrackingError: the server ended by itself, or did not answer within START_WITHIN_S.
    """
    if not sweep.tracking.startswith(SQLITE):
        credentials = _authorization(sweep.tracking, environment)
        _print(console, f"MLflow: {_charts(build_opener(), without_password(sweep.tracking).rstrip('/'), sweep.name, credentials)}")
        return
    database = Path(sweep.tracking.removeprefix(SQLITE))
    _check_database(database, sweep.file)
    chosen = _port(port, say=lambda line: _print(console, line))
    base = f"http://{HOST}:{chosen}"
    direct = build_opener(ProxyHandler({}))  # no proxy for loopback
    with _signals_as_interrupts(), suppress(KeyboardInterrupt), tempfile.TemporaryFile() as log:
        with _server(sweep.tracking, chosen, environment, log=log.fileno()) as server:
            if not console.is_terminal:
                _print(console, f"starting MLflow on {database}")
            with console.status(f"starting MLflow on {database}"):
                failure = _wait_until_ready(server, direct, base)
            if failure is None:
                _print(console, f"MLflow: {_charts(direct, base, sweep.name, {})}\nCtrl-C ends it")
                server.wait()
        log.seek(0)
        raise TrackingError(f"MLflow on {database} {failure or 'ended by itself'}: {_last_error(log.read())}")


def free_port(*, first: int = DEFAULT_PORT) -> int:
    """The first free port of this machine from `first` on. Raises SweepError if none of PORTS is free."""
    free = next((port for port in range(first, first + PORTS) if _is_free(port)), None)
    if free is None:
        raise SweepError(f"--port: the ports {first} to {first + PORTS - 1} of {HOST} are in use; give another")
    return free


def _check_database(database: Path, file: Path) -> None:
    """Raise SweepError at once; MLflow would retry for minutes."""
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


def _charts(opener: OpenerDirector, base: str, sweep: str, headers: Mapping[str, str]) -> str:
    """The address of the sweep's charts; if MLflow does not name its experiment, the address of the UI, and why."""
    try:
        return comparison_url(base, _experiment_id(opener, base, sweep, headers))
    except HTTPError as error:
        with error:
            missing = error.code == 404 and b"RESOURCE_DOES_NOT_EXIST" in error.read()
        return f"{base}\n" + (
            f"it has no experiment {sweep} yet: run the sweep first" if missing else f"it refused to name the experiment: {error}"
        )
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        return f"{base}\nit did not name the experiment {sweep}: {error}; check that it is running and that the address is right"


def _experiment_id(opener: OpenerDirector, base: str, sweep: str, headers: Mapping[str, str]) -> str:
    """From MLflow's REST API: its client would take seconds to import, and minutes where the server does not answer."""
    query = urlencode({"experiment_name": sweep})
    request = Request(f"{base}/api/2.0/mlflow/experiments/get-by-name?{query}", headers=dict(headers))
    with opener.open(request, timeout=LOOK_UP_WITHIN_S) as reply:
        return str(json.load(reply)["experiment"]["experiment_id"])


def _authorization(uri: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The header for MLflow's credentials, from the environment or the URI, as its client builds it."""
    parts = urlsplit(uri)
    user = environment.get("MLFLOW_TRACKING_USERNAME") or unquote(parts.username or "")
    password = environment.get("MLFLOW_TRACKING_PASSWORD") or unquote(parts.password or "")
    token = environment.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    return {"Authorization": f"Bearer {token}"} if token else {}


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
def _server(uri: str, port: int, environment: Mapping[str, str], *, log: int) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` in its own process group, which ends with the context. The user's MLflow settings are for clients: it gets none."""
    inherited = {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}
    folder = Path(uri.removeprefix(SQLITE)).parent
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--artifacts-destination", str(folder / "artifacts")]
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


def _wait_until_ready(server: subprocess.Popen[bytes], opener: OpenerDirector, base: str) -> str | None:
    """Wait until it answers; the failure where it does not."""
    since_s = time.monotonic()
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
