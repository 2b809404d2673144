"""The command line: arguments, progress, exit codes.

0 all finished, 1 some trial is not, 2 bad input or refused, 75 stopped by SIGTERM (give the same command again), 130 by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from orchestration import inference
from orchestration.cli.arguments import parser
from orchestration.compare import formats
from orchestration.compare.published import published_table
from orchestration.errors import SweepError, mendable
from orchestration.formatting import bytes_shown
from orchestration.observe import status
from orchestration.plan.plan_table import render
from orchestration.plan.spec import SweepSpec
from orchestration.plan.sweep_file import settings_of
from orchestration.plan.validation_text import suggestion
from orchestration.preflight import check
from orchestration.preflight.estimate import Estimate, estimate, probed, shown_costs, total
from orchestration.record import garbage
from orchestration.record.inputs import unresolved
from orchestration.record.lease import BEAT_WITHIN_S, Lease
from orchestration.run.git_checkout import git_state
from orchestration.run.runner import MLFLOW_SETTINGS, RAY_SETTINGS, Runner, facts, overview, settle_dead
from orchestration.run.signals import Sigterm, Terminated
from orchestration.store.open import open_store
from orchestration.sweep import Sweep, open_sweep
from orchestration.tracking.glance import shows_all
from rrn_core.config import Runtime

OK, FAILED, BAD_INPUT, RESUME_ME, INTERRUPTED = 0, 1, 2, 75, 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `rrn-sweep`."""
    arguments = parser().parse_args(_with_command(list(sys.argv[1:] if argv is None else argv)))
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
    _unless_set(RAY_SETTINGS | MLFLOW_SETTINGS)
    sigterm = Sigterm()
    with _leased(sweep, arguments) as lease:
        sweep = settle_dead(sweep, lease)
        chosen = sweep.chosen(only=arguments.only, retry=arguments.retry)
        ended = Runner(
            sweep,
            _runtime(sweep.spec, arguments),
            lease,
            chosen=chosen,
            environment=os.environ,
            command=_command(arguments),
            sigterm=sigterm,
            say=print,
        ).run()
    left = ended.chosen(only=arguments.only) if arguments.only else ended.unfinished
    return OK if not left and (arguments.only or ended.complete) else FAILED


def _leased(sweep: Sweep, arguments: argparse.Namespace) -> Lease:
    """The sweep's lease, with a token above that of every driver that its trials have known."""
    above = max((manifest.driver for manifest in sweep.manifests.values()), default=0)
    beats = open_store(sweep.store.uri, deadline_s=BEAT_WITHIN_S)
    lease = Lease.acquire(sweep.store, sweep.name, take_over=arguments.take_over, above=above, beats=beats, say=print)
    if lease.took_over:
        print(lease.took_over)
    return lease


