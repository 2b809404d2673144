"""Trials as a comparison sees them, from plans and manifests alone, and the checkpoint rules by which their metrics are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestration.formatting import label
from orchestration.observe.status import state
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import CONTENTS, SCORE, EpochMetrics, Manifest
from rrn_core.methods import all_settings

At = Literal["last", "best", "common"]
"""
last    after the last epoch of finished trials
best    at the epoch with the best val/miou of each finished trial
common  at the last epoch that every trial has completed, finished or not, but for those that have completed none
"""
SEED = "seed"


@dataclass(frozen=True)
class TrialResult:
    """One trial as a comparison sees it."""

    sweep: str
    trial_id: str
    state: str
    """As `report.state` says it."""
    seed: int
    settings: Mapping[str, Any]
    """What the sweep varies except the seed, in the order of the file; with several sweeps, what any of them varies or they differ in."""
    config: Mapping[str, Any]
    """All settings."""
    classes: tuple[str, ...]
    history: tuple[EpochMetrics, ...]

    @property
    def label(self) -> str:
        """`1/8 eps=0.6 seed 1`."""
        return label({**self.settings, SEED: self.seed})

    @property
    def epochs(self) -> int:
        """Epochs completed."""
        return self.history[-1].epoch if self.history else 0

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    def entry(self, at: At, *, common: int) -> EpochMetrics | None:
        """The epoch that the rule reads, `common` being the common one; None where there is none."""
        if at == "common":
            return next((entry for entry in self.history if entry.epoch == common), None)
        if not self.finished or not self.history:
            return None
        return self.history[-1] if at == "last" else max(self.history, key=lambda entry: entry.metrics[SCORE])


def results(sweeps: Iterable[tuple[Sequence[TrialPlan], Mapping[str, Manifest]]]) -> list[TrialResult]:
    """The trials of one or more sweeps, from their plans and manifests, in the order of the files.

    A trial that several sweeps hold stands for each; `compare` counts it once.
    """
    runs = [(plan, manifests.get(plan.trial_id)) for plans, manifests in sweeps for plan in plans]
    identities = [plan.config.identity() for plan, _ in runs]
    names = _distinguishing([plan for plan, _ in runs], identities)
    return [_result(plan, manifest, names) for plan, manifest in runs]


def common_epoch(results: Iterable[TrialResult]) -> int:
    """The last epoch that every trial has completed, of those that have completed any; 0 where none has."""
    return min((result.epochs for result in results if result.epochs), default=0)


def once(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Every trial once: of equal ones that several sweeps have trained, a finished one, else the most advanced, else the first."""
    chosen: dict[str, TrialResult] = {}
    for result in results:
        known = chosen.setdefault(result.trial_id, result)
        if (result.finished, result.epochs) > (known.finished, known.epochs):
            chosen[result.trial_id] = result
    return list(chosen.values())


def _result(plan: TrialPlan, manifest: Manifest | None, names: Sequence[str]) -> TrialResult:
    config = plan.config.model_dump(mode="json")
    history = manifest.history if manifest else ()
    settings = {name: config[name] for name in names if name in config}
    return TrialResult(plan.sweep, plan.trial_id, state(manifest), plan.config.seed, settings, config, _classes(history), history)


def _classes(history: Iterable[EpochMetrics]) -> tuple[str, ...]:
    """Names of the classes that occur in the validation list, in their order."""
    names = (name.partition("/")[2] for entry in history for name in entry.metrics if name.startswith("val/iou_"))
    return tuple(dict.fromkeys(name.partition("/")[2] for name in names))


def _distinguishing(plans: Sequence[TrialPlan], identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that tell the trials apart, but for the seed."""
    varied = dict.fromkeys(name for plan in plans for name in plan.varied if name != SEED)
    differing = [name for name in all_settings() if len({_key(identity[name]) for identity in identities if name in identity}) > 1]
    names = list(varied) + [name for name in differing if name not in {*varied, SEED, *CONTENTS}]
    for name in differing:
        told_apart = {_key([identity.get(n) for n in names]) for identity in identities}
        if name in CONTENTS and len({_key([identity.get(n) for n in (*names, name)]) for identity in identities}) > len(told_apart):
            names.append(name)
    return names


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)
