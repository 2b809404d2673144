"""Real servers for the tests: each in its own process group, awaited with a deadline, and always stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


class ServerError(Exception):
    """A test server didn't start; the text ends with its log."""


def free_port(*, grpc: bool = False) -> int:
    """A TCP port of 127.0.0.1 that is free now; with `grpc`, port + 10000 is free too (SeaweedFS takes both)."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            if not grpc:
                return port
            try:
                second.bind(("127.0.0.1", port + 10000))
            except (OSError, OverflowError):
                continue
            return port


def program(name: str) -> str | None:
    """The path of a program that lies beside this Python or on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def wait_until(ready: Callable[[], bool], *, deadline_s: float, what: str) -> None:
    """Poll `ready` ten times a second; raises TimeoutError after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline_s:g} s")
        time.sleep(0.1)


@dataclass
class Process:
    """A server process that leads its own group, so that nothing it starts outlives it."""

    command: list[str]
    log: Path
    env: Mapping[str, str] | None = None
    _popen: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.env, start_new_session=True)

    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def stop(self, *, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after `grace_s`."""
        if self.running():
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group, as a power cut would."""
        if self._popen is not None:
            self._signal(signal.SIGKILL)
            self._popen.wait(10)
            self._popen = None

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)


@dataclass
class S3Server:
    """SeaweedFS, a whole S3 store in one process; `folder` keeps its data over kill() and start()."""

    folder: Path
    access_key: str = "testkey"
    secret_key: str = "testsecret"
    ports: list[int] = field(default_factory=list)
    _process: Process | None = field(default=None, repr=False)

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
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, *, deadline_s: float = 60.0) -> None:
        """Start, and wait until a bucket can be listed. A first start tries other ports when one was taken meanwhile."""
        for _ in range(1 if self.ports else 3):
            ports = self.ports or [free_port(grpc=True) for _ in range(4)]
            self._launch(ports)
            try:
                wait_until(lambda: self._answers() or not self._process.running(), deadline_s=deadline_s, what="SeaweedFS")
            except BaseException:
                self.kill()
                raise
            if self._process.running():
                return
        raise ServerError(f"SeaweedFS did not start:\n{self._process.log.read_text()[-2000:]}")

    def launch(self) -> None:
        """Start again on the same ports and return at once."""
        self._launch(self.ports)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def make_bucket(self, name: str) -> None:
        import boto3

        boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        ).create_bucket(Bucket=name)

    def _launch(self, ports: list[int]) -> None:
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        config = self.folder / "s3.json"
        config.write_text(json.dumps(self._identities()))
        self.ports = ports
        self._process = Process(_weed_command(self.folder / "data", config, ports), self.folder / "weed.log")
        self._process.start()

    def _identities(self) -> dict[str, object]:
        keys = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        return {"identities": [{"name": "admin", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}

    def _answers(self) -> bool:
        """An unsigned request is refused with 403 once the S3 part and its identities are there."""
        try:
            urllib.request.urlopen(self.endpoint, timeout=2).close()
        except urllib.error.HTTPError as error:
            return error.code == 403
        except OSError:
            return False
        return True


def _weed_command(data: Path, config: Path, ports: list[int]) -> list[str]:
    master, volume, filer, s3 = ports
    return [
        program("weed") or "weed",
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
        "-master.telemetry=false",
    ]


class ForgetfulProxy:
    """A TCP proxy that, once `lose_next_reply_to` is set to a method such as b"PUT", swallows one reply and hangs up.

    It can also damage what passes: in every reply the first bytes of `tamper` become the second.
    """

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lose_next_reply_to: bytes | None = None
        self.replies_lost = 0
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
    port: int = 0
    _process: Process | None = field(default=None, repr=False)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, deadline_s: float = 90.0) -> None:
        """Start, and wait until /health answers. A first start tries other ports when one was taken meanwhile."""
        for _ in range(1 if self.port else 3):
            self.launch(self.port or free_port())
            try:
                wait_until(lambda: self.answers() or not self._process.running(), deadline_s=deadline_s, what="MLflow")
            except BaseException:
                self.kill()
                raise
            if self._process.running():
                return
            self.port = 0
        raise ServerError(f"MLflow did not start:\n{self._process.log.read_text()[-2000:]}")

    def launch(self, port: int) -> None:
        """Start and return at once."""
        self.port = port
        command = [program("mlflow") or "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
        command += ["--default-artifact-root", str(self.database.parent / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = Process(command, self.database.with_suffix(".log"), environment)
        self._process.start()

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as reply:
                return reply.status == 200
        except OSError:
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()


def mlflow_template(folder: Path) -> Path:
    """An empty, migrated MLflow database: migrating takes far longer than copying this file."""
    import logging

    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    template = folder / "template.db"
    MlflowClient(tracking_uri=f"sqlite:///{template}").search_experiments()
    return template
