"""What happens to a trial, as the live view, the notifications and the tracker hear of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from orchestration.observe.progress import TrialProgress
from orchestration.plan.trial_plan import TrialPlan


@dataclass(frozen=True)
class Event:
    """Something happened to a trial."""

    kind: Literal["started", "update", "retry", "finished", "failed", "stopped", "elsewhere"]
    plan: TrialPlan
    update: TrialProgress | None = None
    reason: str | None = None


Listener = Callable[[Event], None]
