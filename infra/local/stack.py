"""The production parts on one machine, without containers: PostgreSQL, MLflow, S3, and a Ray head with two worker nodes.

`python -m infra.local.stack up|down|status`; all that it keeps lies in one folder, but for Ray's files and, for root, the database.
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
"""Where Ray's sockets lie: a socket's path has at most 107 characters, and pytest's or a user's folders may have more."""


@dataclass(frozen=True)
class Settings:
    """What the first `up` chose for its folder: ports, keys, and a folder with a short name that every user can enter."""

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
    """All parts of one folder; the same folder gives the same ports, keys and data.

    `cpus` is what each Ray worker node offers; `say` hears which part is starting or stopping.
    """

    def __init__(self, folder: Path, *, cpus: int = 1, say: Callable[[str], None] = lambda line: None) -> None:
        if not Path("/proc/self/stat").exists():
            raise StackError("the local stack needs Linux: it finds its processes in /proc")
        self._folder, self._cpus, self._say = folder.resolve(), cpus, say
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._use(_kept(self._folder) or _chosen())
        if not any(part.running() for part in self.parts.values()) and not all(port_is_free(port) for port in _ports(self._settings)):
            self._use(replace(self._settings, **_free()))  # taken by others while the stack was down

    def up(self) -> None:
        """Start what is not running, in order, each awaited.

        Raises:
            StackError: a part does not start or does not answer; what this call started is gone again.
        """
        started: list[StackPart] = []
        try:
            for part in self.parts.values():
                if part.running():
                    part.wait()
                    continue
                if part.name == "ray-head":  # worker nodes do not outlive the head that they joined
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
        """End all of it; data, ports and keys stay."""
        self._stop(reversed(self.parts))

    def delete(self) -> None:
        """End all of it and remove its data."""
        self.down()
        shutil.rmtree(self._settings.scratch, ignore_errors=True)
        shutil.rmtree(self._folder)

    def _stop(self, names: Iterable[str]) -> None:
        for part in [self.parts[name] for name in names]:
            if part.running():
                self._say(f"{part.name}: stopping")
            part.stop()

    def _use(self, settings: Settings) -> None:
        """Build the parts, and write what their users read."""
        self._settings, folder = settings, self._folder
        token = folder / "ray-token"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{settings.s3[3]}",
            "AWS_ACCESS_KEY_ID": settings.access_key,
            "AWS_SECRET_ACCESS_KEY": settings.secret_key,
            "AWS_REGION": "us-east-1",
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
        database = Path(settings.scratch) if owner else folder  # others cannot enter root's folders
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
        region_name=environment["AWS_REGION"],
        config=Config(retries={"mode": "standard", "total_max_attempts": 8}),
    )
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)


def _kept(folder: Path) -> Settings | None:
    """What an earlier `up` chose; another folder with a short name where a tidy system has removed the old one."""
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
    Path(scratch).chmod(0o711)  # PostgreSQL's user passes through it
    return scratch


def _free() -> dict[str, Any]:
    postgres, mlflow, ray = free_ports(3)
    return {"postgres": postgres, "mlflow": mlflow, "ray": ray, "s3": free_ports(4, above=10_000)}


def _ports(settings: Settings) -> list[int]:
    return [settings.postgres, settings.mlflow, settings.ray, *settings.s3, *(port + 10_000 for port in settings.s3)]


def _database_owner() -> str | None:
    """Who runs PostgreSQL, which refuses root; None means this user."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 all is well, 1 `status` found a part that is not, 2 a part cannot start."""
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
    print(f"down; data and keys {'are gone' if arguments.delete else f'stay in {arguments.folder}'}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    healthy = True
    for part in _existing(arguments).parts.values():
        state = "healthy" if part.healthy() else "does not answer" if part.running() else "not running"
        healthy = healthy and state == "healthy"
        print(f"{part.name:<14}{state:<17}{part.pid or '-':<9}{part.log}")
    return 0 if healthy else 1


COMMANDS = {"up": _up, "down": _down, "status": _show}


def _existing(arguments: argparse.Namespace) -> Stack:
    if not (arguments.folder / "stack.json").exists():
        raise StackError(f"{arguments.folder}: no stack here; make stack, or name its folder with --folder")
    return Stack(arguments.folder, say=_say)


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.local.stack", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=Path("runs/stack"), help="state, data, logs and keys (default: runs/stack)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", parents=[common], help="start what is not running")
    up.add_argument("--cpus", type=int, default=1, help="CPUs that each of the two Ray worker nodes offers (default: 1)")
    down = commands.add_parser("down", parents=[common], help="end all of it")
    down.add_argument("--delete", action="store_true", help="and remove its data and keys")
    commands.add_parser("status", parents=[common], help="a line a part")
    return parser


if __name__ == "__main__":
    main()
