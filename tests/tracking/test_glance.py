"""A glance at MLflow: tells a whole sweep from one with a gap, on a real database and a real server, without importing MLflow."""

from __future__ import annotations

import base64
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from servers import free_port
from tracked_sweep import Sweep, manifest

from orchestration.tracking import glance
from orchestration.tracking.glance import shows_all

IDS = {"abc", "def"}


@pytest.fixture(params=["sqlite", "http"])
def sweep(request: pytest.FixtureRequest, mlflow_database: Path, tmp_path: Path) -> Sweep:
    """Complete, and shown."""
    if request.param == "sqlite":
        found = Sweep(f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'ml flow.db')}")
    else:
        found = Sweep(request.getfixturevalue("mlflow_server").uri)
    found.track(manifest(1, status="finished"), manifest(1, trial_id="def", seed=4, status="finished"))
    return found


def run_id(sweep: Sweep) -> str:
    return str(sweep.run("tags.trial_id = 'abc'").info.run_id)


def test_a_sweep_that_is_shown_completely_lacks_nothing(sweep: Sweep) -> None:
    sweep.client.create_run(sweep.parent().info.experiment_id)  # somebody's own, which runs
    assert shows_all(sweep.uri, sweep.name, IDS)


def test_all_pages_are_read(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glance, "_PER_PAGE", 1)
    assert shows_all(sweep.uri, sweep.name, IDS)
    assert not shows_all(sweep.uri, sweep.name, {*IDS, "ghi"})


def test_a_sweep_that_mlflow_does_not_know_is_lacking(sweep: Sweep) -> None:
    assert not shows_all(sweep.uri, "another", IDS)


@pytest.mark.parametrize("gap", ["trial deleted", "sweep's run deleted", "experiment deleted", "running", "sweep's run running", "killed"])
def test_a_gap_is_seen(sweep: Sweep, gap: str) -> None:
    parent = sweep.parent().info
    if gap == "trial deleted":
        sweep.client.delete_run(run_id(sweep))
    elif gap == "sweep's run deleted":
        sweep.client.delete_run(parent.run_id)
    elif gap == "experiment deleted":
        sweep.client.delete_experiment(parent.experiment_id)
    else:
        target = parent.run_id if gap.startswith("sweep") else run_id(sweep)
        sweep.client.update_run(target, status="KILLED" if gap == "killed" else "RUNNING")
    assert not shows_all(sweep.uri, sweep.name, IDS)
    sweep.track()
    assert shows_all(sweep.uri, sweep.name, IDS)


@pytest.mark.parametrize("fault", ["absent", "empty", "no database"])
def test_a_database_that_is_gone_is_lacking_and_is_not_made(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "mlflow.db"
    if fault != "absent":
        path.write_bytes(b"" if fault == "empty" else b"MLflow was here" * 100)
    before = sorted(tmp_path.iterdir())
    assert not shows_all(f"sqlite:///{path}", "sweep", IDS)
    assert sorted(tmp_path.iterdir()) == before


def test_a_database_that_somebody_writes_to_is_left_in_peace(
    mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glance, "_PATIENCE_S", 0.1)
    path = shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert shows_all(f"sqlite:///{path}", "sweep", IDS)


def test_a_server_that_is_away_is_left_to_the_others() -> None:
    assert shows_all(f"http://127.0.0.1:{free_port()}", "sweep", IDS)


def test_a_server_that_never_answers_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert shows_all(f"http://127.0.0.1:{silent.getsockname()[1]}", "sweep", IDS)
    assert time.monotonic() - began < 5


class _Guarded(BaseHTTPRequestHandler):
    """Knows no experiment, and tells only whom it knows; to a `fool` it answers nonsense."""

    def do_GET(self) -> None:
        user = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        code, body = {
            "me:p:w@": (404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}'),
            "fool:": (200, b'{"experiment": 7}'),
        }.get(user, (401, b"who are you?"))
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def guarded() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_user_and_password_are_given_to_a_server_that_asks(guarded: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert shows_all(f"http://{guarded}", "sweep", IDS)  # refused, hence not looked into
    assert not shows_all(f"http://{guarded}/", "sweep", IDS, auth=("me", "p:w@"))
    assert not shows_all(f"http://me:p%3Aw%40@{guarded}", "sweep", IDS)
    assert shows_all(f"http://{guarded}", "sweep", IDS, auth=("fool", ""))
    assert capfd.readouterr() == ("", "")


def test_mlflow_is_not_imported() -> None:
    code = "import sys, orchestration.tracking.glance; sys.exit('mlflow' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
