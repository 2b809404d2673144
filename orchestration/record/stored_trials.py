"""Finds stored trials that match a plan, and rebuilds plans from manifests, including those of earlier releases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from orchestration.errors import SpecError, SweepError
from orchestration.plan.spec import Settings, SweepSpec
from orchestration.plan.sweep_file import build_config
from orchestration.plan.trial_plan import ID_LENGTH, Resolve, TrialPlan
from orchestration.record.manifest import CONTENTS, Manifest, sha256_of
from orchestration.record.trial_state import TrialState
from rrn_core.config import TrainConfig


class StoredTrials:
    """The manifests of a sweep, searchable by configuration."""

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        known = ((manifest, _known_config(manifest)) for manifest in manifests)
        self._runs = [(manifest, config) for manifest, config in known if config and _identity(manifest, config)]
        self._by_unknown: dict[tuple[str, ...], dict[str, Manifest]] = {}

    def find(self, config: TrainConfig) -> Manifest | None:
        """The trial with the identity of `config`. Of several, a finished one, else the newest.

        Contents of files that `config` does not know yet are ignored.
        """
        unknown = tuple(name for name in CONTENTS if getattr(config, name) is None)
        if unknown not in self._by_unknown:
            self._by_unknown[unknown] = self._by_digest(unknown)
        return self._by_unknown[unknown].get(config.digest)

    def of_search(self, spec: SweepSpec, resolve: Resolve = lambda config: config) -> list[Manifest]:
        """The trials of the spec's search, by proposal: values inside the space, all other settings as in the file."""
        found = [
            manifest for manifest, stored in self._runs if manifest.proposal is not None and self._belongs(manifest, stored, spec, resolve)
        ]
        return sorted(found, key=lambda manifest: manifest.proposal or 0)

    def _by_digest(self, unknown: tuple[str, ...]) -> dict[str, Manifest]:
        """The best manifest for each digest that is computed without the settings `unknown`."""
        chosen: dict[str, Manifest] = {}
        for manifest, stored in self._runs:
            digest = stored.model_copy(update=dict.fromkeys(unknown)).digest if unknown else stored.digest
            chosen[digest] = max(chosen.get(digest, manifest), manifest, key=_preference)
        return chosen

    def _belongs(self, manifest: Manifest, stored: TrainConfig, spec: SweepSpec, resolve: Resolve) -> bool:
        values = {name: manifest.config[name] for name in spec.space if name in type(stored).model_fields}
        if not all(spec.space[name].holds(value) for name, value in values.items()):
            return False
        try:
            config = resolve(build_config({**spec.settings, **values}))
        except SpecError:  # the file has changed, and these values are no longer valid together
            return False
        return self.find(config) is manifest


def stored_config(manifest: Manifest) -> TrainConfig:
    """The configuration of a stored trial. Raises SpecError if this release does not know its settings."""
    return build_config(manifest.config, path="config")


def varied_settings(manifest: Manifest) -> Settings:
    """The varied settings that the trial's method has, as in its plan. All of them if this release does not know its settings."""
    if config := _known_config(manifest):
        return TrialPlan(manifest.sweep, config, manifest.varied).settings
    return {name: manifest.config.get(name) for name in manifest.varied}


def _known_config(manifest: Manifest) -> TrainConfig | None:
    try:
        return stored_config(manifest)
    except SpecError:
        return None


def _identity(manifest: Manifest, config: TrainConfig) -> str | None:
    identity = config.digest[:ID_LENGTH]
    return identity if manifest.trial_id in (identity, _identity_of_release_0_1(manifest.config)) else None


def new_manifest(plan: TrialPlan, *, now_ms: int) -> Manifest:
    """The manifest of a trial without attempts. `restored_plan` is its inverse."""
    return Manifest(
        sweep=plan.sweep,
        trial_id=plan.trial_id,
        label=plan.label,
        config=plan.config.model_dump(mode="json"),
        varied=plan.varied,
        proposal=plan.proposal,
        iterations=plan.iterations,
        created_ms=now_ms,
        updated_ms=now_ms,
    )


def restored_plan(manifest: Manifest) -> TrialPlan:
    """The plan of a stored trial. Raises SweepError if this release cannot run it."""
    config = stored_config(manifest)
    identity = _identity(manifest, config)
    if identity is None:
        raise SweepError(
            f"trial {manifest.trial_id}: written by another release; this release computes the trial ID {config.digest[:ID_LENGTH]} "
            "from its settings; use the release that wrote it"
        )
    stored_as = manifest.trial_id if manifest.trial_id != identity else None
    return TrialPlan(manifest.sweep, config, manifest.varied, manifest.proposal, stored_as)


def _identity_of_release_0_1(config: Mapping[str, Any]) -> str:
    """Release 0.1 hashed every setting, including those that the method does not read."""
    settings = dict(config)
    if settings.get("split"):
        settings |= {"train_list": None, "labeled_list": None, "unlabeled_list": None}
    if settings.get("init_sha256"):
        settings["init_weights"] = None
    return sha256_of(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())[:ID_LENGTH]


def _preference(manifest: Manifest) -> tuple[bool, int]:
    return manifest.status is TrialState.FINISHED, manifest.updated_ms
