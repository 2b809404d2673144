"""The command line: arguments, progress, exit codes (0 all finished, 1 some trial failed, 2 bad input, 130 interrupted)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from pydantic import ValidationError

from orchestration import report
from orchestration.errors import SweepError
from orchestration.manifest import Manifest, proposed, read_manifest, read_manifests, restored_plan, tracked, write_tracked
from orchestration.plan import TrialPlan, expand, render
from orchestration.spec import SweepSpec, load
from orchestration.store import Store, open_store
from rrn_core.config import Runtime

if TYPE_CHECKING:
    from orchestration.cluster import Event

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
COMMANDS = ("run", "plan", "status")

STORE_WAITS_S = 30.0
"""How long a command waits for an absent store; trials wait longer."""

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
    store = open_store(spec.store or os.environ.get("RRN_STORE") or "runs/store", deadline_s=STORE_WAITS_S)
    tracking = spec.tracking or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    return _read(_Sweep(spec, store, _absolute(tracking), plans, {}))


def _read(sweep: _Sweep) -> _Sweep:
    """The sweep with what the store knows now."""
    spec = sweep.spec
    manifests = read_manifests(sweep.store, spec.name, None if spec.search else [plan.trial_id for plan in sweep.plans])
    if not spec.search:
        return replace(sweep, manifests=manifests)
    plans = [replace(restored_plan(manifest), varied=tuple(spec.space)) for manifest in proposed(spec, manifests)]
    return replace(sweep, plans=plans, manifests=manifests)


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
    if sweep.complete and _tracked(sweep) >= {plan.trial_id for plan in sweep.plans}:
        print(f"{_count(sweep)}, nothing to do")
        return OK
    os.environ.update({name: value for name, value in (RAY_SETTINGS | MLFLOW_SETTINGS).items() if name not in os.environ})
    runtime = _runtime(sweep.spec, arguments)
    _check_data(sweep, runtime)
    _stop_on_sigterm()
    return _Runner(sweep, arguments, runtime).run()


class _Runner:
    """Runs what a sweep lacks, with a live view and a tracker, and says how it ended."""

    def __init__(self, sweep: _Sweep, arguments: argparse.Namespace, runtime: Runtime) -> None:
        from orchestration.tracking import Tracker

        self._sweep, self._runtime = sweep, runtime
        self._committed: dict[str, int] = {}
        tags = {"sweep_file": str(arguments.file), **git_state()}
        self._tracker = Tracker(sweep.tracking, sweep=sweep.spec.name, store=sweep.store.uri, read=self._manifest, tags=tags)

    def run(self) -> int:
        sweep = self._sweep
        print(f"sweep {sweep.spec.name}: {_count(sweep)}")
        for line in self._skipped():
            print(line)
        # an unwritable store is told here, before anything is started
        write_tracked(sweep.store, sweep.spec.name, _public(sweep.tracking), sorted(_tracked(sweep)))
        self._tracker.start([plan.trial_id for plan in sweep.plans])
        interrupted = False
        try:
            if not sweep.complete:
                self._train()
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted: finishing the books; the same command goes on from the last checkpoints", file=sys.stderr)
        finally:
            behind = self._close()
        ended = _read(sweep)
        told = {plan.trial_id for plan in ended.plans} - {plan.trial_id for plan in ended.unfinished} - set(behind)
        write_tracked(ended.store, ended.spec.name, _public(ended.tracking), sorted(told))
        return self._conclude(ended, interrupted=interrupted)

    def _close(self) -> list[str]:
        """Tell MLflow how it ended, whatever ended it; a second Ctrl-C cuts this short."""
        with suppress(KeyboardInterrupt):
            return self._tracker.close(timeout_s=60)
        return [plan.trial_id for plan in self._sweep.plans]

    def _train(self) -> None:
        from rich.console import Console

        from orchestration import cluster
        from orchestration.trial import Job
        from orchestration.view import View

        sweep = self._sweep
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        job = Job(sweep.store.uri, self._runtime, sweep.spec.retention)
        with cluster.connect(os.environ.get("RAY_ADDRESS") or None):
            _stop_on_sigterm()  # again, because Ray puts its own handler, which aborts
            view = View(console, total=sweep.total, finished=len(sweep.plans) - len(sweep.unfinished))
            with view:
                cluster.run(
                    self._source(),
                    job,
                    resources=sweep.spec.resources,
                    retries=sweep.spec.retries,
                    listeners=[view, self._track],
                )

    def _manifest(self, trial_id: str) -> Manifest | None:
        return read_manifest(self._sweep.store, self._sweep.spec.name, trial_id)

    def _track(self, event: Event) -> None:
        """Tell the tracker of what was committed, not of mere progress."""
        trial_id, committed = event.plan.trial_id, event.update.committed if event.update else -1
        if self._committed.get(trial_id) != committed:
            self._committed[trial_id] = committed
            self._tracker.notify(trial_id)

    def _source(self) -> Any:
        if self._sweep.spec.search:
            from orchestration.search import AdaptiveSource

            return AdaptiveSource(self._sweep.spec, self._sweep.manifests)
        from orchestration.cluster import FixedSource

        return FixedSource(self._sweep.unfinished)

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


def _runtime(spec: SweepSpec, given: argparse.Namespace) -> Runtime:
    """Where trials run: on CUDA where the file asks for a gpu, with the other CPUs of a GPU trial preparing batches."""
    root = given.data_root or os.environ.get("RRN_DATA_ROOT")
    cpus, on_gpu = max(1, int(spec.resources.cpu)), spec.resources.gpu > 0
    workers = given.workers if given.workers is not None else (cpus - 1 if on_gpu else 0)
    try:
        return Runtime(
            device=given.device or ("cuda" if on_gpu else "cpu"),
            data_root=Path(root).resolve() if root else None,
            workers=workers,
            threads=cpus,
            progress_every=10,
        )
    except ValidationError as error:
        faults = "; ".join(f"--{fault['loc'][0]}: {fault['msg'].lower()}, got {fault['input']}" for fault in error.errors())
        raise SweepError(faults) from None


def _check_data(sweep: _Sweep, runtime: Runtime) -> None:
    """Refuse a sweep without its data before anything is started; a folder that only the cluster has cannot be looked at."""
    needing = next((plan for plan in sweep.unfinished if plan.config.dataset != "digits"), None)
    if needing is None:
        return
    if runtime.data_root is None:
        raise SweepError(f"--data-root: trial {needing.label} needs the folder of {needing.config.dataset}; give it, or set RRN_DATA_ROOT")
    if not os.environ.get("RAY_ADDRESS") and not runtime.data_root.is_dir():
        raise SweepError(f"--data-root: {runtime.data_root} is not a folder")


def git_state() -> dict[str, str]:
    """Commit of the code that runs and whether it was changed since; `unknown` outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the package merely lies inside someone else's checkout
        return {"git_commit": git("rev-parse", "HEAD"), "dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "unknown", "dirty": "unknown"}


def _stop_on_sigterm() -> None:
    """Batch systems stop a job with SIGTERM: take it as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _tracked(sweep: _Sweep) -> set[str]:
    """Trials that MLflow shows completely; none where its database is gone."""
    database = sweep.tracking.removeprefix("sqlite:///")
    if database != sweep.tracking and not Path(database).exists():
        return set()
    return tracked(sweep.store, sweep.spec.name, _public(sweep.tracking))


def _public(uri: str) -> str:
    """Without the credentials that the environment's address may hold: this goes into the store."""
    return re.sub(r"//[^/@]*@", "//", uri)


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
    run.add_argument("--workers", type=int, help="processes per trial that prepare batches (default: 0, or cpu - 1 with a gpu)")
    plan = commands.add_parser("plan", parents=[common], help="show the trials; start nothing")
    plan.add_argument("--show-config", action="store_true", help="every setting of every trial, as YAML")
    status = commands.add_parser("status", parents=[common], help="the state of every trial, from the store alone")
    status.add_argument("--json", action="store_true", help="for other programs")
    return parser


if __name__ == "__main__":
    main()