def _sync(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    _unless_set(MLFLOW_SETTINGS)
    from orchestration.tracking.sync import sync

    with _leased(sweep, arguments) as lease:
        settle_dead(sweep, lease)
        ids, command = [plan.trial_id for plan in sweep.plans], _command(arguments)
        with _progress("MLflow") as progress:
            shown = sync(
                sweep.tracking,
                sweep.name,
                sweep.store,
                trial_ids=ids,
                facts=facts(sweep, command),
                overview=overview(sweep, command),
                progress=progress,
            )
        print(shown)
    return OK


def _gc(arguments: argparse.Namespace) -> int:
    sweep = _open(arguments)
    if arguments.dry_run:
        print(garbage.render(_collect(sweep, driver=0, dry_run=True), dry_run=True))
        return OK
    with _leased(sweep, arguments) as lease:
        settle_dead(sweep, lease)
        print(garbage.render(_collect(sweep, driver=lease.token, dry_run=False), dry_run=False))
    return OK


def _collect(sweep: Sweep, *, driver: int, dry_run: bool) -> garbage.GarbageReport:
    return garbage.collect(sweep.store, sweep.name, sweep.trial_ids, driver=driver, retention=sweep.spec.retention, dry_run=dry_run)


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
    states = {plan.trial_id: status.state(sweep.manifests.get(plan.trial_id)) for plan in sweep.plans}
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
    sweep = _look(arguments)
    if arguments.json:
        trials = status.as_json(sweep.plans, sweep.manifests)
        print(json.dumps({"sweep": sweep.name, "store": sweep.store.uri, "trials": trials}, indent=2))
    else:
        print(status.summary(sweep.plans, sweep.manifests) if sweep.plans else "no trial started yet")
        if arguments.effort:
            print(f"\n{status.effort(sweep.plans, sweep.manifests)}")
        if sweep.spec.published:
            print(f"\n{published_table(sweep.spec.published, sweep.plans, sweep.manifests)}")
        print(f"\n{sweep.count}")
    return OK


def _compare(arguments: argparse.Namespace) -> int:
    form = arguments.format or ("text" if arguments.out is None else formats.SUFFIXES.get(arguments.out.suffix))
    if form is None:
        raise SweepError(f"--out {arguments.out}: no format has this ending; use one of {', '.join(formats.SUFFIXES)}, or give --format")
    if form in ("parquet", "html") and arguments.out is None:
        raise SweepError(f"--format {form}: give --out FILE to write to")
    sweeps = [open_sweep(file, arguments.set, data_root=None, environment=os.environ) for file in arguments.files]
    by, baseline = arguments.by or [formats.PARTITION], arguments.baseline
    found = formats.compared(sweeps, by=by, metric=arguments.metric, at=arguments.at, baseline=baseline)
    source = formats.source(arguments.files, command=shlex.join(["rrn-sweep", *sys.argv[1:]]), code=git_state())
    body = formats.rendered(found, sweeps, form, source=source)
    if arguments.out is None:
        print(body.decode().rstrip())
    else:
        with mendable():
            inference.write(arguments.out, body)
        print(f"{arguments.out}: {bytes_shown(len(body))}")
    return OK


def _watch(arguments: argparse.Namespace) -> int:
    from orchestration.observe.watch import watch

    if arguments.every <= 0:
        raise SweepError(f"--every: must be > 0, got {arguments.every:g}")
    watch(_look(arguments), _console(), every_s=arguments.every, once=arguments.once)
    return OK


def _logs(arguments: argparse.Namespace) -> int:
    from orchestration.observe.logs import logs

    logs(_look(arguments), arguments.trial, print, follow=arguments.follow)
    return OK


def _ui(arguments: argparse.Namespace) -> int:
    from orchestration.tracking import ui_server

    ui_server.ui(_look(arguments), _console(), port=arguments.port, environment=os.environ)
    return OK


def _best(arguments: argparse.Namespace) -> int:
    from orchestration.export.best_checkpoint import best, missing, render
    from orchestration.export.export_folder import export

    sweep = _look(arguments)
    choices = best(sweep.plans, sweep.manifests, per=arguments.per, at=arguments.at)
    print(render(choices, missing(sweep.plans, choices, per=arguments.per)))
    if arguments.export:
        commands = {plan.trial_id: f"{_command(arguments)} --only {plan.trial_id}" for plan in sweep.plans}
        commit = git_state()["git_commit"]
        print()
        for written in export(
            choices, sweep.store, arguments.export, runtime=_plain_runtime(arguments), onnx=arguments.onnx, commands=commands, commit=commit
        ):
            print(written)
    return OK


def _check(arguments: argparse.Namespace) -> int:
    sweep = open_sweep(arguments.file, arguments.set, data_root=None, environment=os.environ, look=False)
    _unless_set(MLFLOW_SETTINGS)
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
    print(inference.import_weights(arguments.source, arguments.out))
    return OK


def _evaluate(arguments: argparse.Namespace) -> int:
    found = inference.evaluate_checkpoint(
        arguments.checkpoint, _plain_runtime(arguments), changes=_changes(arguments), stride=arguments.stride
    )
    print(json.dumps(found.record(), indent=2) if arguments.json else found)
    return OK


def _predict(arguments: argparse.Namespace) -> int:
    written = inference.predict_images(
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
    "compare": _compare,
    "watch": _watch,
    "logs": _logs,
    "ui": _ui,
    "best": _best,
    "check": _check,
    "weights": _import_weights,
    "evaluate": _evaluate,
    "predict": _predict,
}


def _unless_set(settings: Mapping[str, str]) -> None:
    """Settings of Ray and MLflow; the user's own come first."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _open(arguments: argparse.Namespace) -> Sweep:
    return open_sweep(arguments.file, arguments.set, data_root=_data_root(arguments), environment=os.environ)


def _look(arguments: argparse.Namespace) -> Sweep:
    """The sweep as the store knows it, from a machine that need not see its data."""
    return open_sweep(arguments.file, arguments.set, data_root=None, environment=os.environ)


def _command(arguments: argparse.Namespace) -> str:
    """What runs the sweep again."""
    changes = [word for change in arguments.set for word in ("--set", change)]
    place = ["--data-root", arguments.data_root] if arguments.data_root else []
    return shlex.join(["rrn-sweep", str(arguments.file), *changes, *place])


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


def _console() -> Any:
    """As wide as the terminal; in a log, lines are not wrapped."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


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


if __name__ == "__main__":
    main()
