"""Where the trials of a run come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest


class Source(Protocol):
    """Where plans come from: a fixed list or an adaptive search."""

    @property
    def remaining(self) -> int: ...

    def next(self) -> TrialPlan | None: ...

    def tell(self, manifest: Manifest) -> None: ...


class FixedSource:
    """A list of plans, one after the other."""

    def __init__(self, plans: Sequence[TrialPlan]) -> None:
        self._plans = list(plans)

    @property
    def remaining(self) -> int:
        return len(self._plans)

    def next(self) -> TrialPlan | None:
        return self._plans.pop(0) if self._plans else None

    def tell(self, manifest: Manifest) -> None:
        """A fixed list learns nothing."""
