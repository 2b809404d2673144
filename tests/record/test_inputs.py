"""inputs.py and sweep.py: identities follow what the files hold, not where they lie."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from own_data import add_image, make_folder

from orchestration.errors import SweepError
from orchestration.plan.spec import Retention
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import TrialPlan, expand
from orchestration.record.inputs import InputContents, unresolved, weights_key
from orchestration.record.manifest import read_manifest
from orchestration.run.job import Job
from orchestration.run.trial import run_trial
from orchestration.store.open import open_store
from orchestration.sweep import Sweep, open_sweep
from rrn_core import Runtime, configure
from rrn_core.methods import build_networks
from rrn_core.state import WEIGHTS
from rrn_core.training import train

TINY = {"train_images": 16, "val_images": 2, "batch_size": 2, "epochs": 1, "partition": "1/4", "warmup_epochs": 0}
SWEEP = """
name: own
preset: digits
base: {dataset: folder, epochs: 1, batch_size: 2, warmup_epochs: 0}
grid: {partition: ["1/4", "1/2"]}
"""


@pytest.fixture
def data(tmp_path) -> Path:
    return make_folder(tmp_path / "data")


def opened(tmp_path: Path, data_root: Path | None, text: str = SWEEP) -> Sweep:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return open_sweep(file, (), data_root=data_root, environment={"RRN_STORE": str(tmp_path / "store")})


def ids(sweep: Sweep) -> list[str]:
    return [plan.trial_id for plan in sweep.plans]


def test_the_split_and_its_hash_are_part_of_a_trial(tmp_path, data):
    quarter, half = (plan.config.split for plan in opened(tmp_path, data).plans)
    assert (quarter.labeled, quarter.unlabeled, quarter.val) == (2, 6, 2)
    assert (half.labeled, half.unlabeled, half.val) == (4, 4, 2)
    assert quarter.sha256 != half.sha256


def test_another_image_makes_other_trials_and_another_place_does_not(tmp_path, data):
    before = ids(opened(tmp_path, data))
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    assert ids(opened(tmp_path, moved)) == before
    add_image(data, "im0b", seed=11)
    assert not set(ids(opened(tmp_path, data))) & set(before)


def test_other_classes_make_other_trials(tmp_path, data):
    before = ids(opened(tmp_path, data))
    (data / "dataset.yaml").write_text("classes: [background, thing, other]\n")
    assert not set(ids(opened(tmp_path, data))) & set(before)


def test_the_contents_of_a_list_count_and_not_its_name(tmp_path, data):
    text = SWEEP.replace("batch_size", "partition_by: list, labeled_list: LIST, batch_size").replace('"1/4", "1/2"', '"1/4"')
    for name, lines in (
        ("a.txt", "im1\nim2\n"),
        ("b.txt", "images/im1.png masks/im1.png\r\nimages/im2.png masks/im2.png"),
        ("c.txt", "im1\nim3\n"),
    ):
        (tmp_path / name).write_text(lines)
    a, b, c = (ids(opened(tmp_path, data, text.replace("LIST", name))) for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b
    assert a != c


def test_a_list_is_looked_for_beside_the_sweep_file_and_under_the_data_root(tmp_path, data):
    text = SWEEP.replace("batch_size", "partition_by: list, labeled_list: 'lists/labeled_{k}.txt', batch_size")
    (data / "lists").mkdir()
    (data / "lists" / "labeled_4.txt").write_text("im1\n")
    with pytest.raises(SweepError, match=r"own\.yaml: .*labeled_2\.txt: no such file; looked for .*labeled_2\.txt"):
        opened(tmp_path, data, text)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "labeled_2.txt").write_text("im1\nim2\nim3\n")
    assert [plan.config.split.labeled for plan in opened(tmp_path, data, text).plans] == [1, 3]


def test_without_the_data_at_hand_the_trials_of_the_store_are_found(tmp_path, data):
    there = opened(tmp_path, data)
    run(there.plans[0], tmp_path, data)
    away = opened(tmp_path, None)
    assert ids(away)[0] == ids(there)[0]
    assert away.manifests[ids(away)[0]].status == "finished"
    assert unresolved(away.plans[1].config)
    assert away.plans[1].iterations == 0


def run(plan: TrialPlan, tmp_path: Path, data_root: Path | None = None) -> None:
    list(run_trial(plan, Job(str(tmp_path / "store"), Runtime(device="cpu", threads=1, data_root=data_root), Retention())))


def test_training_refuses_other_images_than_were_planned(tmp_path, data):
    plan = opened(tmp_path, data).plans[0]
    add_image(data, "im0b", seed=11)
    run(plan, tmp_path, data)
    manifest = read_manifest(open_store(str(tmp_path / "store")), plan.sweep, plan.trial_id)
    assert (manifest.status, manifest.failure) == ("failed", "data")
    assert re.search(r"planned for 2 \+ 6 training and 2 validation images .* found 3 \+ 6", manifest.reason)


@pytest.fixture(scope="module")
def trained_weights() -> bytes:
    """A checkpoint's weights of another seed."""
    (report,) = train(configure("digits", **TINY | {"seed": 7}), Runtime(device="cpu", threads=1))
    return report.state.to_files()[WEIGHTS]


