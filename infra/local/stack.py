"""Runs the production services on one machine without containers: PostgreSQL, MLflow, S3, and a Ray head with two worker nodes.

Usage: `python -m infra.local.stack up|down|status`. All state is in one folder, except Ray's files and, for root, the database.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from infra.local.parts import StackError, StackPart, free_ports, port_is_free
from infra.local.services import RAY_HOST, mlflow_part, postgres_part, ray_head, ray_worker, s3_part, write_private

BUCKET = "rrn"

SHORT = Path("/var/tmp")
"""Folder of Ray's sockets. The path of a socket is limited to 107 characters, and other folders may be longer."""


@dataclass(frozen=True)
class Settings:
    """Ports, keys, and a scratch folder with a short path that every user can enter. Chosen by the first `up`."""

    postgres: int
    mlflow: int
    s3: Sequence[int]  # master, volume, filer, S3 itself
    ray: int
    scratch: str
    password: str
    access_key: str
    secret_key: str
    token: str


class Stack:
    """All parts of one folder. The same folder gives the same ports, keys and data.

    `cpus`: CPUs of each Ray worker node. `say`: receives a line when a part starts or stops.
    """

    def __init__(self, folder: Path, *, cpus: int = 1, say: Callable[[str], None] = lambda line: None) -> None:
        if not Path("/proc/self/stat").exists():
            raise StackError("the local stack needs Linux: it finds its processes in /proc")
        self._folder, self._cpus, self._say = folder.resolve(), cpus, say
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._use(_stored(self._folder) or _chosen())
        if not any(part.running() for part in self.parts.values()) and not all(port_is_free(port) for port in _ports(self._settings)):
            self._use(replace(self._settings, **_free()))  # another program took a port while the stack was down

    def up(self) -> None:
        """Start the parts that are not running, in order, and wait for each.

        Raises:
            StackError: a part does not start or does not answer. The parts that this call started are stopped.
        """
        started: list[StackPart] = []
        try:
            for part in self.parts.values():
                if part.running():
                    part.wait()
                    continue
                if part.name == "ray-head":  # worker nodes die with the head that they joined
                    self._stop(name for name in self.parts if name.startswith("ray-worker"))
                self._say(f"{part.name}: starting")
                part.start()
                started.append(part)
                if part.name == "s3":
                    _make_bucket(self.environment)
        except BaseException:
            for part in reversed(started):
                part.stop()
            raise

    def down(self) -> None:
        """Stop all parts. Keeps data, ports and keys."""
        self._stop(reversed(self.parts))

    def delete(self) -> None:
        """Stop all parts and delete their data."""
        self.down()
        shutil.rmtree(self._settings.scratch, ignore_errors=True)
        shutil.rmtree(self._folder)

    def _stop(self, names: Iterable[str]) -> None:
        for part in [self.parts[name] for name in names]:
            if part.running():
                self._say(f"{part.name}: stopping")
            part.stop()

    def _use(self, settings: Settings) -> None:
        """Create the parts, and write the files with settings and keys."""
        self._settings, folder = settings, self._folder
        token = folder / "ray-token"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{settings.s3[3]}",
            "AWS_ACCESS_KEY_ID": settings.access_key,
            "AWS_SECRET_ACCESS_KEY": settings.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "RRN_STORE": f"s3://{BUCKET}/sweeps",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{settings.mlflow}",
            "RAY_ADDRESS": f"{RAY_HOST}:{settings.ray}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        write_private(folder / "stack.json", json.dumps(asdict(settings), indent=2))
        write_private(folder / "secrets.env", "".join(f"{name}='{value}'\n" for name, value in self.environment.items()))
        write_private(token, settings.token)
        owner = _database_owner()
        database = Path(settings.scratch) if owner else folder  # other users cannot enter root's folders
        parts = [
            postgres_part(folder, data=database / "postgres", port=settings.postgres, password=settings.password, owner=owner),
            mlflow_part(
                folder,
                port=settings.mlflow,
                database=f"postgresql+psycopg2://mlflow@127.0.0.1:{settings.postgres}/mlflow",
                environment={"PGPASSFILE": str(folder / "pgpass")},
            ),
            s3_part(folder, ports=settings.s3, access_key=settings.access_key, secret_key=settings.secret_key),
            ray_head(folder, port=settings.ray, scratch=Path(settings.scratch), environment=self.environment),
            *(ray_worker(folder, f"ray-worker-{number}", self._cpus, self.environment) for number in (1, 2)),
        ]
        self.parts = {part.name: part for part in parts}


