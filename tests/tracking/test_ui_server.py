"""`ui` with a real `mlflow server` in a process of its own: what it serves, and that no process is left."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from places import ROOT
from processes import _take_ctrl_c
from rich.console import Console
from servers import MlflowServer, free_port, wait_until

from orchestration.errors import SweepError
from orchestration.sweep import Sweep, open_sweep
from orchestration.tracking import ui_server
from orchestration.tracking.experiment import find_experiment
from orchestration.tracking.ui_server import ui

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8cf500f0003860180")
CODE = """
import os, sys
from pathlib import Path
from rich.console import Console
from orchestration.tracking.ui_server import ui
from orchestration.sweep import open_sweep
sweep = open_sweep(Path(sys.argv[1]), [], data_root=None, environment=os.environ)
ui(sweep, Console(), port=int(sys.argv[2]), environment=os.environ)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(f"{{name: demo, preset: digits, store: {tmp_path}/store, tracking: 'sqlite:///{tmp_path}/mlflow.db'}}")
    return path


@pytest.fixture
def database(file: Path, mlflow_database: Path) -> Path:
    """A database with the sweep's experiment."""
    copy = Path(shutil.copy(mlflow_database, file.with_name("mlflow.db")))
    find_experiment(f"sqlite:///{copy}", "demo")
    return copy


def opened(file: Path, tracking: str | None = None) -> Sweep:
    overrides = [f"tracking={tracking}"] if tracking else []
    return open_sweep(file, overrides, data_root=None, environment={})


def printed(sweep: Sweep, **options) -> str:
    console = Console(file=io.StringIO(), width=40)
    ui(sweep, console, environment={}, **options)
    return console.file.getvalue()


class Serving:
    """A `ui` in a process of its own, and the processes that it started."""

    def __init__(self, file: Path, port: int, folder: Path) -> None:
        self._log = folder / "log.txt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_STATIC_PREFIX": "/not-ours", "HTTP_PROXY": "http://127.0.0.1:1"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, str(file), str(port)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_take_ctrl_c,
            )

    @property
    def text(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.text or self.process.poll() is not None, deadline_s=150, what=words)
        assert words in self.text, self.text

    def children(self) -> set[int]:
        """All processes below it."""
        parents = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, IndexError):
                if entry.name.isdecimal():
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found - {self.process.pid}


@contextmanager
def serving(file: Path, port: int, folder: Path) -> Iterator[Serving]:
    running = Serving(file, port, folder)
    children: set[int] = set()
    try:
        yield running
        children = running.children()
    finally:
        children |= running.children()
        for pid in {running.process.pid, *children}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.process.wait(10)


