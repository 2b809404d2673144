"""`rrn-sweep`: dispatches a command, prints what a user must fix in one line, and ends with one of `exit_codes`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from orchestration.cli import model_commands, reading_commands, reference, sweep_commands
from orchestration.cli.arguments import parser
from orchestration.cli.exit_codes import BAD_INPUT, INTERRUPTED, RESUME_ME
from orchestration.errors import ClusterLost, SweepError
from orchestration.output import install
from orchestration.plan.validation_text import suggestion
from orchestration.run.signals import Terminated

COMMANDS = {
    "init": sweep_commands.init,
    "check": sweep_commands.check,
    "plan": sweep_commands.plan,
    "run": sweep_commands.run,
    "status": reading_commands.status,
    "watch": reading_commands.watch,
    "logs": reading_commands.logs,
    "compare": reading_commands.compare,
    "best": reading_commands.best,
    "ui": reading_commands.ui,
    "list": reading_commands.list_sweeps,
    "sync": sweep_commands.sync,
    "gc": sweep_commands.collect_garbage,
    "weights": model_commands.import_weights,
    "evaluate": model_commands.evaluate,
    "predict": model_commands.predict,
    "settings": reference.print_settings,
    "completion": reference.print_completion,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `rrn-sweep`."""
    install()
    arguments = parser().parse_args(_with_command(list(sys.argv[1:] if argv is None else argv)))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the store reports an outage itself, in one line
    try:
        code = COMMANDS[arguments.command](arguments)
    except ClusterLost as error:
        print(f"{error}; the same command resumes from the last checkpoints", file=sys.stderr)
        code = RESUME_ME
    except SweepError as error:
        print(error, file=sys.stderr)
        code = BAD_INPUT
    except Terminated:
        print("terminated: the same command resumes from the last checkpoints", file=sys.stderr)
        code = RESUME_ME
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _with_command(argv: list[str]) -> list[str]:
    """`rrn-sweep FILE` means `rrn-sweep run FILE`."""
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is None or first in COMMANDS:
        return argv
    if not Path(first).suffix and not Path(first).exists():
        print(f"{first}: neither a command nor a sweep file{suggestion(first, COMMANDS)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    return ["run", *argv]
