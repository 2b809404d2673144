"""Real servers for the tests, each awaited with a deadline and always stopped; `infra/local` starts them for users too."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.parts import StackPart, free_ports, program, wait_until
from infra.local.services import mlflow_part, s3_part
from orchestration.store.base import Store
from orchestration.store.open import open_store

__all__ = ["ForgetfulProxy", "MlflowServer", "S3Server", "free_port", "fresh_s3", "mlflow_template", "program", "wait_until"]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    return free_ports(1)[0]


@dataclass
class S3Server:
    """SeaweedFS, a whole S3 store in one process; `folder` keeps its data over kill() and start()."""

    folder: Path
    access_key: str = "testkey"
    secret_key: str = "testsecret"
    ports: list[int] = field(default_factory=lambda: free_ports(4, above=10_000))

    def __post_init__(self) -> None:
        self.part: StackPart = s3_part(self.folder, ports=self.ports, access_key=self.access_key, secret_key=self.secret_key)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[3]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs; the empty files keep this machine's own AWS settings out of the tests."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start, and wait until it knows its keys."""
        self.part.start()

    def launch(self) -> None:
        """Start again on the same ports and return at once."""
        self.part.launch()

    def stop(self) -> None:
        self.part.stop(grace_s=5)

    def kill(self) -> None:
        self.part.kill()

    def make_bucket(self, name: str) -> None:
        import boto3

        boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        ).create_bucket(Bucket=name)


class ForgetfulProxy:
    """A TCP proxy that, once `lose_next_reply_to` is set to a method such as b"PUT", swallows one reply and hangs up, or stays `silent`.

    It can also damage what passes: in every reply the first bytes of `tamper` become the second.
    """

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lose_next_reply_to: bytes | None = None
        self.replies_lost = 0
        self.silent = False
        self.tamper: tuple[bytes, bytes] = (b"", b"")
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        seen = [b""]  # the method of the newest request on this connection
        with client, socket.create_connection(self._target, timeout=30) as server:
            upward = threading.Thread(target=self._pump_requests, args=(client, server, seen), daemon=True)
            upward.start()
            with suppress(OSError):
                while reply := server.recv(65536):
                    if self._loses(reply, seen[0]):
                        if self.silent:
                            continue
                        break
                    client.sendall(reply.replace(*self.tamper) if self.tamper[0] else reply)
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            upward.join(10)

    def _pump_requests(self, client: socket.socket, server: socket.socket, seen: list[bytes]) -> None:
        with suppress(OSError):
            while part := client.recv(65536):
                word = part.split(b" ", 1)[0]
                if word in (b"GET", b"PUT", b"DELETE", b"HEAD", b"POST"):
                    seen[0] = word
                server.sendall(part)
            server.shutdown(socket.SHUT_WR)

    def _loses(self, reply: bytes, method: bytes) -> bool:
        if self.lose_next_reply_to != method or reply.startswith(b"HTTP/1.1 100"):
            return False
        self.lose_next_reply_to = None
        self.replies_lost += 1
        return True


@dataclass
class MlflowServer:
    """`mlflow server` on a SQLite database that outlives kill() and start(); `mlflow_template` makes one to copy."""

    database: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.part: StackPart = mlflow_part(self.database.parent / self.database.stem, port=self.port, database=f"sqlite:///{self.database}")

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        self.part.start()

    def stop(self) -> None:
        self.part.stop(grace_s=5)

    def kill(self) -> None:
        self.part.kill()


def mlflow_template(folder: Path) -> Path:
    """An empty, migrated MLflow database: migrating takes far longer than copying this file."""
    import logging

    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    template = folder / "template.db"
    MlflowClient(tracking_uri=f"sqlite:///{template}").search_experiments()
    return template


def fresh_s3(*, deadline_s: float = 30.0) -> Store:
    """A store of its own in the bucket of the shared server; needs the fixture `s3_environment`."""
    return open_store(f"s3://rrn-test/{uuid.uuid4().hex}/sub", deadline_s=deadline_s)
