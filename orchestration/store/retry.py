"""Retries an operation of a store until it succeeds, fails for good, or its deadline passes."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from orchestration.errors import StoreUnavailable

T = TypeVar("T")


class TransientFault(StoreUnavailable):
    """A failure that a retry may fix. `unsure`: the server may have done the work, and only its reply was lost."""

    def __init__(self, text: str, *, unsure: bool = True) -> None:
        super().__init__(text)
        self.unsure = unsure


def retried(operation: Callable[[bool], T], *, uri: str, deadline_s: float, log: logging.Logger) -> T:
    """The result of `operation`, called again after each TransientFault. `uri` names the store in log messages.

    The argument of `operation` says whether an earlier call may have done the work.

    Raises:
        TransientFault: the last one, once `deadline_s` seconds have passed.
    """
    started_s, unsure = time.monotonic(), False
    for pause_s in pauses():
        try:
            result = operation(unsure)
        except TransientFault as fault:
            left_s = started_s + deadline_s - time.monotonic()
            if left_s <= 0:
                raise
            if fault.unsure and not unsure:  # one warning per outage, none for a race between writers
                log.warning("%s: %s; retrying for up to %.0f s", uri, fault, left_s)
            unsure = unsure or fault.unsure
            time.sleep(min(pause_s, left_s))
        else:
            if unsure:
                log.info("%s: answers again after %.0f s", uri, time.monotonic() - started_s)
            return result
    raise AssertionError("pauses never ends")


def pauses() -> Iterator[float]:
    """Seconds between tries: 0.1, 0.2, 0.4 .. 5, each shortened by up to half so that writers do not retry in step."""
    jitter = random.Random()  # its own generator: the global one belongs to the training
    return (min(5.0, 0.1 * 2 ** min(n, 6)) * jitter.uniform(0.5, 1.0) for n in itertools.count())
