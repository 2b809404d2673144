"""trial.py: one trial from its newest checkpoint to its end, with a directory as the store."""

from __future__ import annotations

import io
import json
import time
import uuid
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import new_s3_server, set_environment
from own_data import make_folder
from PIL import Image

from orchestration.compare.comparison import compare
from orchestration.compare.page import page
from orchestration.compare.results import results
from orchestration.errors import Fenced, Preempted, SweepError
from orchestration.export.best_checkpoint import best
from orchestration.observe import status
from orchestration.observe.state_changes import newest
from orchestration.observe.trial_log import log_lines
from orchestration.plan.spec import PictureRule, Retention, Retries, Search
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import TrialPlan, expand
from orchestration.record.lease import Lease
from orchestration.record.manifest import read_manifest
from orchestration.record.trial_record import TrialRecord
from orchestration.run import trial
from orchestration.run.job import Job
from orchestration.run.search import objective
from orchestration.run.trial import run_trial
from orchestration.store.open import open_store
from orchestration.tracking.descriptions import summary_of
from orchestration.tracking.run_content import run_content
from rrn_core import Runtime
from rrn_core.evaluate import miou

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


@pytest.mark.slow
def test_a_trial_ends_finished_with_every_epoch_in_its_manifest(job):
    plan = plan_of()
    updates = list(run_trial(plan, job))
    manifest = manifest_of(plan, job)
    assert manifest.status == "finished"
    assert [entry.epoch for entry in manifest.history] == [1, 2, 3]
    assert manifest.checkpoints[-1].step == plan.iterations == updates[-1].iteration
    assert updates[-1].ended == "finished"
    (attempt,) = manifest.attempts
    assert (attempt.outcome, attempt.last_step, attempt.lost_s) == ("finished", plan.iterations, 0.0)
    assert updates[-1].committed == 3
    assert manifest.seconds > 0


def test_without_a_labelled_validation_pixel_a_trial_finishes_and_no_reader_needs_its_miou(job, tmp_path):
    root = make_folder(tmp_path / "data")
    for name in ("im8", "im9"):
        Image.new("L", (64, 64), 255).save(root / "masks" / f"{name}.png")
    plan = plan_of(dataset="folder", partition="1/2", epochs=2, batch_size=2, method="supervised")
    job = replace(job, runtime=job.runtime.model_copy(update={"data_root": root}))
    *_, last = run_trial(plan, job)
    manifest = manifest_of(plan, job)
    assert (last.ended, last.miou, manifest.status) == ("finished", None, "finished")
    assert not [name for entry in manifest.history for name in entry.metrics if name.startswith("val/")]
    assert manifest.best is manifest.best_checkpoint is None
    manifests, states = {plan.trial_id: manifest}, {plan.trial_id: manifest.status}
    assert status.summary([plan], manifests, states).splitlines()[1].split()[2:-1] == ["2/2", *["-"] * 7]
    assert "val/miou undefined" in "\n".join(log_lines(manifest, job.store))
    assert newest([plan], manifests, count=1)[0].endswith("attempt 1 finished")
    (result,) = results([([plan], manifests)])
    assert result.best is None
    assert [dict(cell.values) for cell in compare([result]).cells] == [{}]
    assert page(compare([result]), title="t", source={}, updated="now")
    content = run_content(manifest, store=job.store, live=False)
    names = {name for points in content.series.values() for point in points for name in point.metrics}
    assert "train/loss" in names
    assert not {name for name in names if "miou" in name}
    assert not any("nan" in tag.lower().split() for tag in content.tags.values())
    summary = summary_of(manifest, manifest.status)
    assert (summary.last, summary.best) == (None, None)
    assert objective(manifest, Search(trials=1)) is None
    with pytest.raises(SweepError, match="no finished trial has val/miou: no validation pixel has a label"):
        best([plan], manifests)


def pictures_of(plan: TrialPlan, job: Job) -> dict[int, dict[str, bytes]]:
    store = open_store(job.store)
    return {drawn.epoch: {name: store.read(ref.key)[0] for name, ref in drawn.objects.items()} for drawn in manifest_of(plan, job).pictures}


def test_every_drawn_epoch_is_in_the_manifest_with_its_confusion_matrix(job):
    plan = plan_of()
    list(run_trial(plan, replace(job, pictures=PictureRule(images=2, every=2))))
    manifest, pictures = manifest_of(plan, job), pictures_of(plan, job)
    assert list(pictures) == [2, 3]  # every second, and the last
    for epoch, files in pictures.items():
        confusion = json.loads(files["confusion.json"])
        assert (len(confusion["classes"]), confusion["head"]) == (11, "ensemble")
        assert miou(torch.tensor(confusion["counts"])) == manifest.history[epoch - 1].metrics["val/miou"]
        with Image.open(io.BytesIO(files["predictions.png"])) as picture:
            assert picture.format == "PNG"
            assert picture.height > 2 * 256


