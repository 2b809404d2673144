"""The Ray actor that trains: a trial on a node, as Ray Tune drives it."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import asdict
from typing import Any

from ray import tune

from orchestration.errors import Fenced, Preempted, StoreError, StoreUnavailable
from orchestration.run.trial import run_trial

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.5
"""A trial reports to the driver at most this often, besides after every commit: each report waits for the driver."""


class TrialActor(tune.Trainable):
    """The Ray actor that runs a trial: each step trains until there is something to report. A new actor asks the store where it was.

    A class and not a function, because Ray calls its methods in the main thread, where SIGTERM can be heard, and because Ray
    calls `cleanup` when the sweep is stopped.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._told_to_end = False
        # instead of Ray's own handler, which ends the process in the middle of a step
        signal.signal(signal.SIGTERM, self._note_sigterm)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            return self._next_report()
        except Fenced as error:  # not an error to retry: someone else is training this very trial
            log.warning("%s", error)
            return {"done": True}
        except StoreUnavailable:
            raise
        except StoreError as error:  # refused for good: another attempt would be refused alike
            return {"done": True, "refused": str(error)}

    def cleanup(self) -> None:
        try:
            self._updates.close()
        except Exception as error:  # the attempt stays open; who comes next settles it
            log.warning("the last checkpoint was not committed: %s", error)

    def _begin(self, config: dict[str, Any]) -> None:
        self._updates = run_trial(config["plan"], config["job"])
        self._committed = -1

    def _next_report(self) -> dict[str, Any]:
        since = time.monotonic()
        for update in self._updates:
            if self._told_to_end and not update.ended:
                self._updates.throw(Preempted("its process was told to end (SIGTERM)"))
            if update.ended or update.committed != self._committed or time.monotonic() - since >= REPORT_EVERY_S:
                self._committed = update.committed
                return {**asdict(update), "done": update.ended is not None}
        return {"done": True}

    def _note_sigterm(self, number: int, frame: object) -> None:
        self._told_to_end = True
