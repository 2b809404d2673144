"""Propose trials with an Optuna sampler; the Optuna study is rebuilt from the manifests in the store."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial

from orchestration.errors import SpecError
from orchestration.plan.spec import Dimension, Search, SweepSpec
from orchestration.plan.trial_plan import Resolve, TrialPlan, make_plan
from orchestration.record.manifest import Manifest
from orchestration.record.stored_trials import StoredTrials, restored_plan
from orchestration.record.trial_state import TrialState
from rrn_core.methods import all_settings

log = logging.getLogger(__name__)

MAX_REPEATS = 50
"""Consecutive proposals that equal known trials; after this many the search space counts as exhausted."""


class AdaptiveSource:
    """Yields up to `search.trials` plans: first the unfinished trials of the store, then new proposals.

    The sampler for proposal k is seeded with (search.seed, k) and sees the trials that are finished by then. With one trial at a
    time, a restarted search therefore proposes the same trials as an uninterrupted one. Unfinished trials in `skip` are left out.
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
        stored = StoredTrials(manifests.values()).of_search(spec, resolve)
        self._known = {m.trial_id for m in stored}
        self._numbers: dict[str, int] = {}
        self._resumable = [restored_plan(m) for m in stored if m.status is not TrialState.FINISHED and m.trial_id not in skip]
        self._next_number = len(stored)
        for manifest in stored:
            self._add(manifest.trial_id, manifest.config, objective(manifest, self._search))

    @property
    def remaining(self) -> int:
        """Plans still to come, if no proposal repeats a known trial."""
        return len(self._resumable) + max(0, self._search.trials - self._next_number)

    def next(self) -> TrialPlan | None:
        """The next plan; None if the budget is spent or the space is exhausted."""
        if self._resumable:
            return self._resumable.pop(0)
        if self._next_number >= self._search.trials:
            return None
        for repeat in range(MAX_REPEATS):
            plan = self._plan(self._ask(repeat))
            if plan and plan.trial_id not in self._known:
                self._known.add(plan.trial_id)
                self._add(plan.trial_id, plan.config.model_dump(mode="json"), None)
                self._next_number += 1
                return plan
        log.warning(
            "search: %d consecutive proposals are known or invalid; the search space is exhausted after %d trials",
            MAX_REPEATS,
            self._next_number,
        )
        self._next_number = self._search.trials
        return None

    def tell(self, manifest: Manifest) -> None:
        """Pass the result of a trial that this source yielded to the sampler."""
        number = self._numbers.pop(manifest.trial_id, None)
        if number is None:
            return
        value = objective(manifest, self._search)
        self._study.tell(number, value, state=optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE)

    def _ask(self, repeat: int) -> dict[str, Any]:
        """Values that the sampler proposes. The study keeps only what `_add` adds, so that it is the same after a restart."""
        seed = int(np.random.SeedSequence([self._search.seed, self._next_number, repeat]).generate_state(1)[0])
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self._study.sampler = samplers[self._search.sampler](seed=seed)
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return trial.params

    def _plan(self, values: dict[str, Any]) -> TrialPlan | None:
        """The plan of a proposal; None if its values are in range but invalid in combination."""
        try:
            return make_plan(self._spec, values, varied=tuple(self._spec.space), proposal=self._next_number, resolve=self._resolve)
        except SpecError as error:
            log.info("search: skipped an invalid proposal: %s", error)
            return None

    def _add(self, trial_id: str, config: Mapping[str, Any], value: float | None) -> None:
        """Add a trial to the study: complete with its value, or running until `tell`. It has the searched settings of its method."""
        searched = {name: distribution for name, distribution in self._distributions.items() if name in config}
        state = optuna.trial.TrialState.RUNNING if value is None else optuna.trial.TrialState.COMPLETE
        params = {name: config[name] for name in searched}
        self._study.add_trial(create_trial(state=state, value=value, params=params, distributions=searched))
        if value is None:
            self._numbers[trial_id] = len(self._study.trials) - 1


def objective(manifest: Manifest, search: Search) -> float | None:
    """The value that the sampler maximises: `val/miou` of the last or the best epoch; None if the trial is not finished, or has none."""
    entry = manifest.last if search.at == "last" else manifest.best
    return entry.score if entry and manifest.status is TrialState.FINISHED else None


def _distribution(spec: SweepSpec, name: str, dimension: Dimension) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    if isinstance(dimension.low, int) and isinstance(dimension.high, int) and all_settings()[name].annotation is not float:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)
