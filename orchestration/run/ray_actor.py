"""The Ray actor that trains: a trial on a node, driven by Ray Tune."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray import tune

from orchestration.errors import Fenced, Preempted, StoreError, StoreUnavailable
from orchestration.observe.events import TrialProgress
from orchestration.run.trial import run_trial

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.5
"""Shortest time between two reports without a commit: for each report the trial waits for the driver."""

_PROGRESS, _REFUSED = "progress", "refused"


class TrialActor(tune.Trainable):
    """Runs a trial: each step trains until there is something to report. A new actor resumes from the store.

    A class and not a function: Ray calls its methods in the main thread, which receives SIGTERM, and it calls `cleanup` when the sweep
    is stopped.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._preempted = False
        # replaces Ray's handler, which ends the process in the middle of a step
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            return self._next_report()
        except Fenced as error:  # not an error to retry: another worker trains this trial
            log.warning("%s", error)
            return {"done": True}
        except StoreUnavailable:
            raise
        except StoreError as error:  # permanent: the store would refuse another attempt too
            return {"done": True, _REFUSED: str(error)}

    def cleanup(self) -> None:
        try:
            self._updates.close()
        except Exception as error:  # the attempt stays open; the next worker or driver closes it
            log.warning("the last checkpoint was not committed: %s", error)

    def _begin(self, config: dict[str, Any]) -> None:
        self._updates = run_trial(config["plan"], config["job"])
        self._committed = -1

    def _next_report(self) -> dict[str, Any]:
        since = time.monotonic()
        for update in self._updates:
            if self._preempted and not update.ended:
                self._updates.throw(Preempted("its process received SIGTERM"))
            if update.ended or update.committed != self._committed or time.monotonic() - since >= REPORT_EVERY_S:
                self._committed = update.committed
                return {_PROGRESS: asdict(update), "done": update.ended is not None}
        return {"done": True}

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._preempted = True


def progress_of(result: Mapping[str, Any]) -> TrialProgress | None:
    """The progress in a result of `step`; None where it has none.

    It travels as a dict, because Tune writes the last result into its JSON state and keeps the text of whatever JSON cannot represent.
    """
    return TrialProgress(**result[_PROGRESS]) if _PROGRESS in result else None


def refusal_of(result: Mapping[str, Any]) -> str | None:
    """Why the store refused the trial for good, in a result of `step`."""
    return result.get(_REFUSED)
