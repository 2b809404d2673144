"""Chaos test: a sweep under random faults on the real stack must give the same results as an undisturbed one."""

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

sys.path.extend(str(Path(__file__).parents[level]) for level in (2, 1))  # the root first: else tests/infra hides infra

import chaos_invariants as invariants
from chaos_faults import Bucket, Disk, Scene, kinds
from chaos_rounds import Deck, Log, Report, Round
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

MLFLOW_INCOMPLETE = ("MLflow lacks something", "MLflow is incomplete")
"""Messages of a driver that ended while MLflow or its artifact store was unavailable."""

MARK = "RRN_CHAOS"
"""Environment variable of every process that the harness starts, so that it can kill all of them."""


class Chaos:
    """Runs an undisturbed sweep, then sweeps under faults, and checks the invariants after each."""

    def __init__(self, stack: Stack, scene: Scene, folder: Path, environment: Mapping[str, str], log: Log, report: Report) -> None:
        self._stack, self._scene, self._folder, self._environment = stack, scene, folder, environment
        self._log, self._report = log, report
        self._undisturbed: list[Manifest] = []

    def run(self) -> None:
        scene, report = self._scene, self._report
        draw = random.Random(report.seed)
        deck = Deck(kinds(scene), draw)
        self._run_undisturbed()
        while report.dealt.total() < report.faults:
            report.rounds += 1
            name = f"round-{report.rounds}"
            self._write(name)
            self._log.write(f"{name} begins")
            Round(scene, name, deck, draw, self._log, report).run()
            self._log.write(f"{name} is finished")
            violations = self._check(name)
            scene.violations += violations
            self._log.write(f"{name} is checked: {len(violations)} violations")

    def _run_undisturbed(self) -> None:
        self._write("undisturbed")
        code, text = self._command("undisturbed.yaml", deadline_s=900)
        assert code == 0, text
        self._undisturbed = self._scene.bucket.manifests("undisturbed")
        self._log.write(f"the undisturbed sweep is finished: {len(self._undisturbed)} trials")

    def _check(self, name: str) -> list[str]:
        """The violated invariants after a round."""
        bucket, undisturbed = self._scene.bucket, self._undisturbed
        for part in self._stack.parts.values():
            wait_until(part.healthy, deadline_s=60, what=f"{part.name} healthy")
        output = self._scene.driver.text if self._scene.driver else ""
        found = invariants.released(bucket, name, output)
        code, text = self._command("gc", f"{name}.yaml")
        found += [] if code == 0 else [f"rrn-sweep gc exited with {code}: {text}"]
        found += invariants.litter(bucket, name)
        manifests = bucket.manifests(name)
        self._report.account(manifests)
        found += invariants.results(bucket, manifests, undisturbed) + invariants.accounting(manifests)
        client = MlflowClient(tracking_uri=self._stack.environment["MLFLOW_TRACKING_URI"])
        faults, superseded = invariants.tracked(client, name, "undisturbed")
        self._report.superseded += superseded
        if any(message in output for message in MLFLOW_INCOMPLETE):  # this run completes MLflow; the next one must have nothing to do
            self._command(f"{name}.yaml")
        code, text = self._command(f"{name}.yaml")
        found += [] if code == 0 and "nothing to do" in text else [f"the command of the finished sweep exited with {code}: {text}"]
        return found + faults + invariants.leaks(self._secrets(), self._places(name))

    def _secrets(self) -> dict[str, bytes]:
        return {name: self._settings()[name].encode() for name in ("password", "access_key", "secret_key", "token")}

    def _settings(self) -> dict[str, Any]:
        """Ports, folders and secrets that the stack chose."""
        return json.loads((self._folder / "stack" / "stack.json").read_text())

    def _places(self, name: str) -> Iterator[tuple[str, bytes]]:
        """Names and contents of everything that must not contain a secret."""
        yield from ((key, self._scene.bucket.read(key)) for key in self._scene.bucket.keys(f"{name}/"))
        logs = (path for root in (self._folder, Path(self._settings()["scratch"])) for pattern in LOGS for path in root.rglob(pattern))
        yield from ((str(path), path.read_bytes()) for path in logs if path.is_file())
        yield "MLflow's database", self._dump()

    def _dump(self) -> bytes:
        command = [program("pg_dump") or "pg_dump", "-h", "127.0.0.1", "-p", str(self._settings()["postgres"]), "-U", "mlflow", "mlflow"]
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
    log, report = Log(), Report(arguments.seed, arguments.faults)
    folder = Path(tempfile.mkdtemp(prefix="rrn-chaos-"))
    try:
        with _harness(folder, log, report) as chaos:
            chaos.run()
    except Exception as error:  # including a sweep that hangs
        traceback.print_exc()
        report.violations.append(str(error))
    finally:
        if not report.violations and not arguments.keep:
            Stack(folder / "stack").delete()
            shutil.rmtree(folder)
    report.seconds = round(log.seconds, 1)
    _print_report(report, folder, arguments.out)
    return 1 if report.violations else 0


@contextmanager
def _harness(folder: Path, log: Log, report: Report) -> Iterator[Chaos]:
    """Stack, proxy, disks and harness; everything is stopped when the context ends."""
    os.environ[MARK] = mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with ExitStack() as stack:
        stack.callback(_kill, mark)
        disks = _mounted(stack, folder, log, report)
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
        log.write("the stack is up")
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
        yield Chaos(parts, scene, folder, ours, log, report)


def _mounted(stack: ExitStack, folder: Path, log: Log, report: Report) -> dict[str, Disk]:
    """Small disks for the driver and the trials; empty without the permission to mount."""
    disks = {whose: Disk(folder / f"disk-{whose}") for whose in ("driver", "trials")}
    for disk in disks.values():
        try:
            disk.mount()
        except (OSError, subprocess.CalledProcessError):
            report.skipped.append("full disks: no permission to mount")
            log.write(report.skipped[-1])
            return {}
        stack.callback(disk.unmount)
    return disks


def _address(endpoint: str) -> tuple[str, int]:
    address = urlsplit(endpoint)
    assert address.hostname
    assert address.port
    return address.hostname, address.port


def _processes(mark: str) -> dict[int, str]:
    """PIDs and commands of all other processes with the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return {pid: command for pid, command in found.items() if pid != os.getpid()}


def _kill(mark: str, part: str = "") -> None:
    """Kill the processes with the mark whose command contains `part`."""
    for pid, command in _processes(mark).items():
        if part in command:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _print_report(report: Report, folder: Path, out: Path | None) -> None:
    """Print the report and, after a violation, how to repeat the run."""
    record = {**vars(report), "effort": {name: round(seconds, 1) for name, seconds in report.effort.items()}}
    print(json.dumps(record, indent=2))
    if out:
        out.write_text(json.dumps(record, indent=2))
    for violation in report.violations:
        print(f"VIOLATED (seed {report.seed}): {violation}")
    if report.violations:
        print(f"repeat: python tests/chaos/chaos.py --seed {report.seed} --faults {report.faults}")
        print(f"logs: {folder}, and the scratch folder named in {folder}/stack/stack.json")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file for the report")
    parser.add_argument("--keep", action="store_true", help="keep logs and data even without a violation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
