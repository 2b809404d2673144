"""A sweep file, its trials, and what the store knows of them."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestration.errors import SweepError, without_password
from orchestration.failures import Failure
from orchestration.formatting import shown
from orchestration.plan.spec import SweepSpec
from orchestration.plan.sweep_file import load
from orchestration.plan.tracking_address import absolute, database_of
from orchestration.plan.trial_plan import TrialPlan, expand, representatives
from orchestration.record.inputs import InputContents
from orchestration.record.lease import driver_of
from orchestration.record.manifest import Manifest, read_all
from orchestration.record.stored_trials import StoredTrials, restored_plan
from orchestration.record.tracking_note import tracked, write_tracked
from orchestration.record.trial_state import TrialState, state_of
from orchestration.store.base import Store
from orchestration.store.open import open_store
from rrn_core.config import Runtime

log = logging.getLogger(__name__)

STORE_WAITS_S = 30.0
"""How long a command waits for a store that does not answer; trials wait longer."""

DIFFERENCES_NAMED = 3
"""Settings that the reason for a new trial names."""


@dataclass(frozen=True)
class Sweep:
    """What every command starts from."""

    file: Path
    spec: SweepSpec
    store: Store
    tracking: str
    inputs: InputContents
    plans: list[TrialPlan]
    manifests: dict[str, Manifest]
    samples: list[TrialPlan]
    """Of an adaptive search: trials like those that it will propose."""
    driver: int | None = None
    """Token of the driver that works on the sweep, as far as the last reading of the store can tell."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Why, for each trial of which the store has no usable record. Such a trial counts as failed."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def trial_ids(self) -> set[str]:
        return {plan.trial_id for plan in self.plans}

    @property
    def finished(self) -> list[TrialPlan]:
        return [plan for plan in self.plans if self._is_finished(plan)]

    @property
    def unfinished(self) -> list[TrialPlan]:
        return [plan for plan in self.plans if not self._is_finished(plan)]

    @property
    def to_run(self) -> list[TrialPlan]:
        """What is unfinished, and for every proposal still to come a trial like it."""
        return [*self.unfinished, *itertools.islice(itertools.cycle(self.samples), self.total - len(self.plans))]

    @property
    def total(self) -> int:
        return max(len(self.plans), self.spec.search.trials if self.spec.search else 0)

    @property
    def complete(self) -> bool:
        return not self.unfinished and len(self.plans) == self.total

    @property
    def count(self) -> str:
        """`3 of 8 finished`."""
        return f"{len(self.finished)} of {self.total} finished"

    def chosen(self, *, only: Sequence[str] = (), retry: Collection[str] = ()) -> list[TrialPlan]:
        """The unfinished trials to run.

        Args:
            only: starts of identities; none: all trials.
            retry: classes of failure; of the trials that have failed only these run again. None: all.

        Raises:
            SweepError: a start that fits no trial, or a choice that a search cannot take.
        """
        if only and self.spec.search:
            raise SweepError("--only: a search chooses its trials itself; leave it out")
        for word in only:
            if not word or not any(plan.trial_id.startswith(word) for plan in self.plans):
                raise SweepError(f"--only {word or repr(word)}: no trial ID of this sweep starts with it; rrn-sweep plan FILE lists them")
        named = [plan for plan in self.unfinished if not only or plan.trial_id.startswith(tuple(only))]
        return [plan for plan in named if not retry or self._failure(plan) in (None, *retry)]

    def _is_finished(self, plan: TrialPlan) -> bool:
        return plan.trial_id in self.manifests and self.manifests[plan.trial_id].status is TrialState.FINISHED

    def _failure(self, plan: TrialPlan) -> Failure | None:
        """Why the trial has failed, if it has."""
        if plan.trial_id in self.unreadable:
            return "unavailable"
        manifest = self.manifests.get(plan.trial_id)
        return (manifest.failure or "code") if manifest and manifest.status is TrialState.FAILED else None

    def state(self, plan: TrialPlan) -> TrialState:
        """The state of a trial, as of the last reading of the store."""
        if plan.trial_id in self.unreadable:
            return TrialState.FAILED
        return state_of(self.manifests.get(plan.trial_id), driver=self.driver, retries=self.spec.retries)

    @property
    def states(self) -> dict[str, TrialState]:
        """The state of every trial by its identity."""
        return {plan.trial_id: self.state(plan) for plan in self.plans}

    def why_new(self) -> dict[str, str]:
        """Of trials without a record: the finished trial that has the same values of all that varies, and what differs otherwise."""
        own, finished = self.trial_ids, dict[str, list[Manifest]]()
        for manifest in self.manifests.values():
            if manifest.status is TrialState.FINISHED and manifest.trial_id not in own:
                finished.setdefault(_varied_values(manifest.config, self.plans), []).append(manifest)
        new = [plan for plan in self.plans if plan.trial_id not in self.manifests]
        near = {plan.trial_id: _nearest(plan, finished.get(_varied_values(_settings(plan), self.plans), [])) for plan in new}
        return {trial_id: reason for trial_id, reason in near.items() if reason}

    def reread(self, *, known: Mapping[str, Manifest] | None = None) -> Sweep:
        """The sweep with what the store knows now; manifests that are `known` not to change are not read again. Raises StoreError.

        A trial of the file whose manifest cannot be read counts as failed. Any other such manifest is named in a warning, once.
        """
        spec = self.spec
        manifests, faults = read_all(self.store, spec.name, known=known)
        unreadable = {trial_id: str(fault) for trial_id, fault in faults.items()}
        own = self.trial_ids
        for trial_id, fault in unreadable.items():
            if trial_id not in own and self.unreadable.get(trial_id) != fault:
                log.warning("%s; it is left out", fault)
        stored = StoredTrials(manifests.values())
        if spec.search:
            found = stored.of_search(spec, self.inputs.resolve)
            plans = [replace(restored_plan(manifest), varied=tuple(spec.space)) for manifest in found]
        else:
            plans = [plan if plan.trial_id in manifests else _as_stored(plan, stored) for plan in self.plans]
        driver = driver_of(self.store, spec.name)
        token = driver.token if driver and driver.working else None
        return replace(self, plans=plans, manifests=manifests, driver=token, unreadable=unreadable)

    def tracked(self) -> set[str]:
        """Trials that MLflow shows completely; none where its database is gone."""
        database = database_of(self.tracking)
        if database and not database.exists():
            return set()
        return tracked(self.store, self.name, without_password(self.tracking))

    def write_tracked(self, trial_ids: set[str], *, driver: int) -> None:
        """Remember what `tracked` answers. `driver`: token of the lease. Raises Fenced if another driver has taken the sweep over."""
        write_tracked(self.store, self.name, without_password(self.tracking), trial_ids, driver=driver)


