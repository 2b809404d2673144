"""Choose the best stored checkpoint of a sweep, overall or per value of some settings, and state the rule."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any, Literal

from orchestration.errors import SweepError
from orchestration.formatting import label, shown, table
from orchestration.plan.trial_plan import TrialPlan
from orchestration.plan.validation_text import suggestion
from orchestration.record.manifest import MIOUS, SCORE, Checkpoint, EpochMetrics, Manifest
from orchestration.record.trial_state import TrialState
from rrn_core.methods import all_settings

At = Literal["last", "best"]
"""
last  the checkpoint after the last epoch of a finished trial
best  the checkpoint of the epoch of a finished trial where the metric is highest
"""
COMPARABLE = ("val/miou", "val/iou")
"""Prefixes of metrics for which higher is better."""
_BY_HEAD = {"b1": f"{SCORE}_branch1", "b2": f"{SCORE}_branch2", "ens": f"{SCORE}_ensemble"}

_Run = tuple[TrialPlan, Manifest]


@dataclass(frozen=True)
class Candidate:
    """A stored checkpoint of a finished trial, with the metrics of the epoch that it completes."""

    plan: TrialPlan
    manifest: Manifest
    checkpoint: Checkpoint
    entry: EpochMetrics
    by_seed: Mapping[int, float]
    """The metric under the same rule, by seed, of this trial and all finished trials that differ only in the seed."""

    @property
    def where(self) -> str:
        """`epoch 4 of 1/8 eps=0.6 seed 1`."""
        return f"epoch {self.entry.epoch} of {self.plan.label}"


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoints of a group of trials, best first; the next one is used if the best one is damaged."""

    group: Mapping[str, Any]
    """The settings that define the group; empty if all trials are compared."""
    metric: str
    at: At
    trials: int
    """Finished trials that were compared."""
    ranking: tuple[Candidate, ...]
    """The best first; never empty."""
    notes: tuple[str, ...] = field(default=())
    """Why a better checkpoint was not chosen."""

    @property
    def best(self) -> Candidate:
        return self.ranking[0]

    @property
    def label(self) -> str:
        return self.best.plan.label

    @property
    def value(self) -> float:
        return self.best.entry.metrics[self.metric]

    @property
    def selected(self) -> bool:
        """Whether the validation images were used to choose the checkpoint."""
        return self.at == "best" or self.trials > 1

    def next(self, reason: str) -> BestCheckpoint | None:
        """The choice without its best checkpoint, which is unusable for `reason`; None if no other is left."""
        note = f"{self.best.where} is unusable ({reason})"
        return replace(self, ranking=self.ranking[1:], notes=(*self.notes, note)) if len(self.ranking) > 1 else None


def best(
    plans: Sequence[TrialPlan],
    manifests: Mapping[str, Manifest],
    *,
    per: Sequence[str] = (),
    metric: str = SCORE,
    at: At = "best",
) -> list[BestCheckpoint]:
    """The stored checkpoint of a finished trial with the highest `metric`, for every combination of the settings in `per`.

    Ties: the earliest epoch, then the order of `plans`. Groups without a checkpoint are left out; `missing` returns them.

    Raises:
        SweepError: an unknown setting or metric, or no checkpoint to choose from.
    """
    _check_names(per)
    runs = [(plan, manifests[plan.trial_id]) for plan in plans if plan.trial_id in manifests]
    finished = [(plan, manifest) for plan, manifest in runs if manifest.status is TrialState.FINISHED and manifest.history]
    if not finished:
        raise SweepError("no trial of this sweep is finished yet; run the sweep first")
    _check_metric(metric, finished)
    choices = [_choice(group, of_group, metric, at) for group, of_group in _groups(finished, per)]
    if not any(choices):
        remedy = "use --at best" if at == "last" else "train again with another `retention`"
        raise SweepError(f"the store has no checkpoint of a finished trial with {metric} at its {at} epoch; {remedy}")
    return [choice for choice in choices if choice]


def missing(plans: Sequence[TrialPlan], choices: Iterable[BestCheckpoint], *, per: Sequence[str]) -> list[str]:
    """Labels of the groups of `plans` without a choice, in the order of the sweep file."""
    chosen = [choice.group for choice in choices]
    return [label(group) for group in (_group(plan, per) for plan in _firsts(plans, per)) if group not in chosen]


def render(choices: Sequence[BestCheckpoint], missing: Sequence[str] = ()) -> str:
    """A table with one row per choice, in percent (`of`: finished trials compared), then the rules and notes."""
    names = list(choices[0].group)
    head = [*names, "trial", "label", "of", "epoch", "step", f"{choices[0].metric} %", *_BY_HEAD, "seeds", "mean over seeds"]
    lines = [table([head, *map(_row, choices)]), ""]
    lines += dict.fromkeys(line for choice in choices for line in rules(choice))
    lines += [f"{_prefix(choice)}{note}" for choice in choices for note in choice.notes]
    lines += [f"{name}: no finished trial with a stored checkpoint" for name in missing]
    return "\n".join(lines)


