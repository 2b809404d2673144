"""The arguments of every command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from orchestration.compare.formats import FORMATS
from orchestration.compare.results import At
from orchestration.failures import FAILURES


def parser() -> argparse.ArgumentParser:
    """Parses `rrn-sweep COMMAND ...` into a namespace; `command` names the command."""
    made = argparse.ArgumentParser(
        prog="rrn-sweep", description="Region Relevance Network sweeps. `rrn-sweep FILE` runs what FILE asks for and the store lacks."
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--data-root", help="folder of the data set (or RRN_DATA_ROOT)")
    _add_sweep_commands(commands, place)
    _add_reading_commands(commands, place)
    _add_model_commands(commands, place)
    return made


def _of_a_sweep(place: argparse.ArgumentParser, *, several: bool = False) -> argparse.ArgumentParser:
    """What every command about a sweep file takes."""
    common = argparse.ArgumentParser(add_help=False, parents=[place])
    if several:
        common.add_argument("files", type=Path, nargs="+", metavar="FILE", help="sweep files (YAML)")
    else:
        common.add_argument("file", type=Path, help="sweep file (YAML)")
    common.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the file; a setting by its name alone"
    )
    return common


def _add_sweep_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    common = _of_a_sweep(place)
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
    commands.add_parser("sync", parents=[common, lease], help="FILE: make MLflow show what the store holds; train nothing")
    collect = commands.add_parser("gc", parents=[common, lease], help="FILE: remove what no trial needs any more from the store")
    collect.add_argument("--dry-run", action="store_true", help="only say what would go")
    commands.add_parser("check", parents=[common, where], help="FILE: try data, store, tracking, disk and GPU before anything is spent")


def _add_reading_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    """What only looks at the store, from any machine that reaches it."""
    common = _of_a_sweep(place)
    status = commands.add_parser("status", parents=[common], help="FILE: the state of every trial, from the store alone")
    status.add_argument("--json", action="store_true", help="for other programs")
    status.add_argument("--effort", action="store_true", help="where the hours went: useful, repeated and lost seconds of every attempt")
    compare = commands.add_parser(
        "compare", parents=[_of_a_sweep(place, several=True)], help="FILE...: trials side by side, paired by seed; a table or a page"
    )
    compare.add_argument(
        "--by", action="append", default=[], metavar="SETTING", help="a table for each value; repeatable (default: partition)"
    )
    compare.add_argument("--metric", default="val/miou", help="what is compared (default: val/miou)")
    compare.add_argument(
        "--at", choices=get_args(At), default="last", help="checkpoint rule (default: last; common: at the epoch of the least advanced)"
    )
    compare.add_argument(
        "--baseline", metavar="LABEL", help="what the others are compared with, such as 'eps=0.6' (default: the first of a group)"
    )
    compare.add_argument("--format", choices=FORMATS, help="default: by the name of --out, else text")
    compare.add_argument("--out", type=Path, help="file to write; a name that ends in .html gives one page with all figures")
    watch = commands.add_parser("watch", parents=[common], help="FILE: the live view, from any machine that reaches the store")
    watch.add_argument("--once", action="store_true", help="one look, then end")
    watch.add_argument("--every", type=float, default=3.0, metavar="SECONDS", help="between two looks at the store (default: 3)")
    logs = commands.add_parser("logs", parents=[common], help="FILE TRIAL: all that happened to a trial")
    logs.add_argument("trial", help="beginning of its identity, or its label")
    logs.add_argument("--follow", action="store_true", help="go on as it goes on, until the trial has finished or failed for good")
    ui = commands.add_parser("ui", parents=[common], help="FILE: start the MLflow UI on the right database, and print the address")
    ui.add_argument("--port", type=int, help="of the UI (default: 5000, or the next free one)")
    best = commands.add_parser(
        "best", parents=[common], help="FILE: the best checkpoint; --export DIR writes it with a model card and ONNX"
    )
    best.add_argument(
        "--per", action="append", default=[], metavar="SETTING", help="the best for each value, such as partition; repeatable"
    )
    best.add_argument("--at", choices=("best", "last"), default="best", help="checkpoint rule (default: best)")
    best.add_argument("--export", type=Path, metavar="DIR", help="folder to write to")
    best.add_argument("--device", help="on which model.onnx is checked against torch (default: cuda where there is one)")
    best.add_argument("--no-onnx", dest="onnx", action="store_false", help="without model.onnx")


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
