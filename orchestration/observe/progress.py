"""Where a trial stands, for those who watch. Apart from trial.py, which imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrialProgress:
    """A trial as it is just now; where nobody knows a value, it is None."""

    trial_id: str
    attempt: int
    resumed_step: int | None
    """Step of the checkpoint that this attempt went on from."""
    epoch: int
    epochs: int
    iteration: int
    iterations: int
    loss: float | None = None
    miou: float | None = None
    eta_s: float | None = None
    committed: int = 0
    """Epochs that the store holds."""
    worked_s: float = 0.0
    """Seconds since the attempt began."""
    ended: Literal["finished", "failed"] | None = None
    note: str | None = None
    """What the user should know about how this attempt started."""
