"""The faults of tests/chaos/chaos.py: injection, affected resources and recovery."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from faulty_proxy import FaultyProxy, Mode
from processes import Sweep

from orchestration.record.manifest import Manifest

DRIVER_ENDS_S = 100.0
"""Limit for a driver after SIGTERM or a refused lease: 25 s for the last checkpoints, 60 s for MLflow."""


class Bucket:
    """The store's bucket without the proxy, with short timeouts, because the server is often down."""

    def __init__(self, environment: dict[str, str], endpoint: str) -> None:
        import boto3
        from botocore.config import Config

        self.name, _, prefix = environment["RRN_STORE"].removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment["AWS_DEFAULT_REGION"],
            config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}),
        )

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix + prefix)
        return [entry["Key"].removeprefix(self.prefix) for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=self.prefix + key)["Body"].read()

    def write(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=self.prefix + key, Body=body)

    def uploads(self, prefix: str) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.name, Prefix=self.prefix + prefix)
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def manifests(self, sweep: str) -> list[Manifest]:
        keys = [key for key in self.keys(f"{sweep}/") if key.endswith("/manifest.json")]
        return [Manifest.model_validate_json(self.read(key)) for key in keys]


@dataclass(frozen=True)
class Disk:
    """A small file system to fill up."""

    folder: Path

    def mount(self) -> None:
        """Raises CalledProcessError without the permission to mount."""
        self.folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "chaos", self.folder], check=True, capture_output=True, timeout=10)

    def fill(self) -> None:
        with suppress(OSError), (self.folder / "full").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))

    def free(self) -> None:
        (self.folder / "full").unlink(missing_ok=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=False, capture_output=True, timeout=10)


@dataclass
class Scene:
    """The parts of a running sweep that faults can hit."""

    parts: dict[str, Any]
    proxy: FaultyProxy
    bucket: Bucket
    disks: dict[str, Disk]
    """TMPDIR of `driver` and `trials`; empty without the permission to mount."""
    command: Callable[[], Sweep]
    """Starts the driver's command again."""
    processes: Callable[[], dict[int, str]]
    """PIDs and commands of all processes of the harness."""
    sweep: str = ""
    driver: Sweep | None = None
    """The current driver."""
    violations: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    """Set during the shutdown of the harness: nothing is restarted any more."""

    def violated(self, text: str) -> None:
        """Record a violation; during the shutdown of the harness it is ignored."""
        if not self.over.is_set():
            self.violations.append(text)

    def driver_works(self) -> bool:
        """Whether the driver runs and has the lease."""
        return self.driver is not None and self.driver.process.poll() is None and f"sweep {self.sweep}: " in self.driver.text

    def trials(self) -> list[int]:
        """PIDs of the workers."""
        return sorted(pid for pid, command in self.processes().items() if command.startswith("ray::ResourceTrainable"))


@dataclass(frozen=True)
class Injected:
    """A fault that was injected."""

    what: str
    recover: Callable[[], bool] = lambda: True
    """Blocks until the fault is over. Returns whether it hit anything."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `cards`: how often it occurs in thirty faults; `touches`: resources that no two faults affect at once."""

    name: str
    cards: int
    touches: frozenset[str]
    deal: Callable[[Scene, random.Random], Injected | None]
    """Inject the fault; None if there is nothing to hit."""


def kinds(scene: Scene) -> list[Kind]:
    """All kinds of fault that this machine allows."""
    workers = frozenset({"ray-worker-1", "ray-worker-2"})
    found = [
        Kind("driver killed", 3, frozenset({"driver"}), _kill_driver),
        Kind("driver terminated", 2, frozenset({"driver"}), _end_driver),
        Kind("second driver", 2, frozenset({"driver"}), _second_driver),
        Kind("trial killed", 3, frozenset(), partial(_signal_trial, number=signal.SIGKILL)),
        Kind("trial terminated", 3, frozenset(), partial(_signal_trial, number=signal.SIGTERM)),
        Kind("checkpoint damaged", 2, frozenset(), _damage_checkpoint),
        Kind("node killed", 2, workers, _kill_node),
        Kind("head killed", 1, workers | {"ray-head"}, _kill_head),
        Kind("S3 killed", 1, frozenset({"s3"}), partial(_kill_part, name="s3")),
        Kind("MLflow killed", 2, frozenset({"mlflow"}), partial(_kill_part, name="mlflow")),
        Kind("PostgreSQL killed", 1, frozenset({"postgres"}), partial(_kill_part, name="postgres")),
        Kind("S3 answers 503", 2, frozenset({"proxy"}), partial(_disturb, mode="busy")),
        Kind("S3 hangs", 2, frozenset({"proxy"}), partial(_disturb, mode="hang")),
        Kind("S3 cuts connections", 2, frozenset({"proxy"}), partial(_disturb, mode="cut")),
    ]
    disks = [Kind(f"disk of the {whose} full", 1, frozenset({"proxy", whose}), partial(_fill, whose=whose)) for whose in scene.disks]
    return found + disks


RAY_ABORTED = "You have likely discovered a bug in Ray"
"""Ray's message when it aborts a driver whose head node was killed."""


