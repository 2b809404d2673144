"""Handle Ctrl-C and SIGTERM: stop a sweep gracefully, and tell the caller which of the two stopped it."""

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
    """SIGTERM: a batch system or a spot machine's shutdown notice stops the sweep; it is meant to be restarted elsewhere."""


class Sigterm:
    """Turns SIGTERM into `Terminated`.

    It also records the signal, because Python can drop an exception that a handler raises during an import.
    """

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def check(self) -> None:
        """Raises Terminated if a signal came and its exception was dropped."""
        if self._received:
            raise Terminated

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._received = True
        raise Terminated


@contextmanager
def graceful_stop(stop: Stop) -> Iterator[None]:
    """In this context the first Ctrl-C or SIGTERM requests a stop: trials commit a last checkpoint. A second one, or FORCE_AFTER_S, aborts.

    Raises:
        Terminated: at the end, if the first signal was SIGTERM.
        KeyboardInterrupt: at the end, if it was Ctrl-C.
    """
    first: list[int] = []
    force = threading.Timer(FORCE_AFTER_S, lambda: os.kill(os.getpid(), first[0]))
    force.daemon = True

    def on_signal(number: int, frame: object) -> None:
        if first:
            raise KeyboardInterrupt
        first.append(number)
        stop.request(f"stopped by {signal.Signals(number).name}")
        force.start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
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
        raise Terminated if first[0] == signal.SIGTERM else KeyboardInterrupt