def test_pictures_change_no_weights(job, tmp_path):
    plan = plan_of(epochs=2)
    without = replace(job, store=str(tmp_path / "without"), pictures=PictureRule(images=0))
    list(run_trial(plan, replace(job, pictures=PictureRule(every=1))))
    list(run_trial(plan, without))
    assert weights(plan, job) == weights(plan, without)
    assert (len(manifest_of(plan, job).pictures), manifest_of(plan, without).pictures) == (2, ())


def test_a_trial_whose_pictures_fail_finishes_without_them(job, monkeypatch, caplog):
    plan = plan_of(epochs=1)
    monkeypatch.setattr("PIL.ImageFont.load_default", None)  # as if the library had none
    list(run_trial(plan, job))
    assert (manifest_of(plan, job).status, manifest_of(plan, job).pictures) == ("finished", ())
    assert [record.message for record in caplog.records] == ["epoch 1 has no picture: TypeError: 'NoneType' object is not callable"]


def test_an_epoch_records_resource_use_and_an_attempt_its_machine(job):
    plan = plan_of(epochs=1)
    list(run_trial(plan, job))
    manifest = manifest_of(plan, job)
    used = {name for name in manifest.last.metrics if name.startswith("system/")}
    assert used >= {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes", "system/system_memory_usage_percentage"}
    assert {"python", "torch", "device", "cpus", "memory", "platform"} <= manifest.attempts[0].machine.keys()


def test_an_abandoned_trial_resumes_from_its_last_commit_and_reaches_the_same_weights(job, tmp_path):
    plan = plan_of()
    undisturbed = replace(job, store=str(tmp_path / "undisturbed"))
    list(run_trial(plan, undisturbed))
    updates = run_trial(plan, job)
    next(update for update in updates if update.epoch == 2)
    updates.close()
    before = manifest_of(plan, job)
    assert (before.status, before.attempts[-1].outcome) == ("interrupted", "interrupted")
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
    assert update.ended == "finished"
    assert manifest_of(plan, job) == before


def test_a_diverged_trial_has_failed_and_can_be_tried_again_by_the_next_driver(job):
    plan = plan_of(lr=1e9)
    for driver in (1, 2):
        assert list(run_trial(plan, replace(job, driver=driver)))[-1].ended == "failed"
        manifest = manifest_of(plan, job)
        assert (manifest.status, manifest.failure, manifest.attempt) == ("failed", "diverged", driver)
        assert manifest.reason.startswith("FloatingPointError: diverged")
        assert "Traceback" in manifest.traceback
        (update,) = run_trial(plan, replace(job, driver=driver))
        assert update.ended == "failed"


def test_an_error_is_raised_until_the_retries_of_its_class_are_used_up(job):
    plan = plan_of(dataset="folder")
    retrying = replace(job, retries=Retries(data=1))
    with pytest.raises(ValueError, match="data_root"):
        list(run_trial(plan, retrying))
    assert manifest_of(plan, job).failure == "data"
    assert list(run_trial(plan, retrying))[-1].ended == "failed"
    assert [attempt.outcome for attempt in manifest_of(plan, job).attempts] == ["data", "data"]


def test_a_preempted_trial_commits_its_current_step_and_resumes_there(job, tmp_path):
    plan = plan_of()
    list(run_trial(plan, undisturbed := replace(job, store=str(tmp_path / "undisturbed"))))
    updates = run_trial(plan, job)
    reached = next(update for update in updates if update.iteration % 4)
    with pytest.raises(Preempted):
        updates.throw(Preempted("worker received SIGTERM"))
    manifest = manifest_of(plan, job)
    assert (manifest.failure, manifest.checkpoints[-1].step) == ("lost", reached.iteration)
    again = list(run_trial(plan, job))
    assert again[0].resumed_step == reached.iteration
    assert weights(plan, job) == weights(plan, undisturbed)


@pytest.fixture
def remote_job(job, tmp_path_factory, monkeypatch):
    """A job whose store is on its own server, and that server."""
    server = new_s3_server(tmp_path_factory)
    set_environment(server, monkeypatch)
    yield replace(job, store=f"s3://rrn-test/{uuid.uuid4().hex}", patience_s=600.0), server
    server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [GeneratorExit, Preempted])
