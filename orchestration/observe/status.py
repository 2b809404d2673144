"""Tables of a sweep, from the manifests alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.formatting import clock, duration, shown, table
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Attempt, EpochMetrics, Manifest

HEADS = ("branch1", "branch2", "ensemble")


def summary(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> str:
    """What a finished sweep says: failed trials first, then every trial in the order of the file.

    mIoU in percent on the validation list, of branch 1 / branch 2 / the ensemble, at the last epoch and at the epoch
    with the best `val/miou`.
    """
    varied = plans[0].varied if plans else ()
    head = ["trial", *varied, "status", "epoch", "last: b1", "b2", "ens", "best: b1", "b2", "ens", "at", "time"]
    rows = [_row(plan, manifests.get(plan.trial_id)) for plan in plans]
    text = table([head, *rows])
    return "\n".join([*failures(plans, manifests), text])


def failures(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[str]:
    """One line of reason for each failed trial."""
    found = [(plan, manifests[plan.trial_id]) for plan in plans if plan.trial_id in manifests]
    return [f"FAILED {plan.trial_id} {plan.label}: {_reason(manifest)}" for plan, manifest in found if manifest.status == "failed"]


def effort(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> str:
    """Where the time of all attempts went, by trial, in sum and by node, as h:mm:ss; an open attempt counts up to its newest checkpoint.

    useful: a checkpoint was the first to hold it; repeated: an earlier attempt had committed it already; lost: no checkpoint holds it.
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


def state(manifest: Manifest | None) -> str:
    """`new`, `finished`, `failed (memory) at epoch 3`, `resumable at epoch 3`, or `resumable (lost) at epoch 3`."""
    if manifest is None:
        return "new"
    if manifest.status == "finished":
        return "finished"
    return f"{_with_class('failed' if manifest.status == 'failed' else 'resumable', manifest)} at epoch {manifest.epochs}"


def as_json(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """The state of every trial for other programs; checkpoints and metrics of the last and the best epoch."""
    return [_as_json(plan, manifests.get(plan.trial_id)) for plan in plans]


def _reason(manifest: Manifest) -> str:
    return f"[{manifest.failure}] {manifest.reason}" if manifest.failure else str(manifest.reason)


def _with_class(word: str, manifest: Manifest) -> str:
    return f"{word} ({manifest.failure})" if manifest.failure else word


def _effort_cells(attempts: Sequence[Attempt]) -> list[str]:
    outcomes = Counter(attempt.outcome or "open" for attempt in attempts)
    kinds = _effort_s(attempts)
    share = f"{kinds['useful'] / sum(kinds.values()):.1%}" if any(kinds.values()) else "-"
    said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "-"
    return [str(len(attempts)), said, *map(clock, (*kinds.values(), sum(kinds.values()))), share]


def _effort_s(attempts: Sequence[Attempt]) -> dict[str, float]:
    return {
        "useful": sum(attempt.useful_s for attempt in attempts),
        "repeated": sum(attempt.repeated_s for attempt in attempts),
        "lost": sum(attempt.lost_s for attempt in attempts),
    }


def _row(plan: TrialPlan, manifest: Manifest | None) -> list[str]:
    cells = [plan.trial_id, *(shown(plan.settings[name]) if name in plan.settings else "-" for name in plan.varied)]
    if manifest is None:
        return [*cells, "new", f"0/{plan.config.epochs}", *["-"] * 8]
    best = manifest.best
    status = _with_class("unfinished" if manifest.status == "running" else manifest.status, manifest)
    return [
        *cells,
        status,
        f"{manifest.epochs}/{plan.config.epochs}",
        *_mious(manifest.last),
        *_mious(best),
        str(best.epoch) if best else "-",
        duration(manifest.seconds),
    ]


def _mious(entry: EpochMetrics | None) -> list[str]:
    return [f"{100 * entry.metrics[f'val/miou_{head}']:.1f}" if entry else "-" for head in HEADS]


def _as_json(plan: TrialPlan, manifest: Manifest | None) -> dict[str, Any]:
    known: dict[str, Any] = {
        "trial_id": plan.trial_id,
        "label": plan.label,
        "settings": plan.settings,
        "state": state(manifest),
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
