"""trial.py: one trial from wherever the store says it was, to its end, with a directory as the store."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from orchestration.errors import Fenced
from orchestration.manifest import TrialRecord, read_manifest
from orchestration.plan import TrialPlan, expand
from orchestration.spec import Retention, check
from orchestration.store import open_store
from orchestration.trial import Job, run_trial
from rrn_core import Runtime

TINY = {"train_images": 32, "val_images": 4, "batch_size": 4, "epochs": 3, "partition": "1/4", "warmup_epochs": 0}


def plan_of(**base) -> TrialPlan:
    (plan,) = expand(check({"name": "demo", "preset": "digits", "base": TINY | base}))
    return plan


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(str(tmp_path / "store"), Runtime(device="cpu", threads=1, progress_every=2), Retention())


def manifest_of(plan: TrialPlan, job: Job):
    return read_manifest(open_store(job.store), plan.sweep, plan.trial_id)


def weights(plan: TrialPlan, job: Job) -> str:
    return manifest_of(plan, job).checkpoints[-1].objects["model.safetensors"].sha256


def test_a_trial_ends_finished_with_every_epoch_in_its_manifest(job):
    plan = plan_of()
    updates = list(run_trial(plan, job))
    manifest = manifest_of(plan, job)
    assert manifest.status == "finished"
    assert [entry.epoch for entry in manifest.history] == [1, 2, 3]
    assert manifest.checkpoints[-1].step == plan.iterations == updates[-1].iteration
    assert updates[-1].finished
    assert updates[-1].committed == 3
    assert manifest.seconds > 0


def test_an_abandoned_trial_goes_on_from_its_last_commit_to_the_same_weights(job, tmp_path):
    plan = plan_of()
    undisturbed = replace(job, store=str(tmp_path / "undisturbed"))
    list(run_trial(plan, undisturbed))
    updates = run_trial(plan, job)
    next(update for update in updates if update.epoch == 2)
    updates.close()  # as a kill would: no word to the store
    before = manifest_of(plan, job)
    assert before.status == "running"
    again = list(run_trial(plan, job))
    assert again[0].resumed_step == before.checkpoints[-1].step
    manifest = manifest_of(plan, job)
    assert (manifest.status, manifest.attempt) == ("finished", 2)
    assert manifest.history[: before.epochs] == before.history
    assert weights(plan, job) == weights(plan, undisturbed)


def test_a_checkpoint_within_an_epoch_is_committed_when_one_is_due(job):
    plan = plan_of()
    eager = replace(job, checkpoint_every_s=0.0)
    updates = run_trial(plan, eager)
    next(update for update in updates if update.iteration == 4)
    updates.close()
    assert manifest_of(plan, job).checkpoints[-1].step == 4
    assert manifest_of(plan, job).history == ()
    list(run_trial(plan, eager))
    assert [entry.epoch for entry in manifest_of(plan, job).history] == [1, 2, 3]


def test_a_finished_trial_is_not_trained_again(job):
    plan = plan_of(epochs=1)
    list(run_trial(plan, job))
    before = manifest_of(plan, job)
    (update,) = run_trial(plan, job)
    assert update.finished
    assert manifest_of(plan, job) == before


def test_a_trial_that_raises_is_failed_with_its_reason_and_can_be_tried_again(job):
    plan = plan_of(lr=1e9)
    with pytest.raises(FloatingPointError):
        list(run_trial(plan, job))
    manifest = manifest_of(plan, job)
    assert manifest.status == "failed"
    assert manifest.reason.startswith("FloatingPointError: diverged")
    assert "Traceback" in manifest.traceback
    with pytest.raises(FloatingPointError):
        list(run_trial(plan, job))
    assert manifest_of(plan, job).attempt == 2


def test_a_fenced_trial_stops_and_leaves_the_manifest_to_its_heir(job):
    plan = plan_of()
    updates = run_trial(plan, job)
    list(islice(updates, 3))
    heir = TrialRecord.open(open_store(job.store), plan, retention=job.retention)
    with pytest.raises(Fenced):
        list(updates)
    assert manifest_of(plan, job) == heir.manifest


def test_a_damaged_newest_checkpoint_costs_one_step_back_and_is_told(job, tmp_path):
    plan = plan_of()
    updates = run_trial(plan, job)
    next(update for update in updates if update.committed == 2)
    updates.close()
    newest = manifest_of(plan, job).checkpoints[-1]
    (tmp_path / "store" / newest.objects["state.pt"].key).write_bytes(b"damaged")
    again = list(run_trial(plan, job))
    assert again[0].resumed_step < newest.step
    assert f"checkpoint of step {newest.step} is unusable" in again[0].note
    assert manifest_of(plan, job).status == "finished"
