"""The arguments of every command."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from orchestration.compare.formats import FORMATS
from orchestration.compare.results import At
from orchestration.failures import FAILURES


def parser() -> argparse.ArgumentParser:
    """Parses `rrn-sweep COMMAND ...` into a namespace; `command` names the command."""
    made = argparse.ArgumentParser(
        prog="rrn-sweep",
        description="Semi-supervised segmentation sweeps. `rrn-sweep FILE` trains what FILE asks for and the store lacks.",
    )
    made.add_argument("--version", action="version", version=f"rrn-sweep {version('rrn-sweep')}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--data-root", help="folder of the data set (or RRN_DATA_ROOT)")
    _add_sweep_commands(commands, place)
    _add_reading_commands(commands, place)
    _add_model_commands(commands, place)
    _add_reference_commands(commands)
    return made


def _of_a_sweep(place: argparse.ArgumentParser, *, several: bool = False) -> argparse.ArgumentParser:
    """What every command about a sweep file takes."""
    common = argparse.ArgumentParser(add_help=False, parents=[place])
    if several:
        common.add_argument("files", type=Path, nargs="+", metavar="FILE", help="sweep files (YAML)")
    else:
        common.add_argument("file", type=Path, help="sweep file (YAML)")
    common.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the file, or a setting by its name; repeatable",
    )
    return common


def _add_sweep_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    common = _of_a_sweep(place)
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", help="torch device of a trial (default: cuda where resources.gpu > 0, else cpu)")
    where.add_argument("--workers", type=int, help="processes per trial that prepare batches (default: 0, or cpu - 1 with a GPU)")
    lease = argparse.ArgumentParser(add_help=False)
    lease.add_argument("--take-over", action="store_true", help="take the lease even if another driver appears to hold it")
    run = commands.add_parser("run", parents=[common, where, lease], help="FILE: train every trial that is not finished (default command)")
    run.add_argument("--only", action="append", default=[], metavar="ID", help="only trials whose identity starts with ID; repeatable")
    help_retry = "of the failed trials only those with this class of failure; repeatable (default: all)"
    run.add_argument("--retry", action="append", default=[], choices=FAILURES, help=help_retry)
    plan = commands.add_parser("plan", parents=[common, where], help="FILE: show the trials, and start nothing")
    views = plan.add_mutually_exclusive_group()
    views.add_argument("--show-config", action="store_true", help="every setting of every trial, as YAML")
    views.add_argument("--probe", action="store_true", help="measure time and memory on this machine in a few steps of each kind of trial")
    check_help = "FILE: test data, store, tracking, disk and GPU before a GPU-hour is spent"
    commands.add_parser("check", parents=[common, where], help=check_help)
    init = commands.add_parser("init", help="[NAME]: write a shipped sweep file into the current folder")
    init.add_argument("name", nargs="?", default="epsilon_grid", help="name of the sweep (default: epsilon_grid)")
    init.add_argument("--list", action="store_true", help="show the shipped sweeps")
    commands.add_parser("sync", parents=[common, lease], help="FILE: make MLflow equal to the store; train nothing")
    collect = commands.add_parser("gc", parents=[common, lease], help="FILE: remove from the store what no trial needs")
    collect.add_argument("--dry-run", action="store_true", help="only show what would be removed")


def _add_reading_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    """Commands that only read the store."""
    common = _of_a_sweep(place)
    status = commands.add_parser("status", parents=[common], help="FILE: the state of every trial, from the store alone")
    status.add_argument("--json", action="store_true", help="for other programs")
    status.add_argument("--effort", action="store_true", help="useful, repeated and lost seconds of every attempt")
    watch = commands.add_parser("watch", parents=[common], help="FILE: the live view, on any machine that reaches the store")
    watch.add_argument("--once", action="store_true", help="print the view once and end")
    watch.add_argument("--every", type=float, default=3.0, metavar="SECONDS", help="between two reads of the store (default: 3)")
    logs = commands.add_parser("logs", parents=[common], help="FILE TRIAL: attempts, epochs, checkpoints and failures of a trial")
    logs.add_argument("trial", help="start of its identity, or its label")
    logs.add_argument("--follow", action="store_true", help="continue until the trial has finished or failed")
    _add_compare(commands, place)
    _add_best(commands, common)
    ui = commands.add_parser("ui", parents=[common], help="FILE: start the MLflow UI on the sweep's database and print the address")
    ui.add_argument("--port", type=int, help="port of the UI (default: 5000, or the next free one)")
    sweeps = commands.add_parser("list", help="the sweeps of a store, with the number of trials in each state")
    sweeps.add_argument("--store", metavar="URI", help="default: RRN_STORE, else ./runs/store")


def _add_compare(commands: Any, place: argparse.ArgumentParser) -> None:
    compare = commands.add_parser(
        "compare", parents=[_of_a_sweep(place, several=True)], help="FILE...: trials side by side, paired by seed, as a table or a page"
    )
    by_help = "a table for each value of the setting; repeatable (default: partition)"
    compare.add_argument("--by", action="append", default=[], metavar="SETTING", help=by_help)
    compare.add_argument("--metric", default="val/miou", help="metric to compare (default: val/miou)")
    at_help = "checkpoint rule (default: last; common: the last epoch that every trial has completed)"
    compare.add_argument("--at", choices=get_args(At), default="last", help=at_help)
    baseline_help = "row to compare the others with, such as 'eps=0.6' (default: the first of a table)"
    compare.add_argument("--baseline", metavar="LABEL", help=baseline_help)
    compare.add_argument("--format", choices=FORMATS, help="default: by the ending of --out, else text")
    compare.add_argument("--out", type=Path, help="file to write; .html gives one page with all figures")


def _add_best(commands: Any, common: argparse.ArgumentParser) -> None:
    best_help = "FILE: the best checkpoint; --export DIR writes it with a model card and ONNX"
    best = commands.add_parser("best", parents=[common], help=best_help)
    per_help = "the best for each value of the setting, such as partition; repeatable"
    best.add_argument("--per", action="append", default=[], metavar="SETTING", help=per_help)
    best.add_argument("--at", choices=("best", "last"), default="best", help="checkpoint rule (default: best)")
    best.add_argument("--export", type=Path, metavar="DIR", help="folder to write to")
    best.add_argument("--device", help="torch device on which model.onnx is checked (default: cuda where there is one)")
    best.add_argument("--no-onnx", dest="onnx", action="store_false", help="without model.onnx")


def _add_model_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    weights = commands.add_parser("weights", help="import FILE --out OUT: convert released or ImageNet weights")
    imports = weights.add_subparsers(dest="action", required=True).add_parser("import", help="read a checkpoint without executing it")
    imports.add_argument("source", type=Path, help="RRN or CPS checkpoint, or an ImageNet ResNet (v1c stem)")
    imports.add_argument("--out", type=Path, required=True, help="file to write (.safetensors)")
    common = argparse.ArgumentParser(add_help=False, parents=[place])
    common.add_argument("checkpoint", help="weights file, checkpoint folder, or s3://.../checkpoints/STEP-ATTEMPT")
    common.add_argument("--data", help="data set, where the checkpoint does not name it or another one is meant")
    common.add_argument("--device", help="torch device (default: cuda where there is one)")
    common.add_argument("--stride", type=int, help="stride of the evaluation windows in pixels (default: two thirds of crop)")
    set_help = "crop, ensemble, ensemble_weight, eval_batch, precision, ..."
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    evaluate = commands.add_parser("evaluate", parents=[common], help="CHECKPOINT: IoU per class of both branches and their ensemble")
    evaluate.add_argument("--json", action="store_true", help="for other programs")
    predict = commands.add_parser("predict", parents=[common], help="CHECKPOINT IMAGES... --out DIR: label images and overlays")
    predict.add_argument("images", type=Path, nargs="+", help="images to label, or folders of images")
    predict.add_argument("--out", type=Path, required=True, help="folder to write to")


def _add_reference_commands(commands: Any) -> None:
    settings = commands.add_parser("settings", help="[METHOD|NAME]: the reference of settings")
    settings.add_argument("name", nargs="?", help="a method or a setting (default: all settings in short)")
    completion = commands.add_parser("completion", help='SHELL: a completion script; load it with eval "$(rrn-sweep completion bash)"')
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
