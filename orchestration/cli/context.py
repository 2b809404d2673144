"""What several commands derive from their arguments: the sweep, where trials run, consoles and progress bars."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestration.errors import SweepError
from orchestration.plan.spec import SweepSpec
from orchestration.plan.sweep_file import settings_of
from orchestration.sweep import Sweep, open_sweep
from rrn_core.config import Runtime

if TYPE_CHECKING:
    from orchestration.observe.terminal import SharedTerminal


def open_with_data(arguments: argparse.Namespace) -> Sweep:
    """The sweep on a machine that sees its data, so that identities cover them."""
    return open_sweep(arguments.file, arguments.set, data_root=data_root(arguments), environment=os.environ)


def open_from_store(arguments: argparse.Namespace) -> Sweep:
    """The sweep as the store knows it, on a machine that need not see its data."""
    return open_sweep(arguments.file, arguments.set, data_root=None, environment=os.environ)


def set_defaults(settings: Mapping[str, str]) -> None:
    """Environment variables of Ray and MLflow; those that the user has set stay."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def command_line(arguments: argparse.Namespace) -> str:
    """The command that runs the sweep again."""
    changes = [word for change in arguments.set for word in ("--set", change)]
    place = ["--data-root", arguments.data_root] if arguments.data_root else []
    return shlex.join(["rrn-sweep", str(arguments.file), *changes, *place])


def data_root(arguments: argparse.Namespace) -> Path | None:
    root = arguments.data_root or os.environ.get("RRN_DATA_ROOT")
    return Path(root).resolve() if root else None


def trial_runtime(spec: SweepSpec, arguments: argparse.Namespace) -> Runtime:
    """Where trials run: on CUDA where the file asks for a GPU, whose trials prepare batches on their other CPUs."""
    cpus, on_gpu = max(1, int(spec.resources.cpu)), spec.resources.gpu > 0
    workers = arguments.workers if arguments.workers is not None else (cpus - 1 if on_gpu else 0)
    try:
        return Runtime(
            device=arguments.device or ("cuda" if on_gpu else "cpu"),
            data_root=data_root(arguments),
            lists_root=arguments.file.resolve().parent,
            workers=workers,
            threads=cpus,
            progress_every=10,
        )
    except ValidationError as error:
        faults = "; ".join(f"--{fault['loc'][0]}: {fault['msg'].lower()}, got {fault['input']}" for fault in error.errors())
        raise SweepError(faults) from None


def own_runtime(arguments: argparse.Namespace) -> Runtime:
    """Where this command itself computes."""
    return Runtime(device=arguments.device or "auto", data_root=data_root(arguments), lists_root=Path.cwd())


def changed_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings that replace those of a checkpoint: `--data` and every `--set`."""
    return ({"dataset": arguments.data} if arguments.data else {}) | settings_of(arguments.set)


def console() -> SharedTerminal:
    """Standard output, for commands that draw on it."""
    from orchestration.observe.terminal import SharedTerminal

    return SharedTerminal()


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, fed with the work done and all of it; silent elsewhere."""
    from rich.progress import Progress

    from orchestration.observe.terminal import Terminal

    with Progress(console=Terminal(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