def get(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as reply:
        return reply.read()


def gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


@pytest.mark.slow
@pytest.mark.parametrize("deadly", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_it_serves_the_sweep_and_its_artifacts_from_any_folder_and_leaves_no_process(file, database, tmp_path, deadly):
    with closing(sqlite3.connect(database)) as connection:
        (experiment,) = connection.execute("SELECT experiment_id FROM experiments WHERE name = 'demo'").fetchone()
    _, client = find_experiment(f"sqlite:///{database}", "demo")
    run = client.create_run(str(experiment)).info.run_id
    for name, body in (("miou.html", b"<p>a figure</p>"), ("miou.png", PNG)):
        (tmp_path / name).write_bytes(body)
        client.log_artifact(run, str(tmp_path / name), "figures")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    port = free_port()
    with serving(file, port, folder) as running:
        running.wait_for("Ctrl-C ends it")
        base = f"http://127.0.0.1:{port}"
        (page,) = [line.removeprefix("MLflow: ") for line in running.text.splitlines() if line.startswith("MLflow: ")]
        assert page.startswith(f"{base}/#/experiments/{experiment}/runs?")
        assert parse_qs(urlsplit(page).fragment.partition("?")[2])["compareRunsMode"] == ["CHART"]
        assert b"<title>MLflow</title>" in get(base)
        listed = json.loads(get(f"{base}/ajax-api/2.0/mlflow/artifacts/list?run_id={run}&path=figures"))
        assert [entry["path"] for entry in listed["files"]] == ["figures/miou.html", "figures/miou.png"]
        assert get(f"{base}/get-artifact?path=figures/miou.html&run_uuid={run}") == b"<p>a figure</p>"
        assert get(f"{base}/get-artifact?path=figures/miou.png&run_uuid={run}") == PNG
        children = running.children()
        assert len(children) >= 2
        running.process.send_signal(deadly)
        assert running.process.wait(30) == 0, running.text
        assert gone(children)
        assert "Traceback" not in running.text
    assert [path.name for path in folder.iterdir()] == ["log.txt"]


def test_it_can_be_ended_while_it_starts(file, database, tmp_path):
    with serving(file, free_port(), tmp_path) as running:
        running.wait_for("starting MLflow")
        wait_until(lambda: bool(running.children()), deadline_s=20, what="the server")
        children = running.children()
        running.process.send_signal(signal.SIGHUP)
        assert running.process.wait(30) == 0, running.text
        assert gone(children)
        assert "Traceback" not in running.text


def test_a_server_that_ignores_sigterm_is_killed_with_its_children(monkeypatch):
    monkeypatch.setattr(ui_server, "END_WITHIN_S", 0.5)
    before = {number: signal.getsignal(number) for number in ui_server._END_SIGNALS}
    stubborn = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 77 & sleep 78"], start_new_session=True)
    try:
        wait_until(lambda: len(members(stubborn.pid)) == 3, deadline_s=10, what="the group")
        ui_server._end(stubborn)
        assert stubborn.returncode == -signal.SIGKILL
        wait_until(lambda: not members(stubborn.pid), deadline_s=10, what="the end of the group")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        with suppress(ProcessLookupError):
            os.killpg(stubborn.pid, signal.SIGKILL)


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdecimal() else []
            if fields and int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def test_a_missing_or_damaged_database_is_one_line(file):
    with pytest.raises(SweepError, match=r"mlflow\.db: no run yet: rrn-sweep .*demo\.yaml first$"):
        printed(opened(file))
    file.with_name("mlflow.db").write_bytes(b"not a database at all " * 100)
    with pytest.raises(SweepError, match=r"cannot use the MLflow database .*mlflow\.db: .*file is not a database$"):
        printed(opened(file))


def test_a_given_port_that_is_in_use_is_one_line(file, database):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SweepError, match=f"--port {port}: already in use"):
            printed(opened(file), port=port)
    with pytest.raises(SweepError, match="--port: must be from 1 to 65535, got 70000"):
        printed(opened(file), port=70_000)


def test_without_a_given_port_the_next_free_one_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert ui_server.free_port(first=port) > port
        monkeypatch.setattr(ui_server, "PORTS", 1)
        with pytest.raises(SweepError, match=f"the ports {port} to {port} of 127.0.0.1 are in use"):
            ui_server.free_port(first=port)


def test_of_a_running_server_only_the_address_is_printed(file, mlflow_server: MlflowServer):
    experiment, _ = find_experiment(mlflow_server.uri, "demo")
    lines = printed(opened(file, mlflow_server.uri)).splitlines()
    assert len(lines) == 1  # unbroken, however narrow the terminal
    assert lines[0].startswith(f"MLflow: {mlflow_server.uri}/#/experiments/{experiment}/runs?workflowType=machine_learning")


def test_a_running_server_without_the_experiment_is_named_with_what_to_do(file, mlflow_server: MlflowServer):
    absent = file.with_name("absent.yaml")
    absent.write_text(file.read_text().replace("name: demo", "name: absent"))
    text = printed(opened(absent, mlflow_server.uri))
    assert text == f"MLflow: {mlflow_server.uri}\nit has no experiment absent yet: run the sweep first\n"


def test_a_server_that_does_not_answer_is_named_with_the_error(file):
    port = free_port()
    first, second = printed(opened(file, f"http://127.0.0.1:{port}")).splitlines()
    assert first == f"MLflow: http://127.0.0.1:{port}"
    assert second.startswith("it did not name the experiment demo: ")
    assert "Connection refused" in second
    assert second.endswith("check that it is running and that the address is right")


def test_a_server_that_accepts_and_is_silent_is_not_waited_for(file, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "it did not name the experiment demo" in printed(opened(file, f"http://127.0.0.1:{silent.getsockname()[1]}"))


def test_mlflow_is_not_imported():
    code = "import sys, orchestration.tracking.ui_server; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
