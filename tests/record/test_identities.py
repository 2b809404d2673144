"""Identities are stable: tests/identities.json lists those of every release, and stores of earlier releases can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import pytest
from places import ROOT
from pydantic import create_model

from orchestration.errors import SweepError
from orchestration.plan.sweep_file import check, load
from orchestration.plan.trial_plan import ID_LENGTH, expand
from orchestration.record.manifest import dump_manifest, parse_manifest, read_manifests
from orchestration.record.stored_trials import restored_plan
from orchestration.store.open import open_store
from orchestration.sweep import open_sweep
from rrn_core import PRESETS, configure
from rrn_core.methods import METHODS, settings_class
from rrn_core.setting import NO_NEUTRAL_VALUE, Setting, setting_of

GOLDEN = ROOT / "tests" / "identities.json"
EARLIER = Path(__file__).parent / "release_0_1"


def identities() -> dict[str, str]:
    """Identities of every method with every preset, and of every trial of the shipped sweeps, without their data."""
    found = {f"{method} {preset}": configure(preset, method=method).digest[:ID_LENGTH] for method in METHODS for preset in PRESETS}
    for file in sorted((ROOT / "sweeps").glob("*.yaml")):
        found |= {f"{file.stem} {plan.label}": plan.trial_id for plan in expand(load(file))}
    return found


def test_no_identity_changes_by_accident(pytestconfig):
    """An intended change raises the method's `revision`, is listed in the CHANGELOG, and is written by `make golden`."""
    if pytestconfig.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(identities(), indent=1) + "\n")
    assert GOLDEN.is_file(), "no golden identities; run `make golden`"
    known = json.loads(GOLDEN.read_text())
    assert {name: identity for name, identity in identities().items() if name in known} == known


@pytest.mark.parametrize("method", METHODS)
def test_a_new_setting_at_its_neutral_value_changes_no_identity(method):
    kind = settings_class(method)
    dummy = create_model("Dummy", __base__=kind, dummy=(Annotated[int, Setting("run", neutral=0)], 0))
    assert dummy().digest == kind().digest
    assert dummy(dummy=1).digest != kind().digest


def test_a_setting_that_the_method_does_not_have_makes_one_trial():
    plans = expand(check({"name": "s", "preset": "digits", "grid": {"method": ["supervised", "cps", "rrn"], "eps": [0.4, 0.6]}}))
    assert [plan.label for plan in plans] == ["method=supervised", "method=cps", "method=rrn eps=0.4", "method=rrn eps=0.6"]
    assert [plan.same_as for plan in plans] == [("method=supervised eps=0.6",), ("method=cps eps=0.6",), (), ()]


def test_another_revision_of_the_arithmetic_is_another_run(monkeypatch):
    before = configure("digits").digest
    monkeypatch.setattr(settings_class("rrn"), "revision", 2)
    assert configure("digits").digest != before


def test_every_setting_of_this_release_is_part_of_the_identity():
    for method in METHODS:
        fields = settings_class(method).model_fields
        assert all(setting_of(field).neutral is NO_NEUTRAL_VALUE for field in fields.values())
        assert configure(method=method).identity().keys() == {"revision", *fields}


class TestStoreOfRelease01:
    @pytest.fixture
    def store(self, tmp_path):
        for file in EARLIER.glob("*.json"):
            folder = tmp_path / "store" / "old" / file.stem
            folder.mkdir(parents=True)
            shutil.copy(file, folder / "manifest.json")
        return open_store(str(tmp_path / "store"))

    def test_every_trial_keeps_its_trial_id(self, store):
        manifests = read_manifests(store, "old")
        assert len(manifests) == 5
        assert all(restored_plan(manifest).trial_id == trial_id for trial_id, manifest in manifests.items())

    def test_finished_trials_stay_finished_and_trials_that_are_equal_now_become_one(self, store):
        sweep = open_sweep(EARLIER / "sweep.yaml", [f"store={store.uri}"], data_root=None, environment={})
        assert sweep.complete
        assert [plan.label for plan in sweep.plans] == ["method=supervised", "method=cps", "method=rrn eps=0.4", "method=rrn eps=0.6"]
        assert sweep.trial_ids <= {file.stem for file in EARLIER.glob("*.json")}

    def test_settings_that_do_not_give_the_stored_identity_have_none(self, store):
        key = "old/67ae66cd4385/manifest.json"
        manifest, _ = parse_manifest(*store.read(key), key=key)
        with pytest.raises(SweepError, match="written by another release"):
            restored_plan(manifest.model_copy(update={"config": manifest.config | {"eps": 0.5}}))

    def test_a_stopped_attempt_is_read_as_interrupted(self, store):
        key = "old/67ae66cd4385/manifest.json"
        stored = json.loads(store.read(key)[0])
        stored["status"], stored["attempts"][-1]["outcome"] = "running", "stopped"
        manifest, _ = parse_manifest(json.dumps(stored).encode(), "", key=key)
        assert (manifest.status, manifest.attempts[-1].outcome) == ("interrupted", "interrupted")
        assert parse_manifest(dump_manifest(manifest), "", key=key)[0] == manifest

    def test_a_trial_with_another_setting_is_new_and_the_plan_shows_the_difference(self, store):
        sweep = open_sweep(EARLIER / "sweep.yaml", [f"store={store.uri}", "epochs=2"], data_root=None, environment={})
        assert "as 67ae66cd4385 but epochs 2 instead of 1" in sweep.why_new().values()
