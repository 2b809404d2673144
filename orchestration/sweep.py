"""A sweep file, its trials, and what the store knows of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestration.contents import Contents, unresolved
from orchestration.errors import SweepError
from orchestration.manifest import Manifest, adopted, proposed, read_manifests, restored_plan, tracked, write_tracked
from orchestration.plan import TrialPlan, expand
from orchestration.spec import SweepSpec, load
from orchestration.store import Store, open_store
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
    contents: Contents
    plans: list[TrialPlan]
    manifests: dict[str, Manifest]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def unfinished(self) -> list[TrialPlan]:
        return [plan for plan in self.plans if plan.trial_id not in self.manifests or self.manifests[plan.trial_id].status != "finished"]

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

    def reread(self) -> Sweep:
        """The sweep with what the store knows now. Raises StoreError."""
        spec = self.spec
        names = None if spec.search or any(unresolved(plan.config) for plan in self.plans) else [plan.trial_id for plan in self.plans]
        manifests = read_manifests(self.store, spec.name, names)
        plans = [adopted(plan, manifests.values()) if unresolved(plan.config) else plan for plan in self.plans]
        if spec.search:
            found = proposed(spec, manifests, self.contents.resolve)
            plans = [replace(restored_plan(manifest), varied=tuple(spec.space)) for manifest in found]
        return replace(self, plans=plans, manifests=manifests)

    def tracked(self) -> set[str]:
        """Trials that MLflow shows completely; none where its database is gone."""
        database = self.tracking.removeprefix("sqlite:///")
        if database != self.tracking and not Path(database).exists():
            return set()
        return tracked(self.store, self.name, _public(self.tracking))

    def write_tracked(self, trial_ids: set[str]) -> None:
        """Remember what `tracked` answers."""
        write_tracked(self.store, self.name, _public(self.tracking), sorted(trial_ids))


def open_sweep(file: Path, overrides: Sequence[str], *, data_root: Path | None, environment: Mapping[str, str]) -> Sweep:
    """Read a sweep file and what the store knows of it.

    Args:
        data_root: where to look at the images that identities depend on; unset, trials are told apart by settings alone.
        environment: RRN_STORE and MLFLOW_TRACKING_URI stand in for what the file leaves out.

    Raises:
        SweepError: a faulty file, unusable data, or an absent store.
    """
    spec = load(file, overrides=overrides)
    store, tracking = open_places(spec, environment)
    contents = Contents(Runtime(data_root=data_root, lists_root=file.resolve().parent), store)
    try:
        plans = expand(spec, contents.resolve)
    except SweepError as error:
        raise SweepError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from None
    return Sweep(file, spec, store, tracking, contents, plans, {}).reread()


def open_places(spec: SweepSpec, environment: Mapping[str, str]) -> tuple[Store, str]:
    """The store and the tracking URI: of the file, of the environment, or folders below `runs`."""
    store = open_store(spec.store or environment.get("RRN_STORE") or "runs/store", deadline_s=STORE_WAITS_S)
    return store, _absolute(spec.tracking or environment.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db")


def _public(uri: str) -> str:
    """Without the credentials that the environment's address may hold: this goes into the store."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _absolute(tracking: str) -> str:
    """A relative SQLite path made absolute, so that the printed command works anywhere."""
    prefix = "sqlite:///"
    return f"{prefix}{Path(tracking.removeprefix(prefix)).resolve()}" if tracking.startswith(prefix) else tracking
