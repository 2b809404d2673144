"""A sweep file, its trials, and what the store knows of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from orchestration.errors import SweepError, without_password
from orchestration.failures import Failure
from orchestration.plan.spec import SweepSpec
from orchestration.plan.sweep_file import load
from orchestration.plan.trial_plan import TrialPlan, expand, representatives
from orchestration.record.inputs import InputContents
from orchestration.record.manifest import Manifest, StoredTrials, read_manifests, restored_plan
from orchestration.record.tracking_note import tracked, write_tracked
from orchestration.store.base import Store
from orchestration.store.open import open_store
from rrn_core.config import Runtime

STORE_WAITS_S = 30.0
"""How long a command waits for an absent store; trials wait longer."""


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

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def trial_ids(self) -> set[str]:
        return {plan.trial_id for plan in self.plans}

    @property
    def unfinished(self) -> list[TrialPlan]:
        return [plan for plan in self.plans if plan.trial_id not in self.manifests or self.manifests[plan.trial_id].status != "finished"]

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
        return f"{len(self.plans) - len(self.unfinished)} of {self.total} finished"

    def chosen(self, *, only: Sequence[str] = (), retry: Collection[str] = ()) -> list[TrialPlan]:
        """The unfinished trials that shall run.

        Args:
            only: beginnings of identities; none: all trials.
            retry: classes of failure; of the trials that have failed only these run again. None: all.

        Raises:
            SweepError: a beginning that fits no trial, or a choice that a search cannot take.
        """
        if only and self.spec.search:
            raise SweepError("--only: a search chooses its trials itself; leave it out")
        for word in only:
            if not any(plan.trial_id.startswith(word) for plan in self.plans):
                raise SweepError(f"--only {word}: no trial of this sweep has such an identity; rrn-sweep plan FILE lists them")
        named = [plan for plan in self.unfinished if not only or plan.trial_id.startswith(tuple(only))]
        return [plan for plan in named if not retry or self._failure(plan) in (None, *retry)]

    def _failure(self, plan: TrialPlan) -> Failure | None:
        """Why the trial has failed, if it has."""
        manifest = self.manifests.get(plan.trial_id)
        return (manifest.failure or "code") if manifest and manifest.status == "failed" else None

    def reread(self, *, known: Mapping[str, Manifest] | None = None) -> Sweep:
        """The sweep with what the store knows now; manifests that are `known` not to change are not read again. Raises StoreError."""
        spec = self.spec
        manifests = read_manifests(self.store, spec.name, known=known)
        stored = StoredTrials(manifests.values())
        if spec.search:
            found = stored.of_search(spec, self.inputs.resolve)
            plans = [replace(restored_plan(manifest), varied=tuple(spec.space)) for manifest in found]
        else:
            plans = [plan if plan.trial_id in manifests else _as_stored(plan, stored) for plan in self.plans]
        return replace(self, plans=plans, manifests=manifests)

    def tracked(self) -> set[str]:
        """Trials that MLflow shows completely; none where its database is gone."""
        database = self.tracking.removeprefix("sqlite:///")
        if database != self.tracking and not Path(database).exists():
            return set()
        return tracked(self.store, self.name, without_password(self.tracking))

    def write_tracked(self, trial_ids: set[str]) -> None:
        """Remember what `tracked` answers."""
        write_tracked(self.store, self.name, without_password(self.tracking), sorted(trial_ids))


def open_sweep(file: Path, overrides: Sequence[str], *, data_root: Path | None, environment: Mapping[str, str], look: bool = True) -> Sweep:
    """Read a sweep file and what the store knows of it.

    Args:
        data_root: where to look at the images that identities depend on; unset, trials are told apart by settings alone.
        look: read the store; else the sweep as if it were empty.
        environment: RRN_STORE and MLFLOW_TRACKING_URI stand in for what the file leaves out.

    Raises:
        SweepError: a faulty file, unusable data, or an absent store.
    """
    spec = load(file, overrides=overrides)
    store = open_store(spec.store or environment.get("RRN_STORE") or "runs/store", deadline_s=STORE_WAITS_S)
    tracking = _absolute(spec.tracking or environment.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db")
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


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Every line of a fault begins with the file."""
    try:
        yield
    except SweepError as error:
        raise SweepError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from None


def _absolute(tracking: str) -> str:
    """A relative SQLite path made absolute, so that the printed command works anywhere."""
    prefix = "sqlite:///"
    return f"{prefix}{Path(tracking.removeprefix(prefix)).resolve()}" if tracking.startswith(prefix) else tracking
