"""Commands that plan, train, or change the store: init, check, plan, run, sync, gc."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from orchestration.cli.context import command_line, open_with_data, progress_bar, set_defaults, trial_runtime
from orchestration.cli.exit_codes import BAD_INPUT, FAILED, OK
from orchestration.errors import SweepError, user_errors
from orchestration.observe.status import state_text
from orchestration.plan.plan_table import render
from orchestration.plan.validation_text import suggestion
from orchestration.preflight import check as preflight
from orchestration.preflight.estimate import Estimate, estimate, main_memory_mb, probed, shown_costs, total
from orchestration.preflight.machine import granted_cpus
from orchestration.record import garbage
from orchestration.record.inputs import unresolved
from orchestration.record.lease import BEAT_WITHIN_S, Lease
from orchestration.run.runner import RAY_SETTINGS, Runner, facts, overview, settle_dead
from orchestration.run.signals import Termination
from orchestration.store.open import open_store
from orchestration.sweep import Sweep, open_sweep
from orchestration.tracking.mlflow_private import CLIENT_SETTINGS

if TYPE_CHECKING:
    from rrn_core.data.inspection import Finding


def init(arguments: argparse.Namespace) -> int:
    """Write a shipped sweep file into the current folder."""
    files = shipped_sweeps()
    if arguments.list:
        for name, file in files.items():
            print(f"{name:<24}{_first_comment(file)}")
        return OK
    name = arguments.name.removesuffix(".yaml")
    if name not in files:
        raise SweepError(f"{name}: no shipped sweep has this name{suggestion(name, files)}; rrn-sweep init --list shows them")
    target = Path(f"{name}.yaml")
    if target.exists():
        raise SweepError(f"{target}: exists already; move it away, or run it: rrn-sweep {target}")
    target.write_text(files[name].read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{target} written; run it with: rrn-sweep {target}")
    return OK


def shipped_sweeps() -> dict[str, Path]:
    """The sweep files that come with the program, by name: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed, checkout = package / "shipped_sweeps", package.parent / "sweeps"
    return {file.stem: file for file in sorted((installed if installed.is_dir() else checkout).glob("*.yaml"))}


def check(arguments: argparse.Namespace) -> int:
    sweep = open_sweep(arguments.file, arguments.set, data_root=None, environment=os.environ, look=False)
    set_defaults(CLIENT_SETTINGS)
    with user_errors(), progress_bar("files") as progress:
        findings = preflight.check(
            sweep.spec,
            sweep.samples or sweep.plans,
            store=sweep.store,
            tracking=sweep.tracking,
            runtime=trial_runtime(sweep.spec, arguments),
            local=not os.environ.get("RAY_ADDRESS"),
            cpus=granted_cpus(os.environ),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            progress=progress,
        )
    print(preflight.render(findings))
    return BAD_INPUT if preflight.faulty(findings) else OK


def plan(arguments: argparse.Namespace) -> int:
    sweep = open_with_data(arguments)
    if arguments.show_config:
        shown = {plan.trial_id: plan.config.model_dump(mode="json") for plan in sweep.plans}
        print(yaml.safe_dump(shown, sort_keys=False).rstrip())
        return OK
    estimates = _probed(sweep, arguments) if arguments.probe else estimate([*sweep.plans, *sweep.samples], sweep.manifests)
    states = {plan.trial_id: state_text(sweep.state(plan), sweep.manifests.get(plan.trial_id)) for plan in sweep.plans}
    print(render(sweep.plans, states, shown_costs(estimates)) if sweep.plans else "no trial proposed yet")
    _print_reasons(sweep)
    left = [plan.iterations for plan in sweep.to_run]
    print(f"\n{sweep.count}; {len(left)} to run, at most {sum(left) if all(left) else '?'} iterations")
    if any(unresolved(plan.config) for plan in [*sweep.plans, *sweep.samples]):
        print("trial IDs are provisional until --data-root is given: they will cover the images and the initial weights")
    if search := sweep.spec.search:
        print(f"the {search.sampler} sampler (seed {search.seed}) proposes {sweep.total - len(sweep.plans)} more from")
        print("\n".join(f"  {name}: {dimension}" for name, dimension in sweep.spec.space.items()))
    if left:
        print(total(sweep.to_run, estimates, sweep.spec.resources))
    if arguments.probe and not os.environ.get("RAY_ADDRESS"):
        print(preflight.render([_main_memory(sweep, arguments)]))
    return OK


