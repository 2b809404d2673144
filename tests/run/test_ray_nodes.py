"""ray_nodes.py and signals.py in the surroundings that batch systems, shared machines and other clusters make."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import sweep
from small_sweep import outcomes, status, wait_for_an_epoch

from orchestration.errors import ClusterError
from orchestration.plan.spec import Resources
from orchestration.run import ray_nodes

NOBODY = 65534


@pytest.mark.slow
def test_a_sweep_runs_in_hostile_surroundings_until_its_terminal_is_closed(here):
    """A TMPDIR that is too long for sockets, a HOME that cannot be written, one CPU of several; then SIGHUP, twice as shells send it."""
    tmpdir = here / ("x" * 150)
    tmpdir.mkdir()
    environment = {"TMPDIR": str(tmpdir), "HOME": "/dev/null", "SLURM_CPUS_PER_TASK": "1", "RAY_TMPDIR": ""}
    with sweep("small.yaml", "--workers", "1", "--set", "epochs=12", cwd=here, environment=environment) as running:
        wait_for_an_epoch(here, running)
        assert [trial["state"] for trial in status(here, "--set", "epochs=12").values()] == ["running", "new"]  # one at a time
        assert_private(running.process.pid)
        for _ in range(2):
            os.kill(running.process.pid, signal.SIGHUP)
        assert running.wait(deadline_s=90) == 75, running.text
        assert "stopped by SIGHUP: the trials commit a last checkpoint and end" in running.text
        assert "Traceback" not in running.text
    assert outcomes(here, "--set", "epochs=12") == {"interrupted"}
    with sweep("small.yaml", "--set", "epochs=12", cwd=here, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as running:
        running.wait_for("resumed at")
        os.kill(running.process.pid, signal.SIGHUP)
        assert running.wait(deadline_s=200) == 0, running.text


def assert_private(driver: int) -> None:
    """The token of the driver's cluster is in no command line and in no file; nobody else can enter Ray's folder."""
    processes = psutil.Process(driver).children(recursive=True)
    (token,) = {process.environ()["RAY_AUTH_TOKEN"] for process in processes if "gcs_server" in process.name()}
    assert len(token) >= 32
    assert not any(token in " ".join(process.cmdline()) for process in processes)
    folder = Path("/tmp") / f"ray-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    searched = [file for file in folder.rglob("*") if file.is_file()]
    assert any("gcs_server" in file.name for file in searched)
    assert not any(token.encode() in file.read_bytes() for file in searched)


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    if os.getuid():
        pytest.skip("only root can give a folder away")
    short = Path(f"/tmp/t{os.getpid()}")
    (short / "ray-0").mkdir(parents=True)
    try:
        assert ray_nodes._folder({"RAY_TMPDIR": str(short)}) == short / "ray-0"
        os.chown(short / "ray-0", NOBODY, NOBODY)
        assert ray_nodes._folder({"RAY_TMPDIR": str(short)}) == Path("/tmp/ray-0")
        assert seen_by_nobody(short) == f"/tmp/ray-{NOBODY}"
    finally:
        (short / "ray-0").rmdir()
        short.rmdir()


def seen_by_nobody(base: Path) -> str:
    """Ray's folder as a process of another user finds it, for whom `base` is not writable and holds a foreign folder."""
    os.chown(base / "ray-0", 0, 0)
    (base / f"ray-{NOBODY}").mkdir()
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write, str(ray_nodes._folder({"TMPDIR": str(base)})).encode())
        finally:
            os._exit(0)
    os.wait()
    (base / f"ray-{NOBODY}").rmdir()
    return os.read(read, 1000).decode()


def test_without_any_folder_for_sockets_one_line_says_what_to_set(monkeypatch):
    monkeypatch.setattr(ray_nodes, "_unusable", lambda folder: "No space left on device")
    with pytest.raises(ClusterError, match=r"^Ray needs a folder .*ray-\d+ \(No space left on device\).*; set RAY_TMPDIR to a folder .*$"):
        ray_nodes._folder({})


def test_memory_is_reserved_beside_cpus_and_gpus():
    node = {"CPU": 8.0, "GPU": 0.0, "memory": 10 * 2.0**30}
    assert ray_nodes._fits(node, Resources(cpu=1)) == 8
    assert ray_nodes._fits(node, Resources(cpu=1, memory=4)) == 2
    assert ray_nodes.asked(Resources(memory=4)) == {"CPU": 1, "GPU": 0, "memory": 4 * 2**30}


# clusters


def refusal(address: str) -> str:
    """Why the cluster cannot be joined; found out within the bounds, and before `ray.init`."""
    with pytest.raises(ClusterError) as caught, ray_nodes.connect(address):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_dead_cluster_is_refused(monkeypatch):
    assert refusal("127.0.0.1:1").startswith("RAY_ADDRESS: nothing answers at 127.0.0.1:1: ")


@pytest.mark.slow
def test_a_server_that_is_no_cluster_is_refused(mute, monkeypatch):
    monkeypatch.setattr(ray_nodes, "PROBE_WITHIN_S", 5.0)
    assert f"what listens at {mute} does not answer as a Ray cluster within 5 s" in refusal(mute)


def test_a_stale_address_file_is_named_and_removing_it_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text("127.0.0.1:1")
    if any("gcs_server" in process.name() for process in psutil.process_iter()):
        pytest.skip("a Ray cluster runs on this machine, and `auto` would find it")
    assert f"nothing answers at 127.0.0.1:1: [Errno 111] Connection refused; remove {file}" in refusal("auto")
    file.unlink()
    assert "no cluster runs on this machine; start a node with `ray start`, or unset RAY_ADDRESS" in refusal("auto")


HEAD = """
import json, os, sys, time
import ray
from ray._common.usage import usage_constants
ray.init(address="local", include_dashboard=False, num_cpus=1, object_store_memory=2**27, log_to_driver=False, _temp_dir=sys.argv[1])
address = ray.get_runtime_context().gcs_address
print(address, flush=True)
for line in sys.stdin:
    client = ray._raylet.GcsClient(address=address)
    client.internal_kv_put(usage_constants.CLUSTER_METADATA_KEY, line.encode(), True, b"cluster")
    print("put", flush=True)
"""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A real cluster that announces whatever versions it is sent."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, f"/tmp/h{os.getpid()}"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process
        process.stdin.close()
        process.wait(timeout=30)


@pytest.mark.slow
def test_a_cluster_of_another_version_or_with_another_token_is_refused_before_ray_ends_the_process(head, monkeypatch):
    address = head.stdout.readline().strip()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert refusal(address).startswith("RAY_ADDRESS: the cluster refuses the token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)  # what the message says
    for versions in ({"ray_version": "2.9.0", "python_version": "3.11.7"}, {"ray_version": "2.60.0", "python_version": "3.9.1"}):
        head.stdin.write(json.dumps(versions) + "\n")
        head.stdin.flush()
        assert head.stdout.readline().strip() == "put"
        text = refusal(address)
        assert f"has Ray {versions['ray_version']} and Python {versions['python_version']}, this driver has Ray " in text
        assert text.endswith("; install the same versions on both")
    head.kill()
    deadline_s = time.monotonic() + 30
    while "nothing answers" not in refusal(address):
        assert time.monotonic() < deadline_s
