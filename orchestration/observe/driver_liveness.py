"""Decide whether the driver of a sweep is alive, from successive readings of its lease."""

from __future__ import annotations

import time
from typing import Literal

from orchestration.record.lease import Driver


class DriverLiveness:
    """Whether a driver sends heartbeats, measured by this machine's monotonic clock.

    Wall clocks are not compared, because machines may disagree about the time. Time while the store is unavailable does not count.
    """

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._silent_s, self._read_s = 0.0, time.monotonic()
        self._beat_seen = self._missed = False

    def take(self, driver: Driver | None) -> None:
        """Record a reading of the lease; None: nobody holds it."""
        before, now_s = self._driver, time.monotonic()
        if driver and before and driver.token == before.token:
            silent = driver.beat == before.beat
            self._silent_s = self._silent_s + (0.0 if self._missed else now_s - self._read_s) if silent else 0.0
            self._beat_seen = self._beat_seen or not silent
        else:
            self._silent_s, self._beat_seen = 0.0, before is not None  # a driver that started between two readings is alive
        self._driver, self._read_s, self._missed = driver, now_s, False

    def miss(self) -> None:
        """Record that the store did not answer."""
        self._missed = True

    @property
    def token(self) -> int | None:
        """Token of the driver; None if there is none, or if it is dead or silent."""
        return self._driver.token if self._driver and self.state not in ("dead", "silent") else None

    @property
    def state(self) -> Literal["none", "dead", "silent", "alive", "unknown"]:
        """`unknown`: the driver is on another machine and was not observed long enough."""
        if self._driver is None:
            return "none"
        if self._driver.alive is not None:
            return "alive" if self._driver.alive else "dead"
        if self._silent_s >= self._driver.patience_s:
            return "silent"
        return "alive" if self._beat_seen else "unknown"

    def __str__(self) -> str:
        if self._driver is None:
            return "no driver: nothing runs"
        ends = {
            "dead": "is dead: nothing runs",
            "silent": f"sent no heartbeat for {self._driver.patience_s:.0f} s: dead or disconnected",
            "alive": "is alive",
            "unknown": f"sent its last heartbeat at {self._driver.heard}; waiting for the next one",
        }
        return f"{self._driver.name} {ends[self.state]}"
