"""Commands that only read the store, on any machine that reaches it: status, watch, logs, compare, best, ui, list."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections import Counter

from orchestration import inference
from orchestration.cli.context import command_line, console, open_from_store, own_runtime, set_defaults
from orchestration.cli.exit_codes import OK
from orchestration.compare import formats
from orchestration.compare.published import published_table
from orchestration.errors import StoreError, StoreUnavailable, SweepError, user_errors
from orchestration.formatting import bytes_shown, table
from orchestration.observe.status import as_json, effort, summary
from orchestration.output import reader_gone
from orchestration.plan.spec import Retries
from orchestration.preflight import check as preflight
from orchestration.record.lease import driver_of
from orchestration.record.manifest import read_manifests, sweep_names
from orchestration.record.trial_state import TrialState, state_of
from orchestration.run.git_checkout import git_state
from orchestration.store.base import Store
from orchestration.store.open import open_store
from orchestration.sweep import STORE_WAITS_S, open_sweep, store_uri
from orchestration.tracking.mlflow_private import CLIENT_SETTINGS

log = logging.getLogger(__name__)


def status(arguments: argparse.Namespace) -> int:
    sweep = open_from_store(arguments)
    if arguments.json:
        trials = as_json(sweep.plans, sweep.manifests, sweep.states, unreadable=sweep.unreadable)
        print(json.dumps({"sweep": sweep.name, "store": sweep.store.uri, "trials": trials}, indent=2))
        return OK
    print(summary(sweep.plans, sweep.manifests, sweep.states, unreadable=sweep.unreadable) if sweep.plans else "no trial started yet")
    if arguments.effort:
        print(f"\n{effort(sweep.plans, sweep.manifests)}")
    if sweep.spec.published:
        print(f"\n{published_table(sweep.spec.published, sweep.plans, sweep.manifests)}")
    print(f"\n{sweep.count}")
    return OK


def watch(arguments: argparse.Namespace) -> int:
    from orchestration.observe.watch import watch as follow_sweep

    if arguments.every <= 0:
        raise SweepError(f"--every: must be > 0, got {arguments.every:g}")
    follow_sweep(open_from_store(arguments), console(), every_s=arguments.every, once=arguments.once, stop=reader_gone())
    return OK


def logs(arguments: argparse.Namespace) -> int:
    from orchestration.observe.logs import logs as print_log

    print_log(open_from_store(arguments), arguments.trial, print, follow=arguments.follow, stop=reader_gone())
    return OK


def compare(arguments: argparse.Namespace) -> int:
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
        return OK
    with user_errors():
        inference.write(arguments.out, body)
    print(f"{arguments.out}: {bytes_shown(len(body))}")
    return OK


def best(arguments: argparse.Namespace) -> int:
    from orchestration.export import best_checkpoint
    from orchestration.export.export_folder import export

    preflight.require_device(own_runtime(arguments))
    sweep = open_from_store(arguments)
    choices = best_checkpoint.best(sweep.plans, sweep.manifests, per=arguments.per, at=arguments.at)
    print(best_checkpoint.render(choices, best_checkpoint.missing(sweep.plans, choices, per=arguments.per)))
    if arguments.export is None:
        return OK
    commands = {plan.trial_id: f"{command_line(arguments)} --only {plan.trial_id}" for plan in sweep.plans}
    runtime, commit = own_runtime(arguments), git_state()["git_commit"]
    print()
    for written in export(choices, sweep.store, arguments.export, runtime=runtime, onnx=arguments.onnx, commands=commands, commit=commit):
        print(written)
    return OK


def ui(arguments: argparse.Namespace) -> int:
    from orchestration.tracking import ui_server

    set_defaults(CLIENT_SETTINGS)
    ui_server.ui(open_from_store(arguments), console(), port=arguments.port, environment=os.environ)
    return OK


def list_sweeps(arguments: argparse.Namespace) -> int:
    """The sweeps of a store, with the number of trials in each state."""
    store = open_store(arguments.store or store_uri(None, os.environ), deadline_s=STORE_WAITS_S)
    names = sweep_names(store)
    states = {name: _states(store, name) for name in names}
    shown = [state for state in TrialState if any(counts[state] for counts in states.values())]
    rows = [[name, str(counts.total()), *(str(counts[state]) for state in shown)] for name, counts in states.items()]
    print(table([["sweep", "trials", *shown], *rows]) if rows else f"{store.uri}: no sweep yet")
    return OK


def _states(store: Store, name: str) -> Counter[TrialState]:
    """With the default retries: the store does not have the sweep file."""
    try:
        driver = driver_of(store, name)
    except StoreUnavailable:
        raise
    except StoreError as error:  # a damaged lease: the other sweeps are shown all the same
        log.warning("%s", error)
        driver = None
    token = driver.token if driver and driver.working else None
    return Counter(state_of(manifest, driver=token, retries=Retries()) for manifest in read_manifests(store, name).values())
