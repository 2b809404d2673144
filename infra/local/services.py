"""Defines each server: its command, its files and its health check."""

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
"""Also loopback. Ray replaces 127.0.0.1 by the machine's own address. Ray still listens on every interface; the token protects it."""


def postgres_part(folder: Path, *, data: Path, port: int, password: str, owner: str | None) -> StackPart:
    """PostgreSQL with the user `mlflow` only. Clients find the password in the file `pgpass`."""
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
        end_signal=signal.SIGINT,  # SIGTERM would wait until MLflow disconnects
    )


def mlflow_part(folder: Path, *, port: int, database: str, environment: dict[str, str] | None = None) -> StackPart:
    """`mlflow server` on `database`, with artifacts in `folder`."""
    command = [_path("mlflow"), "server", "--backend-store-uri", database, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--no-serve-artifacts", "--default-artifact-root", str(folder / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # not /health, which answers even without the database
    probe = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    return StackPart(
        "mlflow",
        command,
        log=folder / "mlflow.log",
        check=lambda: _status(probe) == 200,
        environment=quiet | (environment or {}),
        deadline_s=240,
    )


def s3_part(folder: Path, *, ports: Sequence[int], access_key: str, secret_key: str) -> StackPart:
    """SeaweedFS: an S3 server in one process, with one pair of keys. The servers below it refuse plain HTTP that S3 has not signed."""
    data, config = folder / "s3", folder / "s3.json"
    keys = [{"accessKey": access_key, "secretKey": secret_key}]
    identity = {"name": "admin", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}

    def prepare() -> None:
        data.mkdir(parents=True, exist_ok=True)
        write_private(config, json.dumps({"identities": [identity]}))

    signed = ("WEED_JWT_FILER_SIGNING_KEY", "WEED_JWT_FILER_SIGNING_READ_KEY", "WEED_JWT_SIGNING_KEY")
    return StackPart(
        "s3",
        _weed_command(data, config, ports),
        log=folder / "weed.log",
        # once S3 and its identities are loaded, an unsigned request is refused
        check=lambda: _status(f"http://127.0.0.1:{ports[3]}") == 403,
        environment={name: secrets.token_hex(32) for name in signed},
        prepare=prepare,
    )


def ray_head(folder: Path, *, port: int, scratch: Path, environment: dict[str, str]) -> StackPart:
    """The Ray head node. It runs no trials."""
    flags = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={scratch}/ray"]
    shared = {name: value for name, value in environment.items() if name.startswith("RAY_AUTH")}
    no_drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # there is nothing to drain, and draining takes 30 s
    return _ray_part(folder, "ray-head", flags, shared | no_drain)


def ray_worker(folder: Path, name: str, cpus: int, environment: dict[str, str]) -> StackPart:
    """A Ray worker node. It runs trials, so it gets the keys of the store."""
    shared = {name: value for name, value in environment.items() if name.startswith(("AWS_", "RAY_AUTH"))}
    return _ray_part(folder, name, [f"--address={environment['RAY_ADDRESS']}", f"--num-cpus={cpus}"], shared)


def write_private(path: Path, text: str) -> None:
    """Write a file atomically. Only its owner can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def _ray_part(folder: Path, name: str, flags: list[str], environment: dict[str, str]) -> StackPart:
    log = folder / f"{name}.log"
    command = [_path("ray"), "start", "--block", f"--node-ip-address={RAY_HOST}", "--num-gpus=0", f"--object-store-memory={2**27}", *flags]

    def started() -> bool:
        """Ray prints this once the node is registered. `ray start --block` exits when a process of the node dies."""
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
        "-s3.port.iceberg=0",  # the default ports are fixed, so two servers would conflict
        "-s3.port.lance=0",
        "-disableHttp",  # of master and filer, where anybody could read and delete what S3 keeps
        "-volume.max=0",
        "-master.volumeSizeLimitMB=64",
        "-master.electionTimeout=1s",  # default 10 s, which delays every restart
        "-master.telemetry=false",
    ]


def _create_database(data: Path, password: str, owner: str | None) -> None:
    """Create a database cluster with the user and the database `mlflow`. Does nothing if it exists."""
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
    quiet = ["-c", "exit_on_error=on", "-c", "log_min_error_statement=panic"]  # keeps the password out of the log
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
