"""Provide the trials of a run one by one: from a fixed list, or (search.py) from an adaptive search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest


class Source(Protocol):
    """Yields plans and learns their results."""

    @property
    def remaining(self) -> int:
        """Plans still to come."""

    def next(self) -> TrialPlan | None:
        """The next plan; None if there is none left."""

    def tell(self, manifest: Manifest) -> None:
        """Learn the result of a trial."""


class FixedSource:
    """A list of plans in order."""

    def __init__(self, plans: Sequence[TrialPlan]) -> None:
        self._plans = list(plans)

    @property
    def remaining(self) -> int:
        return len(self._plans)

    def next(self) -> TrialPlan | None:
        return self._plans.pop(0) if self._plans else None

    def tell(self, manifest: Manifest) -> None:
        """Does nothing: results do not change a fixed list."""
