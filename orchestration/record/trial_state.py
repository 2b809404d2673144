"""The state of a trial, and the one function that decides it. Texts, MLflow statuses and exit codes derive from it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestration.plan.spec import Retries
    from orchestration.record.manifest import Manifest


class TrialState(StrEnum):
    """
    new          no attempt has started
    running      an attempt is open, and its driver is alive
    restarting   the last attempt ended, and its driver starts another
    interrupted  started but not finished, and no driver works on it; the next run of the sweep resumes it
    finished     trained to its last epoch
    stopped      ended early on purpose and keeps its result; reserved for early stopping
    failed       the last attempt failed, and no other follows in this run; the next run of the sweep tries again
    """

    NEW = "new"
    RUNNING = "running"
    RESTARTING = "restarting"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_open(self) -> bool:
        """Whether a driver works on the trial."""
        return self in (TrialState.RUNNING, TrialState.RESTARTING)

    @property
    def is_final(self) -> bool:
        """Whether this run of the sweep has finished with the trial."""
        return self in (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED)

    @property
    def resumable(self) -> bool:
        """Whether the next run of the sweep continues it."""
        return self in (TrialState.INTERRUPTED, TrialState.FAILED)


def state_of(manifest: Manifest | None, *, driver: int | None, retries: Retries) -> TrialState:
    """The state of a trial. `driver`: token of the driver that is alive; None if none is."""
    if manifest is None or (manifest.status is TrialState.RUNNING and not manifest.attempts):
        return TrialState.NEW
    if manifest.status in (TrialState.FINISHED, TrialState.STOPPED) or not manifest.attempts:
        return manifest.status
    attempt = manifest.attempts[-1]
    driven = attempt.driver == driver
    if manifest.is_open:
        return TrialState.RUNNING if driven else TrialState.INTERRUPTED
    if driven and attempt.outcome != "interrupted" and not budget_spent(manifest, retries, driver=attempt.driver):
        return TrialState.RESTARTING
    return manifest.status


def budget_spent(manifest: Manifest, retries: Retries, *, driver: int) -> bool:
    """Whether the last attempt's failure used up this driver's retries for its class of failure."""
    failure = manifest.attempts[-1].outcome if manifest.attempts else None
    if failure is None or failure == "finished" or failure == "interrupted":
        return False
    return manifest.failures(failure, driver=driver) > retries.of(failure)


def with_present_states(stored: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 as version 2. Version 1 called an interrupted trial `running` and its attempt `stopped`.

    What is damaged stays damaged.
    """
    attempts = stored.get("attempts", [])
    if not isinstance(attempts, list) or not all(isinstance(attempt, dict) for attempt in attempts):
        return stored | {"version": 2}
    attempts = [{**attempt, "outcome": "interrupted"} if attempt.get("outcome") == "stopped" else attempt for attempt in attempts]
    closed = bool(attempts) and attempts[-1].get("ended_ms") is not None
    interrupted = closed and stored.get("status") == "running"
    return stored | {"version": 2, "attempts": attempts} | ({"status": "interrupted"} if interrupted else {})
