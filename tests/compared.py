"""Trials with invented but plausible histories, as the store would hold them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finished import manifest_of

from orchestration.compare.results import TrialResult, results
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import TrialPlan, expand
from orchestration.record.manifest import EpochMetrics, Manifest

CLASSES = ("background", *(f"digit_{n}" for n in range(10)))
TERMS = ("loss", "loss_sup", "loss_cps", "loss_dr", "loss_f", "loss_d1", "loss_d2")
GRID = {"grid": {"partition": ["1/16", "1/4"], "eps": [0.2, 0.4, 0.6]}, "seeds": [0, 1, 2], "base": {"epochs": 8}}
MIXED = {"grid": {"method": ["supervised", "cps", "rrn"], "partition": ["1/8", "1/4"], "eps": [0.2, 0.4, 0.6]}, "seeds": [0, 1]}
"""A grid in which only the trials of rrn have the setting eps."""
_CEILING = {"1/16": 0.3, "1/8": 0.36, "1/4": 0.42, "1/2": 0.46, "full": 0.49}

Score = Callable[[TrialPlan, int], float]
"""val/miou in 0..1 of a trial after an epoch."""


def plausible(plan: TrialPlan, epoch: int) -> float:
    """Rises and levels off; more labels help, eps = 0.45 a little, the seed by chance; without the setting eps it is lower."""
    chance = random.Random(f"{plan.trial_id} {epoch}").gauss(0, 0.006) + random.Random(plan.config.seed).gauss(0, 0.008)
    ceiling = _CEILING.get(plan.config.partition, 0.4) - 0.15 * (getattr(plan.config, "eps", 1) - 0.45) ** 2
    ceiling -= 0.01 * abs(math.log10(getattr(plan.config, "lambda1", 1) or 1))
    return round(max(0.02, ceiling * (1 - math.exp(-epoch / 2.5)) + chance), 4)


def entry(plan: TrialPlan, epoch: int, score: Score = plausible, classes: Sequence[str] = CLASSES) -> EpochMetrics:
    """Every metric that a training reports; of the last class, which never occurs, there is none."""
    miou = score(plan, epoch)
    chance = random.Random(f"{plan.trial_id} {epoch} rest")
    metrics = {"val/miou": miou, "val/miou_ensemble": miou, "val/miou_branch1": miou - 0.01, "val/miou_branch2": miou - 0.012}
    for n, name in enumerate(classes[:-1]):
        iou = min(1.0, max(0.0, miou + 0.4 * (n == 0) + 0.015 * ((7 * n) % 10 - 5)))
        metrics |= {f"val/iou_{head}/{name}": iou for head in ("branch1", "branch2", "ensemble")}
    for n, term in enumerate(TERMS):
        metrics[f"train/{term}"] = (1 + n) * 0.3 * math.exp(-epoch / (3 + n)) + 0.02 * chance.random()
    return EpochMetrics(epoch=epoch, step=32 * epoch, time_ms=1000 * epoch, metrics=metrics)


def swept(
    document: Mapping[str, Any] | None = None,
    *,
    score: Score = plausible,
    epochs: Callable[[TrialPlan], int] = lambda plan: plan.config.epochs,
    classes: Sequence[str] = CLASSES,
    name: str = "demo",
) -> tuple[list[TrialPlan], dict[str, Manifest]]:
    """The trials of a sweep file and their manifests, after the given number of epochs: finished, failed before the end, or (0) new."""
    plans = expand(check({"name": name, "preset": "digits", **(GRID if document is None else document)}))
    begun = [(plan, epochs(plan)) for plan in plans if epochs(plan)]
    return plans, {plan.trial_id: _manifest(plan, reached, score, classes) for plan, reached in begun}


def trials(document: Mapping[str, Any] | None = None, **how: Any) -> list[TrialResult]:
    """The results of the trials of `swept`."""
    return results([swept(document, **how)])


def _manifest(plan: TrialPlan, reached: int, score: Score, classes: Sequence[str]) -> Manifest:
    done = reached == plan.config.epochs
    return manifest_of(
        plan,
        status="finished" if done else "failed",
        failure=None if done else "memory",
        history=tuple(entry(plan, epoch, score, classes) for epoch in range(1, reached + 1)),
    )
