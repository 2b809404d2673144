"""Optuna samplers behind `next` and `tell`: proposals are TrialPlans, and the study is rebuilt from the store's manifests."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestration.errors import SpecError
from orchestration.plan.spec import Dimension, Search, SweepSpec
from orchestration.plan.trial_plan import Resolve, TrialPlan, make_plan
from orchestration.record.manifest import SCORE, Manifest, StoredTrials, restored_plan
from rrn_core.methods import all_settings

log = logging.getLogger(__name__)

MAX_REPEATS = 50
"""Proposals in a row that may equal known trials before the space counts as exhausted."""


class AdaptiveSource:
    """Yields up to `search.trials` plans: those that the store knows as unfinished first, then new proposals.

    Proposal k is drawn by a sampler seeded with (search.seed, k) from what is finished by then. With one trial at a time
    a restart therefore proposes exactly what an undisturbed search would have. Unfinished trials in `skip` stay as they are.
    """

    def __init__(
        self,
        spec: SweepSpec,
        manifests: Mapping[str, Manifest],
        resolve: Resolve = lambda config: config,
        *,
        skip: Collection[str] = (),
    ) -> None:
        assert spec.search is not None
        self._resolve = resolve
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._spec, self._search = spec, spec.search
        self._distributions = {name: _distribution(spec, name, dimension) for name, dimension in spec.space.items()}
        self._study = optuna.create_study(direction="maximize")
        mine = StoredTrials(manifests.values()).of_search(spec, resolve)
        self._known = {m.trial_id for m in mine}
        self._numbers: dict[str, int] = {}
        self._resumable = [restored_plan(m) for m in mine if m.status != "finished" and m.trial_id not in skip]
        self._next_number = len(mine)
        for manifest in mine:
            self._add(manifest)

    @property
    def remaining(self) -> int:
        """Plans still to come, if no proposal repeats a known trial."""
        return len(self._resumable) + max(0, self._search.trials - self._next_number)

    def next(self) -> TrialPlan | None:
        """The next plan, or None where the budget is spent or the space exhausted."""
        if self._resumable:
            return self._resumable.pop(0)
        if self._next_number >= self._search.trials:
            return None
        for repeat in range(MAX_REPEATS):
            trial = self._ask(repeat)
            plan = self._plan(trial)
            if plan and plan.trial_id not in self._known:
                self._known.add(plan.trial_id)
                self._numbers[plan.trial_id] = trial.number
                self._next_number += 1
                return plan
            self._study.tell(trial, state=TrialState.FAIL)
        log.warning("search: %d proposals in a row are known or impossible; %d trials exhaust the space", MAX_REPEATS, self._next_number)
        self._next_number = self._search.trials
        return None

    def tell(self, manifest: Manifest) -> None:
        """Learn the result of a trial that this source yielded."""
        number = self._numbers.pop(manifest.trial_id, None)
        if number is None:
            return
        value = objective(manifest, self._search)
        self._study.tell(number, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)

    def _ask(self, repeat: int) -> optuna.Trial:
        seed = int(np.random.SeedSequence([self._search.seed, self._next_number, repeat]).generate_state(1)[0])
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self._study.sampler = samplers[self._search.sampler](seed=seed)
        return self._study.ask(self._distributions)

    def _plan(self, trial: optuna.Trial) -> TrialPlan | None:
        """None for values that are each in range but do not fit together."""
        try:
            return make_plan(self._spec, trial.params, varied=tuple(self._spec.space), proposal=self._next_number, resolve=self._resolve)
        except SpecError as error:
            log.info("search: skipped an impossible proposal: %s", error)
            return None

    def _add(self, manifest: Manifest) -> None:
        """Put a stored trial into the study: complete with its value, or running until it is told."""
        value = objective(manifest, self._search)
        trial = _frozen(manifest, value, self._distributions)
        self._study.add_trial(trial)
        if value is None:
            self._numbers[manifest.trial_id] = len(self._study.trials) - 1


def objective(manifest: Manifest, search: Search) -> float | None:
    """What the sampler is told of a finished trial: `val/miou` of the last or the best epoch."""
    entry = manifest.last if search.at == "last" else manifest.best
    return entry.metrics[SCORE] if entry and manifest.status == "finished" else None


def _distribution(spec: SweepSpec, name: str, dimension: Dimension) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    if isinstance(dimension.low, int) and isinstance(dimension.high, int) and all_settings()[name].annotation is not float:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)


def _frozen(manifest: Manifest, value: float | None, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    state = TrialState.RUNNING if value is None else TrialState.COMPLETE
    params = {name: manifest.config[name] for name in distributions}
    return create_trial(state=state, value=value, params=params, distributions=dict(distributions))