def rules(choice: BestCheckpoint) -> list[str]:
    """How the checkpoint was chosen, on which images it is measured, and the resulting bias."""
    config, metric = choice.best.plan.config, choice.metric
    images = config.split.val if config.split else config.val_images if config.dataset == "digits" else None
    measured = f"the validation list of {config.dataset}{f' ({images} images)' if images else ''}"
    rule = {
        "best": f"of all stored checkpoints of finished trials at the end of an epoch, the one with the highest {metric}",
        "last": f"of the checkpoints after the last epoch of every finished trial, the one with the highest {metric}",
    }[choice.at]
    lines = [f"checkpoint: {rule}; chosen and measured on the same images, {measured}, so its number is optimistic"]
    if not choice.selected:
        lines = [f"checkpoint: after the last epoch of the only finished trial; measured on {measured}, which was not used to choose it"]
    if any(len(candidate.by_seed) > 1 for candidate in choice.ranking):
        each = "at its own best epoch" if choice.at == "best" else "after its last epoch"
        lines.append(f"seeds: the best of several, which is optimistic too; mean over seeds: over all finished trials, {each}")
    return lines


def spread(values: Iterable[float]) -> str:
    """Mean and sample standard deviation of shares, in percent: `31.20 +- 0.84`."""
    shares = [100 * value for value in values]
    return f"{mean(shares):.2f}" + (f" +- {stdev(shares):.2f}" if len(shares) > 1 else "")


def _check_names(per: Sequence[str]) -> None:
    for name in per:
        if name not in all_settings():
            raise SweepError(f"--per {name}: unknown setting{suggestion(name, all_settings())}")


def _check_metric(metric: str, finished: Sequence[_Run]) -> None:
    known = dict.fromkeys(name for _, manifest in finished for entry in manifest.history for name in entry.metrics)
    names = [name for name in known if name.startswith(COMPARABLE)]
    if metric in MIOUS and metric not in names:
        raise SweepError(f"no finished trial has {metric}: no validation pixel has a label; correct the labels and train again")
    if metric not in names:
        raise SweepError(f"--metric {metric}: expected a metric that starts with {' or '.join(COMPARABLE)}{suggestion(metric, names)}")


def _groups(runs: Sequence[_Run], per: Sequence[str]) -> list[tuple[dict[str, Any], list[_Run]]]:
    groups = [_group(plan, per) for plan in _firsts([plan for plan, _ in runs], per)]
    return [(group, [run for run in runs if _group(run[0], per) == group]) for group in groups]


def _firsts(plans: Iterable[TrialPlan], per: Sequence[str]) -> list[TrialPlan]:
    """The first plan of every group."""
    firsts: dict[str, TrialPlan] = {}
    for plan in plans:
        firsts.setdefault(json.dumps(_group(plan, per)), plan)
    return list(firsts.values())


def _group(plan: TrialPlan, per: Sequence[str]) -> dict[str, Any]:
    settings = plan.config.model_dump(mode="json")
    return {name: settings.get(name) for name in per}


def _choice(group: Mapping[str, Any], runs: Sequence[_Run], metric: str, at: At) -> BestCheckpoint | None:
    ranking = sorted(_candidates(runs, metric, at), key=lambda c: (-c.entry.metrics[metric], c.entry.epoch))
    if not ranking:
        return None
    return BestCheckpoint(group, metric, at, len(runs), tuple(ranking), tuple(_dropped(runs, ranking[0], metric, at)))


def _candidates(runs: Sequence[_Run], metric: str, at: At) -> Iterable[Candidate]:
    by_seed: dict[str, dict[int, float]] = {}
    for plan, manifest in runs:
        if eligible := _eligible(manifest, metric, at):
            by_seed.setdefault(_without_seed(plan), {})[plan.config.seed] = max(entry.metrics[metric] for entry in eligible)
    for plan, manifest in runs:
        kept = {checkpoint.step: checkpoint for checkpoint in manifest.checkpoints}
        for entry in _eligible(manifest, metric, at):
            if entry.step in kept:
                yield Candidate(plan, manifest, kept[entry.step], entry, by_seed[_without_seed(plan)])


def _eligible(manifest: Manifest, metric: str, at: At) -> list[EpochMetrics]:
    """The epochs that the rule considers."""
    epochs = manifest.history[-1:] if at == "last" else manifest.history
    return [entry for entry in epochs if metric in entry.metrics]


def _without_seed(plan: TrialPlan) -> str:
    return json.dumps(plan.config.identity() | {"seed": None}, sort_keys=True)


def _dropped(runs: Sequence[_Run], chosen: Candidate, metric: str, at: At) -> Iterable[str]:
    """A note if a better epoch exists whose checkpoint is no longer stored."""
    epochs = [(plan, entry) for plan, manifest in runs for entry in _eligible(manifest, metric, at)]
    plan, entry = max(epochs, key=lambda epoch: epoch[1].metrics[metric])
    if entry.metrics[metric] > chosen.entry.metrics[metric]:
        better = f"epoch {entry.epoch} of {plan.label} was better ({100 * entry.metrics[metric]:.2f} %)"
        yield f"{better}, but its checkpoint is no longer stored; the best stored one is used"


def _row(choice: BestCheckpoint) -> list[str]:
    chosen = choice.best
    settings = [shown(value) for value in choice.group.values()]
    epoch = f"{chosen.entry.epoch}/{chosen.plan.config.epochs}"
    place = [chosen.plan.trial_id, choice.label, str(choice.trials), epoch, str(chosen.checkpoint.step)]
    values = [chosen.entry.metrics.get(name) for name in (choice.metric, *_BY_HEAD.values())]
    numbers = ["-" if value is None else f"{100 * value:.2f}" for value in values]
    return [*settings, *place, *numbers, str(len(chosen.by_seed)), spread(chosen.by_seed.values())]


def _prefix(choice: BestCheckpoint) -> str:
    return f"{label(choice.group)}: " if choice.group else ""