def run(arguments: argparse.Namespace) -> int:
    sweep = open_with_data(arguments)
    if sweep.complete and sweep.tracked() >= sweep.trial_ids:
        print(f"{sweep.count}, nothing to do")
        return OK
    runtime = trial_runtime(sweep.spec, arguments)
    chosen = sweep.chosen(only=arguments.only, retry=arguments.retry)  # a wrong choice is refused before anything is touched
    if not os.environ.get("RAY_ADDRESS"):
        preflight.require_device(runtime, sweep.spec.resources, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    for note in preflight.data_notes([plan.config for plan in [*chosen, *sweep.samples]], runtime):
        print(note)
    set_defaults(RAY_SETTINGS | CLIENT_SETTINGS)
    termination = Termination()
    sweep = _with_memory(sweep, arguments)
    with _leased(sweep, arguments) as lease:
        sweep = settle_dead(sweep, lease)
        ended = Runner(
            sweep,
            runtime,
            lease,
            chosen=sweep.chosen(only=arguments.only, retry=arguments.retry),
            environment=os.environ,
            command=command_line(arguments),
            termination=termination,
            say=print,
        ).run()
    left = ended.chosen(only=arguments.only) if arguments.only else ended.unfinished
    return OK if not left and (arguments.only or ended.complete) else FAILED


def sync(arguments: argparse.Namespace) -> int:
    sweep = open_with_data(arguments)
    set_defaults(CLIENT_SETTINGS)
    from orchestration.tracking.sync import sync as make_equal

    with _leased(sweep, arguments) as lease:
        settle_dead(sweep, lease)
        command = command_line(arguments)
        with progress_bar("MLflow") as progress:
            report = make_equal(
                sweep.tracking,
                sweep.name,
                sweep.store,
                trial_ids=[plan.trial_id for plan in sweep.plans],
                facts=facts(sweep, command),
                overview=overview(sweep, command),
                progress=progress,
                confirm=lease.confirm,
            )
        print(report)
    return FAILED if report.missing else OK


def collect_garbage(arguments: argparse.Namespace) -> int:
    sweep = open_with_data(arguments)
    if arguments.dry_run:
        print(garbage.render(_collected(sweep, driver=0, dry_run=True), dry_run=True))
        return OK
    with _leased(sweep, arguments) as lease:
        settle_dead(sweep, lease)
        print(garbage.render(_collected(sweep, driver=lease.token, dry_run=False), dry_run=False))
    return OK


def _collected(sweep: Sweep, *, driver: int, dry_run: bool) -> garbage.GarbageReport:
    return garbage.collect(sweep.store, sweep.name, sweep.trial_ids, driver=driver, retention=sweep.spec.retention, dry_run=dry_run)


def _leased(sweep: Sweep, arguments: argparse.Namespace) -> Lease:
    """The sweep's lease, with a token above that of every driver that its trials have known."""
    above = max((manifest.driver for manifest in sweep.manifests.values()), default=0)
    beats = open_store(sweep.store.uri, deadline_s=BEAT_WITHIN_S)
    lease = Lease.acquire(sweep.store, sweep.name, take_over=arguments.take_over, above=above, beats=beats, say=print)
    if lease.took_over:
        print(lease.took_over)
    return lease


def _print_reasons(sweep: Sweep) -> None:
    """Why there are fewer trials than combinations, and why a trial is new although a finished one is close."""
    for plan in sweep.plans:
        if plan.same_as:
            print(f"{plan.trial_id} ({plan.label}) is also: {'; '.join(plan.same_as)} (method {plan.config.method} lacks a setting)")
    for trial_id, reason in sweep.why_new().items():
        print(f"{trial_id} is new: {reason}")


def _with_memory(sweep: Sweep, arguments: argparse.Namespace) -> Sweep:
    """The sweep with the GiB that `resources: {memory: auto}` comes to."""
    resources = sweep.spec.resources
    if resources.memory != "auto":
        return sweep
    peak_mb = _peak_mb(sweep, arguments)
    stated = resources.model_copy(update={"memory": preflight.reserved_gib(peak_mb, resources)})
    print(f"resources.memory: {stated.memory:.2f} GiB for each trial: a measured peak of {peak_mb / 1024:.2f} GiB and a tenth")
    return replace(sweep, spec=sweep.spec.model_copy(update={"resources": stated}))


def _main_memory(sweep: Sweep, arguments: argparse.Namespace) -> Finding:
    peak_mb, cpus = _peak_mb(sweep, arguments), granted_cpus(os.environ)
    return preflight.check_main_memory(peak_mb, sweep.spec.resources, trials=max(1, len(sweep.to_run)), cpus=cpus)


def _peak_mb(sweep: Sweep, arguments: argparse.Namespace) -> float:
    with user_errors(), progress_bar("memory") as progress:
        runtime = trial_runtime(sweep.spec, arguments)
        return main_memory_mb([*sweep.plans, *sweep.samples], sweep.manifests, runtime, progress=progress)


def _probed(sweep: Sweep, arguments: argparse.Namespace) -> dict[str, Estimate | None]:
    with user_errors(), progress_bar("probe") as progress:
        return probed([*sweep.plans, *sweep.samples], trial_runtime(sweep.spec, arguments), progress=progress)


def _first_comment(file: Path) -> str:
    line = file.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip()
