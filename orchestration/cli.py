"""The command line: arguments, progress, exit codes (0 all finished, 1 some trial failed, 2 bad input, 130 interrupted)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from orchestration import report
from orchestration.errors import SweepError
from orchestration.manifest import Manifest, read_manifest, read_manifests, restored_plan, tracked, write_tracked
from orchestration.plan import TrialPlan, expand, render
from orchestration.spec import SweepSpec, load
from orchestration.store import Store, open_store
from rrn_core.config import Runtime

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
COMMANDS = ("run", "plan", "status")

RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard copies of every report
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: the store makes an immediate stop safe
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it edits the environment from a thread
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the tracker has its own back-off
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `rrn-sweep`."""
    arguments = _parser().parse_args(_with_command(list(sys.argv[1:] if argv is None else argv)))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        code = {"run": _run, "plan": _plan, "status": _status}[arguments.command](arguments)
    except SweepError as error:
        print(error, file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


@dataclass(frozen=True)
class _Sweep:
    """A sweep file, its trials, and what the store knows of them."""

    path: Path
    spec: SweepSpec
    store: Store
    tracking: str
    plans: list[TrialPlan]
    manifests: dict[str, Manifest]

    @property
    def unfinished(self) -> list[TrialPlan]:
        return [plan for plan in self.plans if plan.trial_id not in self.manifests or self.manifests[plan.trial_id].status != "finished"]

    @property
    def total(self) -> int:
        return max(len(self.plans), self.spec.search.trials if self.spec.search else 0)

    @property
    def complete(self) -> bool:
        return not self.unfinished and len(self.plans) == self.total


def _open(arguments: argparse.Namespace) -> _Sweep:
    spec = load(arguments.file, overrides=arguments.set)
    try:
        plans = expand(spec)
    except SweepError as error:
        raise SweepError("\n".join(f"{arguments.file}: {line}" for line in str(error).splitlines())) from None
    store = open_store(spec.store or os.environ.get("RRN_STORE") or "runs/store")
    tracking = spec.tracking or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    manifests = read_manifests(store, spec.name, None if spec.search else [plan.trial_id for plan in plans])
    if spec.search:
        proposed = sorted((m for m in manifests.values() if m.proposal is not None), key=lambda m: m.proposal or 0)
        plans = [restored_plan(manifest) for manifest in proposed]
    return _Sweep(arguments.file, spec, store, _absolute(tracking), plans, manifests)


def _plan(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    if arguments.show_config:
        shown = {plan.trial_id: plan.config.model_dump(mode="json") for plan in sweep.plans}
        print(yaml.safe_dump(shown, sort_keys=False).rstrip())
        return OK
    states = {plan.trial_id: report.state(sweep.manifests.get(plan.trial_id)) for plan in sweep.plans}
    print(render(sweep.plans, states) if sweep.plans else "no trial proposed yet")
    left = sum(plan.iterations for plan in sweep.unfinished)
    print(f"\n{_count(sweep)}; {len(sweep.unfinished)} to run, at most {left} iterations")
    if search := sweep.spec.search:
        print(f"{sweep.total - len(sweep.plans)} still to be proposed by the {search.sampler} sampler (seed {search.seed}) from")
        print("\n".join(f"  {name}: {dimension}" for name, dimension in sweep.spec.space.items()))
    return OK


def _status(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    if arguments.json:
        print(
            json.dumps(
                {"sweep": sweep.spec.name, "store": sweep.store.uri, "trials": report.as_json(sweep.plans, sweep.manifests)}, indent=2
            )
        )
    else:
        print(report.summary(sweep.plans, sweep.manifests) if sweep.plans else "no trial started yet")
        print(f"\n{_count(sweep)}")
    return OK


def _run(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    if sweep.complete and tracked(sweep.store, sweep.spec.name, sweep.tracking) >= {plan.trial_id for plan in sweep.plans}:
        print(f"{_count(sweep)}, nothing to do")
        return OK
    os.environ.update({name: value for name, value in (RAY_SETTINGS | MLFLOW_SETTINGS).items() if name not in os.environ})
    _stop_on_sigterm()
    return _Runner(sweep, arguments).run()


class _Runner:
    """Runs what a sweep lacks, with a live view and a tracker, and says how it ended."""

    def __init__(self, sweep: _Sweep, arguments: argparse.Namespace) -> None:
        from orchestration.tracking import Tracker

        self._sweep, self._arguments = sweep, arguments
        self._read = lambda trial_id: read_manifest(sweep.store, sweep.spec.name, trial_id)
        tags = {"sweep_file": str(arguments.file), **git_state()}
        self._tracker = Tracker(sweep.tracking, sweep=sweep.spec.name, store=sweep.store.uri, read=self._read, tags=tags)

    def run(self) -> int:
        sweep = self._sweep
        print(f"sweep {sweep.spec.name}: {_count(sweep)}")
        for line in self._skipped():
            print(line)
        self._tracker.start([plan.trial_id for plan in sweep.plans])
        interrupted = False
        try:
            if not sweep.complete:
                self._train()
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted: finishing the books; the same command goes on from the last checkpoints", file=sys.stderr)
        behind = [plan.trial_id for plan in sweep.plans]
        with suppress(KeyboardInterrupt):
            behind = self._tracker.close(timeout_s=60)
        ended = _open(self._arguments)
        told = {plan.trial_id for plan in ended.plans} - {plan.trial_id for plan in ended.unfinished} - set(behind)
        write_tracked(ended.store, ended.spec.name, ended.tracking, sorted(told))
        return self._conclude(ended, interrupted=interrupted)

    def _train(self) -> None:
        from rich.console import Console

        from orchestration import cluster
        from orchestration.trial import Job
        from orchestration.view import View

        sweep = self._sweep
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        job = Job(sweep.store.uri, self._runtime(), sweep.spec.retention)
        with cluster.connect(os.environ.get("RAY_ADDRESS")):
            _stop_on_sigterm()  # again, because Ray puts its own handler, which aborts
            view = View(console, total=sweep.total, finished=len(sweep.plans) - len(sweep.unfinished))
            with view:
                cluster.run(
                    self._source(),
                    job,
                    resources=sweep.spec.resources,
                    retries=sweep.spec.retries,
                    listeners=[view, lambda event: self._tracker.notify(event.plan.trial_id)],
                )

    def _source(self) -> Any:
        if self._sweep.spec.search:
            from orchestration.search import AdaptiveSource

            return AdaptiveSource(self._sweep.spec, self._sweep.manifests)
        from orchestration.cluster import FixedSource

        return FixedSource(self._sweep.unfinished)

    def _runtime(self) -> Runtime:
        given = self._arguments
        root = given.data_root or os.environ.get("RRN_DATA_ROOT")
        cpus = max(1, int(self._sweep.spec.resources.cpu))
        device = given.device or ("auto" if self._sweep.spec.resources.gpu else "cpu")
        return Runtime(
            device=device, data_root=Path(root).resolve() if root else None, workers=given.workers, threads=cpus, progress_every=10
        )

    def _skipped(self) -> list[str]:
        lines = []
        for plan in self._sweep.plans:
            state = report.state(self._sweep.manifests.get(plan.trial_id))
            if state != "new":
                lines.append(f"{plan.trial_id} {plan.label}: {'skipped, ' if state == 'finished' else ''}{state}")
        return lines

    def _conclude(self, sweep: _Sweep, *, interrupted: bool) -> int:
        from orchestration.tracking import ui_command

        print(f"\n{report.summary(sweep.plans, sweep.manifests)}\n\n{_count(sweep)}")
        print("mIoU in percent on the validation list; b1, b2, ens: branch 1, branch 2, their ensemble; best: epoch with the best val/miou")
        print(f"checkpoints: {sweep.store.uri}/{sweep.spec.name}")
        print(f"MLflow UI:   {ui_command(sweep.tracking)}")
        if self._tracker.comparison_url:
            print(f"then open    {self._tracker.comparison_url}")
        if interrupted:
            return INTERRUPTED
        return OK if sweep.complete else FAILED


def git_state() -> dict[str, str]:
    """Commit of the code that runs and whether it was changed since; `unknown` outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "unknown", "dirty": "unknown"}


def _stop_on_sigterm() -> None:
    """Batch systems stop a job with SIGTERM: take it as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _count(sweep: _Sweep) -> str:
    return f"{len(sweep.plans) - len(sweep.unfinished)} of {sweep.total} finished"


def _absolute(tracking: str) -> str:
    """A relative SQLite path made absolute, so that the printed command works anywhere."""
    prefix = "sqlite:///"
    return f"{prefix}{Path(tracking.removeprefix(prefix)).resolve()}" if tracking.startswith(prefix) else tracking


def _with_command(argv: list[str]) -> list[str]:
    """`rrn-sweep FILE` means `rrn-sweep run FILE`."""
    first = next((word for word in argv if not word.startswith("-")), None)
    return argv if first is None or first in COMMANDS else ["run", *argv]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rrn-sweep", description="Region Relevance Network sweeps. `rrn-sweep FILE` runs what FILE asks for and the store lacks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{FILE | run FILE | plan FILE | status FILE}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("file", type=Path, help="sweep file (YAML)")
    common.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the file; a setting by its name alone"
    )
    run = commands.add_parser("run", parents=[common], help="run every trial that is not finished")
    run.add_argument("--data-root", help="folder of the data set (or RRN_DATA_ROOT)")
    run.add_argument("--device", help="torch device of a trial (default: cuda where resources.gpu > 0, else cpu)")
    run.add_argument("--workers", type=int, default=0, help="processes per trial that prepare batches")
    plan = commands.add_parser("plan", parents=[common], help="show the trials; start nothing")
    plan.add_argument("--show-config", action="store_true", help="every setting of every trial, as YAML")
    status = commands.add_parser("status", parents=[common], help="the state of every trial, from the store alone")
    status.add_argument("--json", action="store_true", help="for other programs")
    return parser


if __name__ == "__main__":
    main()
