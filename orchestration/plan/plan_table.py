"""The table that `rrn-sweep plan` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestration.formatting import shown, table
from orchestration.plan.trial_plan import TrialPlan


def render(plans: Sequence[TrialPlan], states: Mapping[str, str] | None = None, costs: Mapping[str, tuple[str, str]] | None = None) -> str:
    """The trials as a plain table: identity, varied settings, epochs, iterations; time and memory, and their state, where known."""
    if not plans:
        return "no trials"
    head = [
        "trial",
        *_columns(plans[0]),
        "epochs",
        "iterations",
        *(["time", "memory"] if costs else []),
        *(["state"] if states is not None else []),
    ]
    return table([head, *(_rendered(plan, states, costs) for plan in plans)])


def _columns(plan: TrialPlan) -> list[str]:
    return [name for name in plan.varied if name != "epochs"]  # which has a column of its own


def _rendered(plan: TrialPlan, states: Mapping[str, str] | None, costs: Mapping[str, tuple[str, str]] | None) -> list[str]:
    settings = [shown(plan.settings[name]) if name in plan.settings else "-" for name in _columns(plan)]
    cost = costs.get(plan.trial_id, ("-", "-")) if costs else ()
    state = [states.get(plan.trial_id, "new")] if states is not None else []
    return [plan.trial_id, *settings, str(plan.config.epochs), str(plan.iterations or "?"), *cost, *state]