def test_a_trial_stopped_while_the_store_is_unavailable_ends_soon_and_the_next_attempt_resumes(remote_job, monkeypatch, caplog, stop):
    monkeypatch.setattr(trial, "COMMIT_WITHIN_S", 3.0)
    job, server = remote_job
    plan = plan_of()
    updates = run_trial(plan, job)
    next(update for update in updates if update.committed == 1)
    server.kill()
    list(islice(updates, 4))  # one more epoch, whose commit waits
    since_s = time.monotonic()
    if stop is Preempted:
        with pytest.raises(Preempted):
            updates.throw(Preempted("worker received SIGTERM"))
    else:
        updates.close()
    assert time.monotonic() - since_s < 3 + trial.CLOSE_WITHIN_S + 5
    assert "the attempt stays open, the next attempt closes it" in caplog.text
    server.start()
    again = list(run_trial(plan, job))
    assert again[0].resumed_step in (6, 12)  # ends of epochs: the commit before the outage, or the one under way
    manifest = manifest_of(plan, job)
    assert (manifest.status, [attempt.outcome for attempt in manifest.attempts]) == ("finished", ["lost", "finished"])


@pytest.mark.slow
def test_a_trial_with_nothing_to_commit_that_is_stopped_while_the_store_is_unavailable_ends_soon(remote_job, caplog):
    job, server = remote_job
    updates = run_trial(plan_of(), job)
    next(updates)
    server.kill()
    since_s = time.monotonic()
    updates.close()
    assert time.monotonic() - since_s < trial.CLOSE_WITHIN_S + 5
    assert "the attempt stays open" in caplog.text


def test_a_checkpoint_that_is_intact_but_does_not_load_is_passed_over(job):
    plan = plan_of()
    updates = run_trial(plan, job)
    next(update for update in updates if update.committed == 1)
    updates.close()
    store = open_store(job.store)
    record = TrialRecord.open(store, plan, retention=job.retention)
    record.commit(step=999, epoch=2, files={"model.safetensors": b"garbage", "state.safetensors": b"garbage"}, entries=[], seconds=1.0)
    again = list(run_trial(plan, job))
    assert again[0].resumed_step == 999
    assert "checkpoint of step 999 is unusable" in again[1].note
    assert "starts from iteration 0" not in again[1].note  # an older checkpoint was used
    assert manifest_of(plan, job).status == "finished"


def test_a_trial_without_any_usable_checkpoint_starts_from_iteration_0_and_says_so(job):
    plan = plan_of(epochs=1)
    record = TrialRecord.open(open_store(job.store), plan, retention=job.retention)
    files = {"model.safetensors": b"weights", "state.pt": b"state"}  # as release 0.1 wrote them
    record.commit(step=4, epoch=1, files=files, entries=[], seconds=1.0)
    record.stop()
    tried, started, *_ = run_trial(plan, job)
    assert (tried.resumed_step, tried.note) == (4, None)
    assert started.resumed_step is None
    assert started.note.startswith("checkpoint of step 4 is unusable (")
    assert "saved by an earlier release as state.pt" in started.note
    assert started.note.endswith("; the trial starts from iteration 0")
    assert manifest_of(plan, job).status == "finished"


def test_a_replaced_driver_starts_no_trial(job):
    plan = plan_of()
    with Lease.acquire(open_store(job.store), "demo", say=print) as lease:
        with pytest.raises(Fenced, match="driver 1 has taken the sweep over from driver 0"):
            next(run_trial(plan, job))
        assert list(run_trial(plan, replace(job, driver=lease.token)))[-1].ended == "finished"


def test_a_fenced_trial_stops_and_leaves_the_manifest_to_the_later_attempt(job):
    plan = plan_of()
    updates = run_trial(plan, job)
    list(islice(updates, 3))
    later = TrialRecord.open(open_store(job.store), plan, retention=job.retention)
    with pytest.raises(Fenced):
        list(updates)
    assert manifest_of(plan, job) == later.manifest


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_note(job, tmp_path):
    plan = plan_of()
    updates = run_trial(plan, job)
    next(update for update in updates if update.committed == 2)
    updates.close()
    newest = manifest_of(plan, job).checkpoints[-1]
    (tmp_path / "store" / newest.objects["state.safetensors"].key).write_bytes(b"damaged")
    again = list(run_trial(plan, job))
    assert again[0].resumed_step < newest.step
    assert f"checkpoint of step {newest.step} is unusable" in again[0].note
    assert manifest_of(plan, job).status == "finished"