def store_uri(given: str | None, environment: Mapping[str, str]) -> str:
    """Where a sweep is stored: as its file says, else RRN_STORE, else a folder below the current one."""
    return given or environment.get("RRN_STORE") or "runs/store"


def open_sweep(file: Path, overrides: Sequence[str], *, data_root: Path | None, environment: Mapping[str, str], look: bool = True) -> Sweep:
    """Read a sweep file and what the store knows of it.

    Args:
        data_root: folder of the images that identities depend on; unset, identities cover settings alone.
        look: read the store; else the sweep is opened as if the store were empty.
        environment: RRN_STORE and MLFLOW_TRACKING_URI are used where the file does not set store or tracking.

    Raises:
        SweepError: a faulty file, unusable data, or an absent store.
    """
    spec = load(file, overrides=overrides)
    store = open_store(store_uri(spec.store, environment), deadline_s=STORE_WAITS_S)
    tracking = absolute(spec.tracking or environment.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db")
    inputs = InputContents(Runtime(data_root=data_root, lists_root=file.resolve().parent), store)
    with naming(file):
        plans = expand(spec, inputs.resolve)
        samples = representatives(spec, inputs.resolve) if spec.search else []
    sweep = Sweep(file, spec, store, tracking, inputs, plans, {}, samples)
    return sweep.reread() if look else sweep


def _as_stored(plan: TrialPlan, stored: StoredTrials) -> TrialPlan:
    """The plan by the name under which the store holds its trial: made where the data could be seen, or by an earlier release."""
    if (manifest := stored.find(plan.config)) is None:
        return plan
    return replace(restored_plan(manifest), varied=plan.varied, same_as=plan.same_as)


def _settings(plan: TrialPlan) -> dict[str, Any]:
    return plan.config.model_dump(mode="json")


def _varied_values(settings: Mapping[str, Any], plans: Sequence[TrialPlan]) -> str:
    names = sorted({"method", "seed", *(plans[0].varied if plans else ())})
    return json.dumps([settings.get(name) for name in names])


def _nearest(plan: TrialPlan, candidates: Sequence[Manifest]) -> str | None:
    """`as 164f2db8da91 but epochs 10 instead of 5`."""
    own = _settings(plan)
    differing = [(m, [name for name in own if own[name] != m.config.get(name, own[name])]) for m in candidates]
    if not differing:
        return None
    manifest, names = min(differing, key=lambda pair: len(pair[1]))
    named = ", ".join(_instead(name, own[name], manifest.config[name]) for name in names[:DIFFERENCES_NAMED])
    more = f" and {len(names) - DIFFERENCES_NAMED} more settings" if len(names) > DIFFERENCES_NAMED else ""
    return f"as {manifest.trial_id} but {named}{more}" if names else None


def _instead(name: str, own: Any, other: Any) -> str:
    return "other images" if name == "split" else f"{name} {shown(own)} instead of {shown(other)}"


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Within, every line of a SweepError begins with the file."""
    try:
        yield
    except SweepError as error:
        raise SweepError(*(f"{file}: {line}" for line in str(error).split("\n"))) from None
