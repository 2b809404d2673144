"""Format the state of a sweep as tables and JSON, from its manifests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.formatting import clock, duration, one_line, shown, table
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import SCORE, Attempt, EpochMetrics, Manifest
from orchestration.record.trial_state import TrialState

HEADS = ("branch1", "branch2", "ensemble")


States = Mapping[str, TrialState]
"""States by trial_id."""


def summary(
    plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest], states: States, *, unreadable: Mapping[str, str] | None = None
) -> str:
    """One line per failed trial, then a table of all trials in the order of the sweep file.

    mIoU in percent on the validation list, of branch 1, branch 2 and their ensemble, at the last epoch and at the epoch with the
    best `val/miou`.

    Args:
        unreadable: by trial_id, why the store has no usable record of a trial.
    """
    varied = plans[0].varied if plans else ()
    head = ["trial", *varied, "state", "epoch", "last: b1", "b2", "ens", "best: b1", "b2", "ens", "at", "time"]
    rows = [_row(plan, manifests.get(plan.trial_id), states[plan.trial_id]) for plan in plans]
    text = table([head, *rows])
    return "\n".join([*failures(plans, manifests, states, unreadable), text])


def failures(
    plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest], states: States, unreadable: Mapping[str, str] | None = None
) -> list[str]:
    """One line per failed trial, with the reason."""
    reasons = {trial_id: manifest.failure_text for trial_id, manifest in manifests.items()} | dict(unreadable or {})
    failed = [plan for plan in plans if states[plan.trial_id] is TrialState.FAILED]
    return [f"FAILED {plan.trial_id} {plan.label}: {one_line(reasons[plan.trial_id])}" for plan in failed]


def effort(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> str:
    """Time of all attempts by trial, in total and by node, as h:mm:ss. An open attempt counts up to its newest checkpoint.

    useful: work that a checkpoint stored first; repeated: work that an earlier attempt had already committed; lost: work in no checkpoint.
    """
    found = [(plan, manifests[plan.trial_id].attempts) for plan in plans if plan.trial_id in manifests]
    attempts = [attempt for _, of_trial in found for attempt in of_trial]
    head = ["attempts", "outcomes", "useful", "repeated", "lost", "sum", "useful share"]
    trials = [[plan.trial_id, plan.label, *_effort_cells(of_trial)] for plan, of_trial in found]
    by_node = {node: [attempt for attempt in attempts if attempt.node == node] for node in sorted({a.node for a in attempts})}
    return "\n".join(
        [
            table([["trial", "label", *head], *trials, ["all", "", *_effort_cells(attempts)]]),
            *([shares(attempts)] if any(attempt.seconds for attempt in attempts) else []),
            "",
            table([["node", *head], *([node, *_effort_cells(there)] for node, there in by_node.items())]),
        ]
    )


def shares(attempts: Sequence[Attempt]) -> str:
    """`useful 97.0%, repeated 0.0%, lost 3.0% of 1:02:03`."""
    kinds = _effort_s(attempts)
    total = sum(kinds.values())
    return ", ".join(f"{kind} {seconds / (total or 1.0):.1%}" for kind, seconds in kinds.items()) + f" of {clock(total)}"


def state_text(state: TrialState, manifest: Manifest | None) -> str:
    """`new`, `finished`, `running at epoch 3`, `interrupted (lost) at epoch 3`, `failed (memory) at epoch 3`."""
    if manifest is None or state in (TrialState.NEW, TrialState.FINISHED):
        return state
    return f"{_with_class(state, manifest)} at epoch {manifest.epochs}"


def as_json(
    plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest], states: States, *, unreadable: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """State, attempts and checkpoints of every trial, and the metrics of its last and best epoch, for other programs."""
    reasons = {trial_id: {"reason": fault} for trial_id, fault in (unreadable or {}).items()}
    return [_as_json(plan, manifests.get(plan.trial_id), states[plan.trial_id]) | reasons.get(plan.trial_id, {}) for plan in plans]


def _with_class(state: str, manifest: Manifest) -> str:
    return f"{state} ({manifest.failure})" if manifest.failure else state


def _effort_cells(attempts: Sequence[Attempt]) -> list[str]:
    outcomes = Counter(attempt.outcome or "open" for attempt in attempts)
    kinds = _effort_s(attempts)
    share = f"{kinds['useful'] / sum(kinds.values()):.1%}" if any(kinds.values()) else "-"
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "-"
    return [str(len(attempts)), counts, *map(clock, (*kinds.values(), sum(kinds.values()))), share]


def _effort_s(attempts: Sequence[Attempt]) -> dict[str, float]:
    return {
        "useful": sum(attempt.useful_s for attempt in attempts),
        "repeated": sum(attempt.repeated_s for attempt in attempts),
        "lost": sum(attempt.lost_s for attempt in attempts),
    }


def _row(plan: TrialPlan, manifest: Manifest | None, state: TrialState) -> list[str]:
    cells = [plan.trial_id, *(shown(plan.settings[name]) if name in plan.settings else "-" for name in plan.varied)]
    if manifest is None:
        return [*cells, state, f"0/{plan.config.epochs}", *["-"] * 8]
    best = manifest.best
    return [
        *cells,
        _with_class(state, manifest),
        f"{manifest.epochs}/{plan.config.epochs}",
        *_mious(manifest.last),
        *_mious(best),
        str(best.epoch) if best else "-",
        duration(manifest.seconds),
    ]


def _mious(entry: EpochMetrics | None) -> list[str]:
    mious = [entry.metrics.get(f"{SCORE}_{head}") if entry else None for head in HEADS]
    return ["-" if miou is None else f"{100 * miou:.1f}" for miou in mious]


def _as_json(plan: TrialPlan, manifest: Manifest | None, state: TrialState) -> dict[str, Any]:
    known: dict[str, Any] = {
        "trial_id": plan.trial_id,
        "label": plan.label,
        "settings": plan.settings,
        "state": state,
        "epochs": [0, plan.config.epochs],
    }
    if manifest:
        known |= {
            "epochs": [manifest.epochs, plan.config.epochs],
            "attempts": [attempt.model_dump() for attempt in manifest.attempts],
            "failure": manifest.failure,
            "reason": manifest.reason,
            "seconds": round(manifest.seconds, 3),
            "updated_ms": manifest.updated_ms,
            "last": manifest.last.model_dump() if manifest.last else None,
            "best": manifest.best.model_dump() if manifest.best else None,
            "checkpoints": [checkpoint.model_dump() for checkpoint in manifest.checkpoints],
        }
    return known
