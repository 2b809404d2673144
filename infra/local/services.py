"""What each server is: its command, its files and how one sees that it answers."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from infra.local.parts import StackError, StackPart, as_user, clean_environment, program

RAY_HOST = "127.0.0.2"
"""Loopback too, but Ray would put the machine's own address in place of 127.0.0.1. It listens on every interface all the same: the token
guards it."""


def postgres_part(folder: Path, *, data: Path, port: int, password: str, owner: str | None) -> StackPart:
    """PostgreSQL with the one user `mlflow`, whose password a client finds in the file `pgpass`; nobody else can log in."""
    pgpass = folder / "pgpass"

    def prepare() -> None:
        write_private(pgpass, f"127.0.0.1:*:mlflow:mlflow:{password}\n")
        _create_database(data, password, owner)

    command = [_path("postgres"), "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
    return StackPart(
        "postgres",
        command,
        log=folder / "postgres.log",
        check=lambda: _database_answers(port, pgpass),
        prepare=prepare,
        owner=owner,
        end_signal=signal.SIGINT,  # SIGTERM would wait for MLflow to hang up
    )


def mlflow_part(folder: Path, *, port: int, database: str, environment: dict[str, str] | None = None) -> StackPart:
    """`mlflow server` on `database`, its artifacts in `folder`."""
    command = [_path("mlflow"), "server", "--backend-store-uri", database, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--no-serve-artifacts", "--default-artifact-root", str(folder / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # not /health, which answers without the database too
    answer = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    return StackPart(
        "mlflow",
        command,
        log=folder / "mlflow.log",
        check=lambda: _status(answer) == 200,
        environment=quiet | (environment or {}),
        deadline_s=240,
    )


def s3_part(folder: Path, *, ports: Sequence[int], access_key: str, secret_key: str) -> StackPart:
    """SeaweedFS, a whole S3 store in one process, that knows one pair of keys."""
    data, config = folder / "s3", folder / "s3.json"
    keys = [{"accessKey": access_key, "secretKey": secret_key}]
    identity = {"name": "admin", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}

    def prepare() -> None:
        data.mkdir(parents=True, exist_ok=True)
        write_private(config, json.dumps({"identities": [identity]}))

    return StackPart(
        "s3",
        _weed_command(data, config, ports),
        log=folder / "weed.log",
        # an unsigned request is refused once the S3 part and its identities are there
        check=lambda: _status(f"http://127.0.0.1:{ports[3]}") == 403,
        prepare=prepare,
    )


def ray_head(folder: Path, *, port: int, scratch: Path, environment: dict[str, str]) -> StackPart:
    """The head: bookkeeping and the driver's objects, no trials."""
    flags = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={scratch}/ray"]
    shared = {name: value for name, value in environment.items() if name.startswith("RAY_AUTH")}
    at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # it holds nothing to drain, and would take 30 s for that
    return _ray_part(folder, "ray-head", flags, shared | at_once)


def ray_worker(folder: Path, name: str, cpus: int, environment: dict[str, str]) -> StackPart:
    """A node that runs trials, and so knows the store's keys."""
    shared = {name: value for name, value in environment.items() if name.startswith(("AWS_", "RAY_AUTH"))}
    return _ray_part(folder, name, [f"--address={environment['RAY_ADDRESS']}", f"--num-cpus={cpus}"], shared)


def write_private(path: Path, text: str) -> None:
    """Readable by its owner alone from the first byte on, and whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def _ray_part(folder: Path, name: str, flags: list[str], environment: dict[str, str]) -> StackPart:
    log = folder / f"{name}.log"
    command = [_path("ray"), "start", "--block", f"--node-ip-address={RAY_HOST}", "--num-gpus=0", f"--object-store-memory={2**27}", *flags]

    def started() -> bool:
        """Ray says so once the node is registered, and ends when a process of the node dies."""
        with suppress(FileNotFoundError):
            return "Ray runtime started" in log.read_text(errors="replace")
        return False

    return StackPart(name, command, log=log, check=started, environment=environment | {"RAY_USAGE_STATS_ENABLED": "0"})


def _weed_command(data: Path, config: Path, ports: Sequence[int]) -> list[str]:
    master, volume, filer, s3 = ports
    return [
        _path("weed"),
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",  # fixed ports otherwise: two servers at once would clash
        "-s3.port.lance=0",
        "-volume.max=0",
        "-master.volumeSizeLimitMB=64",
        "-master.electionTimeout=1s",  # 10 s otherwise: a restarted server of one waits for rivals first
        "-master.telemetry=false",
    ]


def _create_database(data: Path, password: str, owner: str | None) -> None:
    """An empty cluster with the user and the database `mlflow`; nothing happens where there is one."""
    if data.exists():
        return
    new = data.with_name("postgres.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    if owner:
        shutil.chown(new, owner, pwd.getpwnam(owner).pw_gid)
    _command([_path("initdb"), "-D", str(new), "-A", "reject", "-E", "UTF8", "--no-locale", "-U", "postgres"], owner)
    (new / "pg_hba.conf").write_text("host mlflow mlflow 127.0.0.1/32 scram-sha-256\n")
    statements = f"create role mlflow login password '{password}';\ncreate database mlflow owner mlflow;\n"
    quiet = ["-c", "exit_on_error=on", "-c", "log_min_error_statement=panic"]  # the log is no place for the password
    _command([_path("postgres"), "--single", "-D", str(new), *quiet, "postgres"], owner, statements)
    new.rename(data)


def _command(command: list[str], owner: str | None, text: str = "") -> None:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, cwd="/", timeout=120, env=clean_environment(), **as_user(owner)
    )
    if done.returncode:
        raise StackError(f"postgres: {Path(command[0]).name} failed: {' | '.join(done.stderr.split(chr(10)))[-400:].strip()}")


def _database_answers(port: int, pgpass: Path) -> bool:
    import psycopg2

    try:
        psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="mlflow", passfile=str(pgpass), connect_timeout=3).close()
    except psycopg2.OperationalError:
        return False
    return True


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=3) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _path(name: str) -> str:
    return program(name) or name
