"""Trials in a store as if they had trained: their epochs and metrics are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.failures import Failure
from orchestration.plan.spec import Retention
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import SCORE, EpochMetrics, Manifest
from orchestration.record.stored_trials import new_manifest
from orchestration.record.trial_record import TrialRecord
from orchestration.store.base import Store


def manifest_of(plan: TrialPlan, **changes: Any) -> Manifest:
    """The manifest of a trial that exists in no store."""
    return Manifest(**{**dict(new_manifest(plan, now_ms=0)), **changes})


def train(
    store: Store, plan: TrialPlan, epochs: Sequence[float | Mapping[str, float]], *, finished: bool = True, failure: Failure | None = None
) -> None:
    """A trial with the metrics of each epoch; a number alone is its val/miou."""
    record = TrialRecord.open(store, plan, retention=Retention())
    for epoch, given in enumerate(epochs, start=1):
        metrics = {SCORE: 0.0, **given} if isinstance(given, Mapping) else {SCORE: given}
        entry = EpochMetrics(epoch=epoch, step=epoch, time_ms=0, metrics=metrics)
        record.commit(step=epoch, epoch=epoch, files={"w": b"w"}, entries=[entry], seconds=1)
    if failure:
        record.fail(failure=failure, reason="as the test says")
    elif finished:
        record.finish()
