"""Chaos: a sweep on the real stack, under random faults, must end exactly as the undisturbed one; `--help` says how to run it."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).parent.parent))  # a script finds its own folder only

import chaos_invariants as invariants
from chaos_faults import Bucket, Disk, Scene, kinds
from chaos_rounds import Deck, Report, Round, Story
from faulty_proxy import FaultyProxy
from mlflow import MlflowClient
from processes import Sweep, run_sweep
from servers import wait_until

from infra.local.parts import program
from infra.local.stack import Stack
from orchestration.record.manifest import Manifest

SWEEP = """
name: {name}
preset: digits
base: {{train_images: 48, val_images: 4, batch_size: 4, epochs: 5, warmup_epochs: 0}}
grid: {{partition: ["1/8", "1/4"], eps: [0.4, 0.5, 0.6]}}
retries: {{lost: 1000, unavailable: 1000, code: 3, memory: 3}}
"""
LOGS = ("*.log", "*.log.old", "*.out", "*.err", "log-*.txt")

LACKS = "MLflow lacks something"
"""What a driver says when MLflow, or its place for files, was away to the very end."""

MARK = "RRN_CHAOS"
"""Set in the environment of all that the harness starts, so that nothing of it is left behind."""


class Chaos:
    """The stack, the undisturbed sweep, and rounds of disturbed ones."""

    def __init__(self, stack: Stack, scene: Scene, folder: Path, environment: Mapping[str, str], story: Story, report: Report) -> None:
        self._stack, self._scene, self._folder, self._environment = stack, scene, folder, environment
        self._story, self._report = story, report
        self._calm: list[Manifest] = []

    def run(self) -> None:
        scene, report = self._scene, self._report
        draw = random.Random(report.seed)
        deck = Deck(kinds(scene), draw)
        self._undisturbed()
        while report.dealt.total() < report.faults:
            report.rounds += 1
            name = f"round-{report.rounds}"
            self._write(name)
            self._story.tell(f"{name} begins")
            Round(scene, name, deck, draw, self._story, report).run()
            self._story.tell(f"{name} is finished")
            wrong = self._judged(name)
            scene.violations += wrong
            self._story.tell(f"{name} is judged: {len(wrong)} violations")

    def _undisturbed(self) -> None:
        self._write("calm")
        code, text = self._command("calm.yaml", deadline_s=900)
        assert code == 0, text
        self._calm = self._scene.bucket.manifests("calm")
        self._story.tell(f"the undisturbed sweep is finished: {len(self._calm)} trials")

    def _judged(self, name: str) -> list[str]:
        """What is wrong after a round."""
        bucket, calm = self._scene.bucket, self._calm
        for part in self._stack.parts.values():
            wait_until(part.healthy, deadline_s=60, what=f"{part.name} healthy")
        last_words = self._scene.driver.text if self._scene.driver else ""
        found = invariants.released(bucket, name, last_words)
        code, text = self._command("gc", f"{name}.yaml")
        found += [] if code == 0 else [f"rrn-sweep gc ended with {code}: {text}"]
        found += invariants.litter(bucket, name)
        manifests = bucket.manifests(name)
        self._report.account(manifests)
        found += invariants.results(bucket, manifests, calm) + invariants.books(manifests)
        wrong, superseded = invariants.tracked(MlflowClient(tracking_uri=self._stack.environment["MLFLOW_TRACKING_URI"]), name, "calm")
        self._report.superseded += superseded
        if LACKS in last_words:  # the run that is given now adds it, the next one has nothing to do
            self._command(f"{name}.yaml")
        code, text = self._command(f"{name}.yaml")
        found += [] if code == 0 and "nothing to do" in text else [f"the finished sweep's command ended with {code}: {text}"]
        return found + wrong + invariants.leaks(self._secrets(), self._places(name))

    def _secrets(self) -> dict[str, bytes]:
        return {name: self._chosen()[name].encode() for name in ("password", "access_key", "secret_key", "token")}

    def _chosen(self) -> dict[str, Any]:
        """What the stack chose for itself."""
        return json.loads((self._folder / "stack" / "stack.json").read_text())

    def _places(self, name: str) -> Iterator[tuple[str, bytes]]:
        """Where no secret may stand."""
        yield from ((key, self._scene.bucket.read(key)) for key in self._scene.bucket.keys(f"{name}/"))
        logs = (path for root in (self._folder, Path(self._chosen()["scratch"])) for pattern in LOGS for path in root.rglob(pattern))
        yield from ((str(path), path.read_bytes()) for path in logs if path.is_file())
        yield "MLflow's database", self._dump()

    def _dump(self) -> bytes:
        command = [program("pg_dump") or "pg_dump", "-h", "127.0.0.1", "-p", str(self._chosen()["postgres"]), "-U", "mlflow", "mlflow"]
        environment = os.environ | {"PGPASSFILE": str(self._folder / "stack" / "pgpass")}
        return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout

    def _write(self, name: str) -> None:
        (self._folder / f"{name}.yaml").write_text(SWEEP.format(name=name))

    def _command(self, *arguments: str, deadline_s: float = 120) -> tuple[int, str]:
        return run_sweep(*arguments, cwd=self._folder, environment=self._environment, deadline_s=deadline_s)


def main() -> int:
    """Exit code 0: every invariant held."""
    arguments = _arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    story, report = Story(), Report(arguments.seed, arguments.faults)
    folder = Path(tempfile.mkdtemp(prefix="rrn-chaos-"))
    try:
        with _everything(folder, story, report) as chaos:
            chaos.run()
    except Exception as error:  # among them a sweep that hangs
        traceback.print_exc()
        report.violations.append(str(error))
    finally:
        if not report.violations and not arguments.keep:
            Stack(folder / "stack").delete()
            shutil.rmtree(folder)
    report.seconds = round(story.seconds, 1)
    _say(report, folder, arguments.out)
    return 1 if report.violations else 0


@contextmanager
def _everything(folder: Path, story: Story, report: Report) -> Iterator[Chaos]:
    """The whole scene; nothing of it is left when the context ends."""
    os.environ[MARK] = mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with ExitStack() as stack:
        stack.callback(_kill, mark)
        disks = _mounted(stack, folder, story, report)
        proxy = FaultyProxy()
        stack.callback(proxy.close)
        parts = Stack(folder / "stack")
        stack.callback(parts.down)
        stack.callback(_kill, mark, "orchestration.cli")
        endpoint = parts.environment["AWS_ENDPOINT_URL"]
        proxy.target = _address(endpoint)
        for name in ("ray-worker-1", "ray-worker-2"):
            parts.parts[name]._environment |= {"AWS_ENDPOINT_URL": proxy.endpoint}
            parts.parts[name]._environment |= {"TMPDIR": str(disks["trials"].folder)} if disks else {}
        parts.up()
        story.tell("the stack is up")
        ours = parts.environment | {"AWS_ENDPOINT_URL": proxy.endpoint, "PYTHONFAULTHANDLER": "1"}
        ours |= {"TMPDIR": str(disks["driver"].folder)} if disks else {}
        scene = Scene(
            parts=parts.parts,
            proxy=proxy,
            bucket=Bucket(parts.environment, endpoint),
            disks=disks,
            command=lambda: Sweep([f"{scene.sweep}.yaml"], cwd=folder, environment=ours),
            processes=lambda: _processes(mark),
            violations=report.violations,
        )
        stack.callback(scene.over.set)
        yield Chaos(parts, scene, folder, ours, story, report)


def _mounted(stack: ExitStack, folder: Path, story: Story, report: Report) -> dict[str, Disk]:
    """Small disks for the driver and the trials; none without the right to mount."""
    disks = {whose: Disk(folder / f"disk-{whose}") for whose in ("driver", "trials")}
    for disk in disks.values():
        try:
            disk.mount()
        except (OSError, subprocess.CalledProcessError):
            report.skipped.append("full disks: no right to mount")
            story.tell(report.skipped[-1])
            return {}
        stack.callback(disk.unmount)
    return disks


def _address(endpoint: str) -> tuple[str, int]:
    address = urlsplit(endpoint)
    assert address.hostname
    assert address.port
    return address.hostname, address.port


def _processes(mark: str) -> dict[int, str]:
    """Pids and commands of all others that carry the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return {pid: command for pid, command in found.items() if pid != os.getpid()}


def _kill(mark: str, words: str = "") -> None:
    """What carries the mark and has `words` in its command."""
    for pid, command in _processes(mark).items():
        if words in command:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _say(report: Report, folder: Path, out: Path | None) -> None:
    """Print the report, and how to repeat what went wrong."""
    told = {**vars(report), "effort": {name: round(seconds, 1) for name, seconds in report.effort.items()}}
    print(json.dumps(told, indent=2))
    if out:
        out.write_text(json.dumps(told, indent=2))
    for violation in report.violations:
        print(f"VIOLATED (seed {report.seed}): {violation}")
    if report.violations:
        print(f"again: python tests/chaos/chaos.py --seed {report.seed} --faults {report.faults}")
        print(f"logs: {folder}, and the scratch folder that {folder}/stack/stack.json names")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file for the report")
    parser.add_argument("--keep", action="store_true", help="leave logs and data even when all went well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
