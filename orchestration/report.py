"""Tables of a sweep, from the manifests alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from orchestration.manifest import Attempt, Entry, Manifest
from orchestration.plan import TrialPlan, label, shown, table
from orchestration.spec import Published, PublishedRow

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
            *_shares(attempts),
            "",
            table([["node", *head], *([node, *_effort_cells(there)] for node, there in by_node.items())]),
        ]
    )


@dataclass(frozen=True)
class Comparison:
    """A published number beside those of our finished trials that differ in nothing but the seed. All in percent."""

    name: str
    metric: str
    value: float | None
    last: tuple[float, ...] = ()
    """After the last epoch, one for each trial."""
    best: tuple[float, ...] = ()
    """At the epoch where this very metric is highest."""


def comparisons(numbers: Published, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[Comparison]:
    """Every published number with what we have for it; one `when` that fits several kinds of trials gives one comparison for each."""
    return [comparison for row in numbers.rows for comparison in _compared(row, plans, manifests)]


def published(numbers: Published, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> str:
    """Published numbers beside ours, in percent, with how ours were measured below."""
    head = ["row", "metric", "published", "ours: last", "diff", "best", "diff", "seeds"]
    rows = [_compared_row(comparison) for comparison in comparisons(numbers, plans, manifests)]
    notes = [
        f"published: {numbers.source}",
        "ours: in percent, mean +- sample standard deviation over the seeds of finished trials; last: after the last epoch;"
        " best: at the epoch where the row's own metric is highest, chosen on the very images that it is measured on",
        *(f"split: {split}" for split in dict.fromkeys(_split(plan) for plan in plans)),
    ]
    return "\n".join([table([head, *rows]), *notes])


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
    return [str(len(attempts)), said, *map(_clock, (*kinds.values(), sum(kinds.values()))), share]


def _shares(attempts: Sequence[Attempt]) -> list[str]:
    kinds = _effort_s(attempts)
    total = sum(kinds.values())
    return [", ".join(f"{kind} {seconds / total:.1%}" for kind, seconds in kinds.items()) + f" of {_clock(total)}"] if total else []


def _effort_s(attempts: Sequence[Attempt]) -> dict[str, float]:
    return {
        "useful": sum(attempt.useful_s for attempt in attempts),
        "repeated": sum(attempt.repeated_s for attempt in attempts),
        "lost": sum(attempt.lost_s for attempt in attempts),
    }


def _clock(seconds: float) -> str:
    """`0:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _compared(row: PublishedRow, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[Comparison]:
    kinds: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        if _fits(plan, row):
            kinds.setdefault(_kind(plan, row), []).append(plan)
    name = row.name or label(row.when)
    return [
        _comparison(row, f"{name} {kind}" if len(kinds) > 1 else name, [manifests[p.trial_id] for p in fitting if p.trial_id in manifests])
        for kind, fitting in (kinds or {"": []}).items()
    ]


def _fits(plan: TrialPlan, row: PublishedRow) -> bool:
    settings = plan.config.model_dump(mode="json", include=set(row.when))
    return all(settings[key] == value for key, value in row.when.items())


def _kind(plan: TrialPlan, row: PublishedRow) -> str:
    """What a fitting trial varies beyond the row and the seed."""
    return label({key: getattr(plan.config, key) for key in plan.varied if key not in {*row.when, "seed"}})


def _comparison(row: PublishedRow, name: str, manifests: Iterable[Manifest]) -> Comparison:
    histories = [[100 * entry.metrics[row.metric] for entry in m.history] for m in manifests if m.status == "finished"]
    return Comparison(name, row.metric, row.value, tuple(values[-1] for values in histories), tuple(map(max, histories)))


def _compared_row(comparison: Comparison) -> list[str]:
    value, last, best = comparison.value, comparison.last, comparison.best
    published = "-" if value is None else f"{value:.2f}"
    ours = [_spread(last), _difference(last, value), _spread(best), _difference(best, value)]
    return [comparison.name, comparison.metric.removeprefix("val/"), published, *ours, str(len(last) or "-")]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" +- {stdev(values):.2f}" if len(values) > 1 else "")


def _difference(values: Sequence[float], value: float | None) -> str:
    return f"{mean(values) - value:+.2f}" if values and value is not None else "-"


def _split(plan: TrialPlan) -> str:
    config, split = plan.config, plan.config.split
    images = f" of {split.val} images" if split else ""
    return f"measured on the validation list of {config.dataset}{images}, labelled images by partition_by: {config.partition_by}"


def _row(plan: TrialPlan, manifest: Manifest | None) -> list[str]:
    cells = [plan.trial_id, *(shown(getattr(plan.config, name)) for name in plan.varied)]
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


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