def _make_bucket(environment: dict[str, str]) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
        config=Config(retries={"mode": "standard", "total_max_attempts": 8}),
    )
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)


def _stored(folder: Path) -> Settings | None:
    """The settings of an earlier `up`, with a new scratch folder if the system has deleted the old one. None before the first `up`."""
    try:
        settings = Settings(**json.loads((folder / "stack.json").read_text()))
    except FileNotFoundError:
        return None
    return settings if Path(settings.scratch).is_dir() else replace(settings, scratch=_scratch())


def _chosen() -> Settings:
    password, access_key, secret_key, token = (secrets.token_hex(32) for _ in range(4))
    return Settings(**_free(), password=password, access_key=access_key[:20], secret_key=secret_key, token=token, scratch=_scratch())


def _scratch() -> str:
    scratch = tempfile.mkdtemp(prefix="rrn-", dir=SHORT)
    Path(scratch).chmod(0o711)  # PostgreSQL's user must enter it
    return scratch


def _free() -> dict[str, Any]:
    postgres, mlflow, ray = free_ports(3)
    return {"postgres": postgres, "mlflow": mlflow, "ray": ray, "s3": free_ports(4, above=10_000)}


def _ports(settings: Settings) -> list[int]:
    return [settings.postgres, settings.mlflow, settings.ray, *settings.s3, *(port + 10_000 for port in settings.s3)]


def _database_owner() -> str | None:
    """The user that runs PostgreSQL, which refuses root. None: this user."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line. Exit codes: 0 success, 1 `status` found an unhealthy part, 2 a part cannot start."""
    arguments = _parser().parse_args(argv)
    try:
        sys.exit(COMMANDS[arguments.command](arguments))
    except StackError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _up(arguments: argparse.Namespace) -> int:
    stack = Stack(arguments.folder, cpus=arguments.cpus, say=_say)
    running = all(part.running() for part in stack.parts.values())
    stack.up()
    print("already up" if running else "up")
    print(f"runs:  {stack.environment['MLFLOW_TRACKING_URI']}/?workflowType=machine_learning")
    print(f"sweep: set -a; . {arguments.folder}/secrets.env; set +a; rrn-sweep sweeps/epsilon_grid.yaml")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    stack = _existing(arguments)
    stack.delete() if arguments.delete else stack.down()
    print(f"down; data and keys {'deleted' if arguments.delete else f'kept in {arguments.folder}'}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    healthy = True
    for part in _existing(arguments).parts.values():
        state = "healthy" if part.healthy() else "no answer" if part.running() else "not running"
        healthy = healthy and state == "healthy"
        print(f"{part.name:<14}{state:<17}{part.pid or '-':<9}{part.log}")
    return 0 if healthy else 1


COMMANDS = {"up": _up, "down": _down, "status": _show}


def _existing(arguments: argparse.Namespace) -> Stack:
    if not (arguments.folder / "stack.json").exists():
        raise StackError(f"{arguments.folder}: no stack in this folder; run `make stack`, or name its folder with --folder")
    return Stack(arguments.folder, say=_say)


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.local.stack", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=Path("runs/stack"), help="folder of data, logs and keys (default: runs/stack)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", parents=[common], help="start the parts that are not running")
    up.add_argument("--cpus", type=int, default=1, help="CPUs of each of the two Ray worker nodes (default: 1)")
    down = commands.add_parser("down", parents=[common], help="stop all parts")
    down.add_argument("--delete", action="store_true", help="also delete data and keys")
    commands.add_parser("status", parents=[common], help="show one line per part")
    return parser


if __name__ == "__main__":
    main()
