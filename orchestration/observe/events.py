"""Events of a trial, as the live view, the notifications and the tracker receive them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.trial_state import TrialState


@dataclass(frozen=True)
class TrialProgress:
    """Progress of a trial; an unknown value is None."""

    attempt: int
    resumed_step: int | None
    """Step of the checkpoint from which this attempt resumed."""
    epoch: int
    epochs: int
    iteration: int
    iterations: int
    loss: float | None = None
    miou: float | None = None
    eta_s: float | None = None
    committed: int = 0
    """Epochs whose metrics are in the store."""
    worked_s: float = 0.0
    """Seconds since the attempt began."""
    ended: TrialState | None = None
    note: str | None = None
    """A message for the user about the start of this attempt."""


@dataclass(frozen=True)
class Event:
    """A trial entered a state, or is running and made progress."""

    plan: TrialPlan
    state: TrialState
    progress: TrialProgress | None = None
    reason: str | None = None


Listener = Callable[[Event], None]