def weighted(tmp_path: Path, written: str, base: str = "") -> Sweep:
    settings = ", ".join(f"{key}: {value}" for key, value in TINY.items() if key != "partition")
    return opened(tmp_path, None, f"name: own\npreset: digits\nbase: {{init_weights: '{written}', {settings}{base}}}\n")


def test_weights_count_by_contents_and_reach_trials_through_the_store(tmp_path, trained_weights):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(trained_weights)
    sweep = weighted(tmp_path, "a.safetensors")
    assert ids(sweep) == ids(weighted(tmp_path, "b.safetensors"))
    plan = sweep.plans[0]
    assert plan.config.init_sha256 == hashlib.sha256(trained_weights).hexdigest()
    sweep.inputs.upload()
    (tmp_path / "a.safetensors").unlink()  # a trial on another machine has only the store
    run(plan, tmp_path)
    assert read_manifest(sweep.store, "own", plan.trial_id).status == "finished"


def test_training_starts_from_the_weights(tmp_path, trained_weights):
    start = tmp_path / "start.safetensors"
    start.write_bytes(trained_weights)
    still = configure("digits", **TINY | {"init_weights": str(start), "lr": 1e-30, "discriminator_lr": 1e-30})
    (report,) = train(still, Runtime(device="cpu", threads=1))
    donor = build_networks(still, 11)
    donor_report = next(train(configure("digits", **TINY | {"seed": 7}), Runtime(device="cpu", threads=1)))
    donor.load_state_dict(donor_report.state.quartet.state_dict())
    for name, parameter in report.state.quartet.named_parameters():
        assert np.allclose(parameter.detach(), donor.get_parameter(name).detach(), rtol=1e-6), name


def test_weights_of_the_store_are_named_by_their_key(tmp_path, trained_weights):
    open_store(str(tmp_path / "store")).write("weights/start.safetensors", trained_weights)
    assert weighted(tmp_path, "store:weights/start.safetensors").plans[0].config.init_sha256 == hashlib.sha256(trained_weights).hexdigest()


def test_weights_that_are_not_there_leave_the_plan_open(tmp_path):
    assert unresolved(weighted(tmp_path, "nowhere.safetensors").plans[0].config)


def test_a_search_finds_its_trials_again_only_while_the_data_are_the_same(tmp_path, data):
    text = SWEEP.replace('grid: {partition: ["1/4", "1/2"]}', "search: {sampler: random, trials: 1}\nspace: {eps: {low: 0.3, high: 0.9}}")
    from orchestration.run.search import AdaptiveSource

    sweep = opened(tmp_path, data, text)
    plan = AdaptiveSource(sweep.spec, {}, sweep.inputs.resolve).next()
    run(plan, tmp_path, data)
    assert ids(opened(tmp_path, data, text)) == ids(opened(tmp_path, None, text)) == [plan.trial_id]
    add_image(data, "im0b", seed=11)
    assert ids(opened(tmp_path, data, text)) == []


def test_a_search_brings_its_weights_to_the_store_before_its_first_proposal(tmp_path, trained_weights):
    (tmp_path / "a.safetensors").write_bytes(trained_weights)
    text = "name: own\npreset: digits\nbase: {init_weights: a.safetensors}\n"
    text += "search: {sampler: random, trials: 2}\nspace: {eps: {low: 0.3, high: 0.9}}"
    sweep = opened(tmp_path, None, text)
    sweep.inputs.upload()
    assert list(sweep.store.keys("weights/")) == [weights_key(hashlib.sha256(trained_weights).hexdigest())]
    assert [plan.iterations for plan in sweep.to_run] == [sweep.samples[0].iterations] * 2


def test_a_search_on_unusable_data_is_refused_at_once(tmp_path, data):
    (data / "val.txt").unlink()
    text = SWEEP.replace('grid: {partition: ["1/4", "1/2"]}', "search: {sampler: random, trials: 1}\nspace: {eps: {low: 0.3, high: 0.9}}")
    with pytest.raises(SweepError, match=r"own\.yaml: .*val\.txt: no such list"):
        opened(tmp_path, data, text)


def test_a_stored_proposal_that_no_longer_fits_the_file_is_passed_over(tmp_path):
    text = "name: own\npreset: digits\nbase: {crop: CROP, epochs: 1, train_images: 16, val_images: 1, scales: [2.0]}\n"
    text += "search: {sampler: random, trials: 1}\nspace: {region_kernel: {choices: [8]}}"
    sweep = opened(tmp_path, None, text.replace("CROP", "128"))
    run(sweep.samples[0].__class__(sweep.name, sweep.samples[0].config, ("region_kernel",), 0), tmp_path)
    assert len(opened(tmp_path, None, text.replace("CROP", "128")).plans) == 1
    assert opened(tmp_path, None, text.replace("CROP", "64").replace("choices: [8]", "choices: [1, 8]")).plans == []


def test_a_resolved_configuration_passes_every_check_again(tmp_path, data):
    (plan, _) = expand(check({"name": "own", "preset": "digits", "base": {"dataset": "folder"}, "grid": {"eps": [0.3, 0.5]}}))
    resolved = InputContents(Runtime(data_root=data), open_store(str(tmp_path / "store"))).resolve(plan.config)
    assert type(resolved).model_validate_json(resolved.model_dump_json()) == resolved
    assert weights_key("ab") == "weights/ab.safetensors"
