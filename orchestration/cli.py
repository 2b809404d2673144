"""The command line: arguments, progress, exit codes.

0 all finished, 1 some trial is not, 2 bad input or refused, 75 stopped by SIGTERM (give the same command again), 130 by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from orchestration import check, gc, models, report
from orchestration.contents import unresolved
from orchestration.errors import SweepError, mendable
from orchestration.estimate import Estimate, estimate, probed, shown_costs, total
from orchestration.failures import FAILURES
from orchestration.glance import shows_all
from orchestration.lease import Lease
from orchestration.plan import render
from orchestration.runner import MLFLOW_SETTINGS, RAY_SETTINGS, Runner, Terminated, settle_dead, stop_on_sigterm
from orchestration.spec import SweepSpec, settings_of, suggestion
from orchestration.sweep import Sweep, open_sweep
from rrn_core.config import Runtime

OK, FAILED, BAD_INPUT, RESUME_ME, INTERRUPTED = 0, 1, 2, 75, 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `rrn-sweep`."""
    arguments = _parser().parse_args(_with_command(list(sys.argv[1:] if argv is None else argv)))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the store tells of an outage itself, in one line
    try:
        code = COMMANDS[arguments.command](arguments)
    except SweepError as error:
        print(error, file=sys.stderr)
        code = BAD_INPUT
    except Terminated:
        print("terminated: the same command goes on from the last checkpoints", file=sys.stderr)
        code = RESUME_ME
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


