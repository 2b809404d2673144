"""Entry point of `rrn-sweep`. Ctrl-C ends it without a traceback from the first line on, also while modules load."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Load and run the command line.

    While modules load and while Python ends, a KeyboardInterrupt can be raised in any code, or be dropped: a handler ends the process.
    """
    raising = signal.getsignal(signal.SIGINT)
    if raising is signal.default_int_handler:  # a shell starts background jobs with SIGINT ignored
        signal.signal(signal.SIGINT, _end)
    try:
        from orchestration.cli.main import main as run

        signal.signal(signal.SIGINT, raising)
        run()
    except KeyboardInterrupt:
        _end()
    finally:
        if raising is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
