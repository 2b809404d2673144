"""The results of trials, from plans and manifests alone, and the checkpoint rules by which their metrics are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestration.formatting import label
from orchestration.observe.status import state_text
from orchestration.plan.spec import Retries
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import CONTENTS, EpochMetrics, Manifest, best_epoch
from orchestration.record.trial_state import TrialState, state_of
from rrn_core.methods import all_settings

At = Literal["last", "best", "common"]
"""
last    after the last epoch of finished trials
best    at the epoch with the best val/miou of each finished trial
common  at the last epoch that every trial has completed, finished or not; trials without a completed epoch do not count
"""
SEED = "seed"


@dataclass(frozen=True)
class TrialResult:
    """What a comparison needs of one trial."""

    sweep: str
    trial_id: str
    state: TrialState
    state_text: str
    """With the class of the failure and the epoch: `failed (memory) at epoch 3`."""
    seed: int
    settings: Mapping[str, Any]
    """What the sweep varies except the seed, in the order of the file; with several sweeps, what any of them varies or they differ in.
    A setting that the trial's method does not have is absent."""
    config: Mapping[str, Any]
    """All settings of the trial's method."""
    classes: tuple[str, ...]
    history: tuple[EpochMetrics, ...]

    @property
    def label(self) -> str:
        """`1/8 eps=0.6 seed 1`."""
        return label({**self.settings, SEED: self.seed})

    @property
    def epochs(self) -> int:
        """Epochs completed."""
        return self.last.epoch if self.last else 0

    @property
    def finished(self) -> bool:
        return self.state is TrialState.FINISHED

    @property
    def last(self) -> EpochMetrics | None:
        return self.history[-1] if self.history else None

    @property
    def best(self) -> EpochMetrics | None:
        """The first epoch with the best val/miou; None where no epoch has one."""
        return best_epoch(self.history)

    def entry(self, at: At, *, common: int) -> EpochMetrics | None:
        """The epoch that the rule reads, `common` being the common one; None where there is none."""
        if at == "common":
            return next((entry for entry in self.history if entry.epoch == common), None)
        if not self.finished:
            return None
        return self.last if at == "last" else self.best


def results(
    sweeps: Iterable[tuple[Sequence[TrialPlan], Mapping[str, Manifest]]], states: Sequence[Mapping[str, TrialState]] = ()
) -> list[TrialResult]:
    """The trials of one or more sweeps, from their plans and manifests, in the order of the files.

    A trial that several sweeps hold stands for each; `compare` counts it once.

    Args:
        states: by trial_id, for each sweep; unset, as if no driver worked on them.
    """
    sweeps = list(sweeps)
    known = states or [dict[str, TrialState]() for _ in sweeps]
    runs = [
        (plan, manifests.get(plan.trial_id), of_sweep.get(plan.trial_id))
        for (plans, manifests), of_sweep in zip(sweeps, known, strict=True)
        for plan in plans
    ]
    names = _distinguishing([plan for plan, *_ in runs], [plan.config.identity() for plan, *_ in runs])
    return [_result(plan, manifest, names, state) for plan, manifest, state in runs]


def setting_keys(settings: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Equal for settings that agree in these names."""
    return tuple(value_key(settings[name]) if name in settings else "" for name in names)


def value_key(value: object) -> str:
    """Equal for equal values, lists and mappings too."""
    return json.dumps(value, sort_keys=True, default=str)


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


def _result(plan: TrialPlan, manifest: Manifest | None, names: Sequence[str], state: TrialState | None) -> TrialResult:
    config = plan.config.model_dump(mode="json")
    history = manifest.history if manifest else ()
    settings = {name: config[name] for name in names if name in config}
    state = state or state_of(manifest, driver=None, retries=Retries())
    text, seed = state_text(state, manifest), plan.config.seed
    return TrialResult(plan.sweep, plan.trial_id, state, text, seed, settings, config, _classes(history), history)


def _classes(history: Iterable[EpochMetrics]) -> tuple[str, ...]:
    """Names of the classes that occur in the validation list, in their order."""
    names = (name.partition("/")[2] for entry in history for name in entry.metrics if name.startswith("val/iou_"))
    return tuple(dict.fromkeys(name.partition("/")[2] for name in names))


def _distinguishing(plans: Sequence[TrialPlan], identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that distinguish the trials, except the seed."""
    names = list(dict.fromkeys(name for plan in plans for name in plan.varied if name != SEED))
    differing = [name for name in all_settings() if name not in {*names, SEED} and _differs(name, plans, identities)]
    names += [name for name in differing if name not in CONTENTS]
    for name in differing:
        with_name, without = ({setting_keys(identity, chosen) for identity in identities} for chosen in ([*names, name], names))
        if name in CONTENTS and len(with_name) > len(without):
            names.append(name)
    return names


def _differs(name: str, plans: Sequence[TrialPlan], identities: Sequence[Mapping[str, Any]]) -> bool:
    """Whether trials whose method has the setting differ in it; an identity lacks a setting at its neutral value."""
    having = (identity for plan, identity in zip(plans, identities, strict=True) if name in type(plan.config).model_fields)
    return len({setting_keys(identity, [name]) for identity in having}) > 1