def _run(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    told = sweep.complete and sweep.tracked() >= sweep.trial_ids
    if told and shows_all(sweep.tracking, sweep.name, sweep.trial_ids, auth=_mlflow_auth()):
        print(f"{sweep.count}, nothing to do")
        return OK
    sweep.chosen(only=arguments.only, retry=arguments.retry)  # a wrong choice is told before anything is touched
    os.environ.update({name: value for name, value in (RAY_SETTINGS | MLFLOW_SETTINGS).items() if name not in os.environ})
    stop_on_sigterm()
    with _leased(sweep, arguments) as lease:
        sweep = settle_dead(sweep, lease)
        chosen = sweep.chosen(only=arguments.only, retry=arguments.retry)
        ended = Runner(sweep, _runtime(sweep.spec, arguments), lease, chosen=chosen, environment=os.environ, say=print).run()
    left = ended.chosen(only=arguments.only) if arguments.only else ended.unfinished
    return OK if not left and (arguments.only or ended.complete) else FAILED


def _leased(sweep: Sweep, arguments: argparse.Namespace) -> Lease:
    """The sweep's lease, with a token above that of every driver that its trials have known."""
    above = max((manifest.driver for manifest in sweep.manifests.values()), default=0)
    lease = Lease.acquire(sweep.store, sweep.name, take_over=arguments.take_over, above=above, say=print)
    if lease.took_over:
        print(lease.took_over)
    return lease


def _sync(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    os.environ.update({name: value for name, value in MLFLOW_SETTINGS.items() if name not in os.environ})
    from orchestration.tracking import sync

    with _leased(sweep, arguments) as lease:
        settle_dead(sweep, lease)
        print(sync(sweep.tracking, sweep.name, sweep.store, trial_ids=sweep.trial_ids))
    return OK


def _gc(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    if arguments.dry_run:
        print(gc.render(_collect(sweep, driver=0, dry_run=True), dry_run=True))
        return OK
    with _leased(sweep, arguments) as lease:
        settle_dead(sweep, lease)
        print(gc.render(_collect(sweep, driver=lease.token, dry_run=False), dry_run=False))
    return OK


def _collect(sweep: Sweep, *, driver: int, dry_run: bool) -> gc.Collected:
    return gc.collect(sweep.store, sweep.name, sweep.trial_ids, driver=driver, retention=sweep.spec.retention, dry_run=dry_run)


def _mlflow_auth() -> tuple[str, str] | None:
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    return (user, password) if user and password else None


def _plan(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    if arguments.show_config:
        shown = {plan.trial_id: plan.config.model_dump(mode="json") for plan in sweep.plans}
        print(yaml.safe_dump(shown, sort_keys=False).rstrip())
        return OK
    estimates = _probed(sweep, arguments) if arguments.probe else estimate([*sweep.plans, *sweep.samples], sweep.manifests)
    states = {plan.trial_id: report.state(sweep.manifests.get(plan.trial_id)) for plan in sweep.plans}
    print(render(sweep.plans, states, shown_costs(estimates)) if sweep.plans else "no trial proposed yet")
    left = [plan.iterations for plan in sweep.to_run]
    print(f"\n{sweep.count}; {len(left)} to run, at most {sum(left) if all(left) else '?'} iterations")
    if any(unresolved(plan.config) for plan in [*sweep.plans, *sweep.samples]):
        print("not all data and weights are at hand (--data-root): identities do not know their contents yet, and will change by them")
    if search := sweep.spec.search:
        print(f"{sweep.total - len(sweep.plans)} still to be proposed by the {search.sampler} sampler (seed {search.seed}) from")
        print("\n".join(f"  {name}: {dimension}" for name, dimension in sweep.spec.space.items()))
    if left:
        print(total(sweep.to_run, estimates, sweep.spec.resources))
    return OK


def _probed(sweep: Sweep, arguments: argparse.Namespace) -> dict[str, Estimate | None]:
    with mendable(), _progress("probe") as progress:
        return probed([*sweep.plans, *sweep.samples], _runtime(sweep.spec, arguments), progress=progress)


def _status(arguments: argparse.Namespace) -> int:
    sweep = open_sweep(arguments.file, arguments.set, data_root=None, environment=os.environ)
    if arguments.json:
        trials = report.as_json(sweep.plans, sweep.manifests)
        print(json.dumps({"sweep": sweep.name, "store": sweep.store.uri, "trials": trials}, indent=2))
    else:
        print(report.summary(sweep.plans, sweep.manifests) if sweep.plans else "no trial started yet")
        if arguments.effort:
            print(f"\n{report.effort(sweep.plans, sweep.manifests)}")
        if sweep.spec.published:
            print(f"\n{report.published(sweep.spec.published, sweep.plans, sweep.manifests)}")
        print(f"\n{sweep.count}")
    return OK


def _check(arguments: argparse.Namespace) -> int:
    sweep = open_sweep(arguments.file, arguments.set, data_root=None, environment=os.environ, look=False)
    os.environ.update({name: value for name, value in MLFLOW_SETTINGS.items() if name not in os.environ})
    with mendable(), _progress("files") as progress:
        findings = check.check(
            sweep.spec,
            sweep.samples or sweep.plans,
            store=sweep.store,
            tracking=sweep.tracking,
            runtime=_runtime(sweep.spec, arguments),
            local=not os.environ.get("RAY_ADDRESS"),
            progress=progress,
        )
    print(check.render(findings))
    return BAD_INPUT if check.faulty(findings) else OK


def _import_weights(arguments: argparse.Namespace) -> int:
    print(models.import_weights(arguments.source, arguments.out))
    return OK


def _evaluate(arguments: argparse.Namespace) -> int:
    found = models.evaluate_checkpoint(
        arguments.checkpoint, _plain_runtime(arguments), changes=_changes(arguments), stride=arguments.stride
    )
    print(json.dumps(found.record(), indent=2) if arguments.json else found)
    return OK


def _predict(arguments: argparse.Namespace) -> int:
    written = models.predict_images(
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        _plain_runtime(arguments),
        changes=_changes(arguments),
        stride=arguments.stride,
    )
    print(f"{len(written)} files in {arguments.out}")
    return OK


COMMANDS = {
    "run": _run,
    "plan": _plan,
    "status": _status,
    "sync": _sync,
    "gc": _gc,
    "check": _check,
    "weights": _import_weights,
    "evaluate": _evaluate,
    "predict": _predict,
}


def _open(arguments: argparse.Namespace) -> Sweep:
    return open_sweep(arguments.file, arguments.set, data_root=_data_root(arguments), environment=os.environ)


def _data_root(arguments: argparse.Namespace) -> Path | None:
    root = arguments.data_root or os.environ.get("RRN_DATA_ROOT")
    return Path(root).resolve() if root else None


def _runtime(spec: SweepSpec, given: argparse.Namespace) -> Runtime:
    """Where trials run: on CUDA where the file asks for a gpu, with the other CPUs of a GPU trial preparing batches."""
    cpus, on_gpu = max(1, int(spec.resources.cpu)), spec.resources.gpu > 0
    workers = given.workers if given.workers is not None else (cpus - 1 if on_gpu else 0)
    try:
        return Runtime(
            device=given.device or ("cuda" if on_gpu else "cpu"),
            data_root=_data_root(given),
            lists_root=given.file.resolve().parent,
            workers=workers,
            threads=cpus,
            progress_every=10,
        )
    except ValidationError as error:
        faults = "; ".join(f"--{fault['loc'][0]}: {fault['msg'].lower()}, got {fault['input']}" for fault in error.errors())
        raise SweepError(faults) from None


def _plain_runtime(given: argparse.Namespace) -> Runtime:
    return Runtime(device=given.device or "auto", data_root=_data_root(given), lists_root=Path.cwd())


def _changes(given: argparse.Namespace) -> dict[str, Any]:
    """Settings that replace those of a checkpoint: `--data` and every `--set`."""
    return ({"dataset": given.data} if given.data else {}) | settings_of(given.set)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for work that counts itself; silent elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _with_command(argv: list[str]) -> list[str]:
    """`rrn-sweep FILE` means `rrn-sweep run FILE`."""
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is None or first in COMMANDS:
        return argv
    if not Path(first).suffix and not Path(first).exists():
        print(f"{first}: neither a command nor a sweep file{suggestion(first, COMMANDS)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    return ["run", *argv]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rrn-sweep", description="Region Relevance Network sweeps. `rrn-sweep FILE` runs what FILE asks for and the store lacks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--data-root", help="folder of the data set (or RRN_DATA_ROOT)")
    _add_sweep_commands(commands, place)
    _add_model_commands(commands, place)
    return parser


def _add_sweep_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False, parents=[place])
    common.add_argument("file", type=Path, help="sweep file (YAML)")
    common.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the file; a setting by its name alone"
    )
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", help="torch device of a trial (default: cuda where resources.gpu > 0, else cpu)")
    where.add_argument("--workers", type=int, help="processes per trial that prepare batches (default: 0, or cpu - 1 with a gpu)")
    lease = argparse.ArgumentParser(add_help=False)
    lease.add_argument("--take-over", action="store_true", help="even if another driver seems to run the sweep: it is shut out")
    run = commands.add_parser("run", parents=[common, where, lease], help="FILE: run every trial that is not finished (the default)")
    run.add_argument("--only", action="append", default=[], metavar="ID", help="just the trials whose identity begins so; repeatable")
    help_retry = "of the failed trials just those of this class; repeatable (default: all)"
    run.add_argument("--retry", action="append", default=[], choices=FAILURES, help=help_retry)
    plan = commands.add_parser("plan", parents=[common, where], help="FILE: show the trials; start nothing")
    views = plan.add_mutually_exclusive_group()
    views.add_argument("--show-config", action="store_true", help="every setting of every trial, as YAML")
    views.add_argument("--probe", action="store_true", help="measure time and memory on this machine, a few steps of each kind of trial")
    status = commands.add_parser("status", parents=[common], help="FILE: the state of every trial, from the store alone")
    status.add_argument("--json", action="store_true", help="for other programs")
    status.add_argument("--effort", action="store_true", help="where the hours went: useful, repeated and lost seconds of every attempt")
    commands.add_parser("sync", parents=[common, lease], help="FILE: make MLflow show what the store holds; train nothing")
    collect = commands.add_parser("gc", parents=[common, lease], help="FILE: remove what no trial needs any more from the store")
    collect.add_argument("--dry-run", action="store_true", help="only say what would go")
    commands.add_parser("check", parents=[common, where], help="FILE: try data, store, tracking, disk and GPU before anything is spent")


def _add_model_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    weights = commands.add_parser("weights", help="import FILE --out OUT: released or ImageNet weights, for init_weights and evaluate")
    imports = weights.add_subparsers(dest="action", required=True).add_parser("import", help="read a checkpoint without executing it")
    imports.add_argument("source", type=Path, help="RRN or CPS checkpoint, or an ImageNet ResNet (v1c stem)")
    imports.add_argument("--out", type=Path, required=True, help="file to write (.safetensors)")
    common = argparse.ArgumentParser(add_help=False, parents=[place])
    common.add_argument("checkpoint", help="weights file, checkpoint folder, or s3://.../checkpoints/STEP-ATTEMPT")
    common.add_argument("--data", help="data set, where the checkpoint does not say it or another is meant")
    common.add_argument("--device", help="torch device (default: cuda where there is one)")
    common.add_argument("--stride", type=int, help="of the evaluation windows, in pixels (default: two thirds of crop)")
    common.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="crop, ensemble, ensemble_weight, eval_batch, precision, ..."
    )
    evaluate = commands.add_parser("evaluate", parents=[common], help="CHECKPOINT: IoU per class of both branches and their ensemble")
    evaluate.add_argument("--json", action="store_true", help="for other programs")
    predict = commands.add_parser("predict", parents=[common], help="CHECKPOINT IMAGES... --out DIR: label images and overlays")
    predict.add_argument("images", type=Path, nargs="+")
    predict.add_argument("--out", type=Path, required=True, help="folder to write to")


if __name__ == "__main__":
    main()