def _kill_driver(scene: Scene, draw: random.Random) -> Injected | None:
    if scene.driver is None or scene.driver.process.poll() is not None:
        return None
    scene.driver.process.kill()
    return Injected(f"pid {scene.driver.process.pid}")


def _end_driver(scene: Scene, draw: random.Random) -> Injected | None:
    """SIGTERM. Exit code must be 75, or 0 if the sweep was finished; any code if Ray aborted the process."""
    driver = scene.driver
    if driver is None or not scene.driver_works():
        return None
    driver.process.terminate()

    def ended() -> bool:
        code = _exit_code(driver)
        if code not in (75, 0) and RAY_ABORTED not in driver.text:
            scene.violated(f"a driver exited with {code} after SIGTERM, expected 75: {driver.log}")
        return True

    return Injected(f"pid {driver.process.pid}", ended)


def _second_driver(scene: Scene, draw: random.Random) -> Injected | None:
    """A second driver must be refused while the first one has the lease."""
    first = scene.driver
    if first is None or not scene.driver_works():
        return None
    second = scene.command()

    def refused() -> bool:
        code = _exit_code(second)
        second.end()
        if first.process.poll() is not None:
            return False  # the first one ended: the second one may have run
        if code != 2:
            scene.violated(f"a second driver exited with {code}, expected 2: {second.log}")
        return code == 2

    return Injected(f"pid {second.process.pid}", refused)


def _signal_trial(scene: Scene, draw: random.Random, *, number: int) -> Injected | None:
    if not (pids := scene.trials()):
        return None
    pid = draw.choice(pids)
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return Injected(f"pid {pid}")
    return None


def _damage_checkpoint(scene: Scene, draw: random.Random) -> Injected | None:
    """Damage the newest checkpoint of an unfinished trial, then kill all workers, so that it is read."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        begun = [(m, max(m.checkpoints, key=lambda c: c.step)) for m in scene.bucket.manifests(scene.sweep) if m.checkpoints]
        newest = [checkpoint for m, checkpoint in begun if m.status != "finished" and checkpoint.step < m.iterations]
        pids = scene.trials()
        if not newest or not pids:
            return None
        key = draw.choice(sorted(ref.key for ref in draw.choice(newest).objects.values()))
        body = scene.bucket.read(key)
        at = draw.randrange(len(body))
        flipped = body[:at] + bytes([body[at] ^ (1 << draw.randrange(8))]) + body[at + 1 :]
        scene.bucket.write(key, damaged := draw.choice([body[:at], flipped]))
    except (BotoCoreError, ClientError):  # the server is down, or the checkpoint was just replaced
        return None
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return Injected(f"{key} {'truncated' if len(damaged) < len(body) else 'flipped a bit'} at {at} of {len(body)}, killed {pids}")


def _kill_node(scene: Scene, draw: random.Random) -> Injected | None:
    return _kill_part(scene, draw, name=draw.choice(["ray-worker-1", "ray-worker-2"]))


def _kill_part(scene: Scene, draw: random.Random, *, name: str) -> Injected | None:
    part = scene.parts[name]
    if not part.running():
        return None
    away_s = draw.uniform(1, 6)
    part.kill()
    return Injected(f"{name} for {away_s:.1f} s", lambda: _restart(scene, [name], away_s))


def _kill_head(scene: Scene, draw: random.Random) -> Injected | None:
    """Worker nodes end with the head; they are restarted after it."""
    if not scene.parts["ray-head"].running():
        return None
    away_s = draw.uniform(1, 6)
    names = ["ray-head", "ray-worker-1", "ray-worker-2"]
    for name in names:
        scene.parts[name].kill()
    return Injected(f"all of Ray for {away_s:.1f} s", lambda: _restart(scene, names, away_s))


def _disturb(scene: Scene, draw: random.Random, *, mode: Mode) -> Injected | None:
    if not scene.driver_works():
        return None
    seconds, before = draw.uniform(4, 10), scene.proxy.hits

    def over() -> bool:
        with scene.proxy.disturbed(mode):
            scene.over.wait(seconds)
        return scene.proxy.hits > before

    return Injected(f"for {seconds:.1f} s", over)


def _fill(scene: Scene, draw: random.Random, *, whose: str) -> Injected | None:
    """Fill a disk while the store hangs, because only then a trial needs its disk."""
    if not scene.driver_works() or (whose == "trials" and not scene.trials()):
        return None
    seconds, disk = draw.uniform(4, 10), scene.disks[whose]
    disk.fill()

    def over() -> bool:
        try:
            with scene.proxy.disturbed("hang"):
                scene.over.wait(seconds)
        finally:
            disk.free()
        return True

    return Injected(f"for {seconds:.1f} s", over)


def _restart(scene: Scene, names: list[str], away_s: float) -> bool:
    """Restart parts one after the other."""
    scene.over.wait(away_s)
    for name in [] if scene.over.is_set() else names:
        scene.parts[name].start()
    return True


def _exit_code(driver: Sweep) -> int:
    """The exit code; -9 if the driver had to be killed."""
    try:
        return driver.wait(deadline_s=DRIVER_ENDS_S)
    except TimeoutError:
        driver.process.kill()
        return driver.wait(deadline_s=10)
