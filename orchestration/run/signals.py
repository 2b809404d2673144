"""Ctrl-C and SIGTERM: heard whatever Python, Ray or an import does meanwhile, and told apart."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from orchestration.errors import ClusterError
from orchestration.run.stopping import Stop

HURRY_AFTER_S = 45.0
"""Trials that are told to end have 30 s; Ray, should it hang, so much before it is left to itself."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: a batch system, or the notice before a spot machine goes, stops the sweep; it shall be started again elsewhere."""


class Sigterm:
    """Batch systems stop a job with SIGTERM: it is taken as Ctrl-C, but as Terminated, so that it is known which it was.

    It is remembered too: Python swallows what a signal raises in the middle of an import.
    """

    def __init__(self) -> None:
        self._heard = False
        self.listen()

    def listen(self) -> None:
        """From now on; again when Ray has started, which puts a handler of its own, and when it has ended, which takes ours away."""
        signal.signal(signal.SIGTERM, self._hear)

    def check(self) -> None:
        """Raises Terminated where a signal came, although it was swallowed."""
        if self._heard:
            raise Terminated

    def _hear(self, number: int, frame: object) -> None:
        self._heard = True
        raise Terminated


@contextmanager
def gently(stop: Stop) -> Iterator[None]:
    """Within, the first Ctrl-C or SIGTERM lets the trials commit a last checkpoint; the second ends all at once, as does HURRY_AFTER_S."""
    first: list[int] = []
    hurry = threading.Timer(HURRY_AFTER_S, lambda: os.kill(os.getpid(), first[0]))
    hurry.daemon = True

    def note(number: int, frame: object) -> None:
        if first:
            raise KeyboardInterrupt
        first.append(number)
        stop.request(f"stopped by {signal.Signals(number).name}")
        hurry.start()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (ClusterError, KeyboardInterrupt):  # Ray went down too, or did not end; being told to stop came first, and decides what follows
        if not first:
            raise
    finally:
        hurry.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
    if first:
        raise Terminated if first[0] == signal.SIGTERM else KeyboardInterrupt
