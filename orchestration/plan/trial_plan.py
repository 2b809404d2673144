"""SweepSpec -> TrialPlans: every trial with its identity, with no clock, network, torch or Ray."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from orchestration.errors import SpecError
from orchestration.formatting import label
from orchestration.plan.spec import Settings, SweepSpec
from orchestration.plan.sweep_file import build_config
from rrn_core.config import TrainConfig, iterations_per_epoch, labeled_count, listed_train_images
from rrn_core.errors import ConfigError

Resolve = Callable[[TrainConfig], TrainConfig]
"""Fills in what the files that a configuration names contain (record/inputs.py)."""

ID_LENGTH = 12
"""Hex digits of a trial's identity that are shown and used as its key; 48 bits."""


@dataclass(frozen=True)
class TrialPlan:
    """One trial as a value: what `plan` prints is what the cluster receives."""

    sweep: str
    config: TrainConfig
    varied: tuple[str, ...]
    """Names of the settings that differ within the sweep, in the order of the file."""
    proposal: int | None = None
    """Number of the proposal that an adaptive search made, from 0."""
    stored_as: str | None = None
    """The identity under which an earlier release stored this very trial."""
    same_as: tuple[str, ...] = ()
    """Other combinations of the file that are this trial, since they differ only in settings that its method does not have."""

    @cached_property
    def trial_id(self) -> str:
        return self.stored_as or self.config.digest[:ID_LENGTH]

    @property
    def settings(self) -> Settings:
        """The varied settings that the trial's method has."""
        return {name: getattr(self.config, name) for name in self.varied if name in type(self.config).model_fields}

    @property
    def label(self) -> str:
        """What a person calls the trial: `1/8 eps=0.6`."""
        return label(self.settings)

    @property
    def iterations(self) -> int:
        """Iterations of the whole run; 0 if they depend on data that are absent."""
        try:
            return self.config.epochs * iterations_per_epoch(self.config)
        except ConfigError:
            return 0


def expand(spec: SweepSpec, resolve: Resolve = lambda config: config) -> list[TrialPlan]:
    """All trials of `grid` (product) and `points`, each with every seed; none for an adaptive search.

    Combinations that differ only in settings that their method does not have are one trial.

    Raises:
        SpecError: a combination that cannot be built, or the same combination twice.
    """
    if spec.search:
        return []
    varied = _varied(spec)
    faults: dict[str, list[str]] = {}
    plans: dict[str, TrialPlan] = {}
    same_as: dict[str, list[str]] = {}
    places: dict[tuple[str, str], str] = {}
    for where, settings in _combinations(spec):
        place = f"{where} ({label(settings)})"
        try:
            plan = make_plan(spec, settings, varied=varied, resolve=resolve)
        except SpecError as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(place)
            continue
        first = places.setdefault((plan.trial_id, _unread(settings, plan.config)), place)
        known = plans.setdefault(plan.trial_id, plan)
        if first is not place:
            faults.setdefault(f"is the same trial as {first}; remove one", []).append(place)
        elif known is not plan:
            same_as.setdefault(plan.trial_id, []).append(label(settings))
    if faults:
        raise SpecError([f"{found[0]}{_more(len(found) - 1)}: {fault}" for fault, found in faults.items()])
    return [replace(plan, same_as=tuple(same_as[trial_id])) if trial_id in same_as else plan for trial_id, plan in plans.items()]


def _combinations(spec: SweepSpec) -> Iterable[tuple[str, Settings]]:
    """The values that vary, for each trial of the file, and where they stand in it."""
    seeds = [{"seed": seed} for seed in spec.seeds or []] or [{}]
    named = [(f"points[{i}]", point) for i, point in enumerate(spec.points)]
    if spec.grid or not spec.points:
        named = [("grid", dict(zip(spec.grid, values, strict=True))) for values in itertools.product(*spec.grid.values())] + named
    return ((where, {**values, **seed}) for (where, values), seed in itertools.product(named, seeds))


def _unread(settings: Settings, config: TrainConfig) -> str:
    """The values that the trial's method does not have, as text: combinations that make one trial may differ in them."""
    unread = {
        name: float(value) if type(value) is int else value for name, value in settings.items() if name not in type(config).model_fields
    }
    return json.dumps(unread, sort_keys=True, default=str)


def representatives(spec: SweepSpec, resolve: Resolve = lambda config: config) -> list[TrialPlan]:
    """Of an adaptive search, the trials with each choice and the first value of every range: they resemble what it will propose.

    Raises:
        SpecError: not one of them fits together.
        SweepError: as `make_plan`.
    """
    first = {name: dimension.first for name, dimension in spec.space.items()}
    choices = [{**first, name: choice} for name, dimension in spec.space.items() for choice in dimension.choices or ()]
    plans: dict[str, TrialPlan] = {}
    faults: list[str] = []
    for settings in (first, *choices):
        try:
            plan = make_plan(spec, settings, varied=tuple(spec.space), resolve=resolve)
            plans.setdefault(plan.trial_id, plan)
        except SpecError as error:  # the search skips such values too
            faults += error.faults
    if not plans:
        raise SpecError(list(dict.fromkeys(faults)))
    return list(plans.values())


def make_plan(
    spec: SweepSpec, settings: Settings, *, varied: tuple[str, ...], proposal: int | None = None, resolve: Resolve = lambda config: config
) -> TrialPlan:
    """One trial from the values that vary; raises SpecError where they do not fit together, SweepError where `resolve` does."""
    config = build_config({**spec.settings, **settings})
    images = listed_train_images(config)
    if images is not None:
        try:
            labeled_count(config.partition, images)
        except ConfigError as error:
            raise SpecError([str(error)]) from None
    return TrialPlan(spec.name, resolve(config), varied, proposal)


def _more(others: int) -> str:
    return f" and {others} more" if others else ""


def _varied(spec: SweepSpec) -> tuple[str, ...]:
    names = [*spec.grid, *(name for point in spec.points for name in point), *(["seed"] if len(spec.seeds or []) > 1 else [])]
    return tuple(dict.fromkeys(names))
