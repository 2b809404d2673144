"""Tables of a sweep, from the manifests alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.manifest import Entry, Manifest
from orchestration.plan import TrialPlan, shown, table

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
    return [f"FAILED {plan.trial_id} {plan.label}: {manifest.reason}" for plan, manifest in found if manifest.status == "failed"]


def state(manifest: Manifest | None) -> str:
    """`new`, `finished`, `failed at epoch 3`, or `resumable at epoch 3`."""
    if manifest is None:
        return "new"
    if manifest.status == "finished":
        return "finished"
    return f"{'failed' if manifest.status == 'failed' else 'resumable'} at epoch {manifest.epochs}"


def as_json(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """The state of every trial for other programs; checkpoints and metrics of the last and the best epoch."""
    return [_as_json(plan, manifests.get(plan.trial_id)) for plan in plans]


def _row(plan: TrialPlan, manifest: Manifest | None) -> list[str]:
    cells = [plan.trial_id, *(shown(getattr(plan.config, name)) for name in plan.varied)]
    if manifest is None:
        return [*cells, "new", f"0/{plan.config.epochs}", *["-"] * 8]
    best = manifest.best
    status = "unfinished" if manifest.status == "running" else manifest.status
    return [
        *cells,
        status,
        f"{manifest.epochs}/{plan.config.epochs}",
        *_mious(manifest.last),
        *_mious(best),
        str(best.epoch) if best else "-",
        duration(manifest.seconds),
    ]


def _mious(entry: Entry | None) -> list[str]:
    return [f"{100 * entry.metrics[f'val/miou_{head}']:.1f}" if entry else "-" for head in HEADS]


def _as_json(plan: TrialPlan, manifest: Manifest | None) -> dict[str, Any]:
    known: dict[str, Any] = {
        "trial_id": plan.trial_id,
        "label": plan.label,
        "settings": {name: getattr(plan.config, name) for name in plan.varied},
        "state": state(manifest),
        "epochs": [0, plan.config.epochs],
    }
    if manifest:
        known |= {
            "epochs": [manifest.epochs, plan.config.epochs],
            "attempts": manifest.attempt,
            "reason": manifest.reason,
            "seconds": round(manifest.seconds, 3),
            "updated_ms": manifest.updated_ms,
            "last": manifest.last.model_dump() if manifest.last else None,
            "best": manifest.best.model_dump() if manifest.best else None,
            "checkpoints": [checkpoint.model_dump() for checkpoint in manifest.checkpoints],
        }
    return known


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
