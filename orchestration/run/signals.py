"""Handle Ctrl-C, SIGTERM and SIGHUP: stop a sweep gracefully, and tell the caller which of them stopped it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from orchestration.errors import ClusterError
from orchestration.run.stopping import Stop

FORCE_AFTER_S = 45.0
"""After a stop request: trials have 30 s for a last checkpoint; after this time the driver stops waiting for Ray, which may hang."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: a batch system, a spot machine's shutdown notice or a closed terminal stops the sweep, to be restarted later."""


class Termination:
    """Turns SIGTERM and SIGHUP into `Terminated`.

    It also records the signal, because Python can drop an exception that a handler raises during an import.
    """

    def __init__(self) -> None:
        self._received = False
        for number in ending_signals():
            signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Raises Terminated if a signal came and its exception was dropped."""
        if self._received:
            raise Terminated

    def _on_signal(self, number: int, frame: object) -> None:
        if self._received and number == signal.SIGHUP:
            return
        self._received = True
        raise Terminated


def ending_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, and SIGHUP unless it is ignored, as `nohup` does."""
    hang_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, *hang_up)


@contextmanager
def graceful_stop(stop: Stop) -> Iterator[None]:
    """In this context the first Ctrl-C, SIGTERM or SIGHUP requests a stop: trials commit a last checkpoint. A second one, or FORCE_AFTER_S,
    aborts.

    Raises:
        Terminated: at the end, if the first signal was SIGTERM or SIGHUP.
        KeyboardInterrupt: at the end, if it was Ctrl-C.
    """
    first: list[int] = []
    force = threading.Timer(FORCE_AFTER_S, lambda: os.kill(os.getpid(), signal.SIGINT))
    force.daemon = True

    def on_signal(number: int, frame: object) -> None:
        if first and number == signal.SIGHUP:  # a closed terminal sends it twice: from the kernel and from the shell
            return
        if first:
            raise KeyboardInterrupt
        first.append(number)
        stop.request(f"stopped by {signal.Signals(number).name}")
        force.start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield
    except (ClusterError, KeyboardInterrupt):  # Ray failed or hung after the stop request; the request decides
        if not first:
            raise
    finally:
        force.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if first:
        raise KeyboardInterrupt if first[0] == signal.SIGINT else Terminated
