"""check.py, estimate.py and inspection.py: faults in real files, stores and servers are found; correct ones pass."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from own_data import make_folder
from PIL import Image
from places import ROOT, SHARED
from servers import MlflowServer, S3Server, free_port
from tracked_sweep import content

from orchestration.plan.spec import Resources, Retention, SweepSpec
from orchestration.plan.sweep_file import check as parse
from orchestration.plan.trial_plan import TrialPlan, expand, representatives
from orchestration.preflight import check as checks
from orchestration.preflight.estimate import estimate, main_memory_mb, probed
from orchestration.preflight.machine import granted_memory
from orchestration.record.manifest import EpochMetrics, read_manifests
from orchestration.record.trial_record import TrialRecord
from orchestration.store.directory import DirectoryStore
from orchestration.store.open import open_store
from rrn_core import configure
from rrn_core.config import Runtime, TrainConfig
from rrn_core.data.camvid import CLASSES
from rrn_core.data.dataset import open_dataset
from rrn_core.data.inspection import Finding, inspect_data
from rrn_core.data.lists import read_list

SPLITS = SHARED / "data" / "splits" / "cityscapes"
CAMVID = configure(dataset="camvid", partition="1/2", crop=64, backbone="tiny", region_kernel=4)
TRAIN = [f"t{i}" for i in range(8)]
VAL = [f"v{i}" for i in range(3)]
EVERY_CLASS = np.arange(60 * 80, dtype=np.uint8).reshape(60, 80) % len(CLASSES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight training and three validation images without a fault."""
    root = tmp_path / "camvid"
    for split, names in (("train", TRAIN), ("val", VAL)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for name in names:
            Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(root / split / f"{name}.png")
            Image.fromarray(EVERY_CLASS).save(root / f"{split}annot" / f"{name}.png")
    return root


def label(root: Path, name: str, pixels: np.ndarray) -> None:
    folder = "trainannot" if name.startswith("t") else "valannot"
    Image.fromarray(pixels).save(root / folder / f"{name}.png")


def inspected(root: Path, config: TrainConfig = CAMVID, **given: Any) -> list[Finding]:
    return inspect_data(config, Runtime(data_root=root), **given)


def wrong(findings: list[Finding], level: str = "fault") -> list[str]:
    return [f"{finding.what}: {finding.detail}" for finding in findings if finding.level == level]


def only(findings: list[Finding], level: str = "fault") -> str:
    (text,) = wrong(findings, level)
    return text


def spec_of(**document: Any) -> SweepSpec:
    return parse({"name": "demo", "preset": "digits"} | document)


# data


def test_correct_data_have_no_fault_and_no_warning(root):
    findings = inspected(root)
    assert {finding.level for finding in findings} == {"ok"}
    assert findings[0].detail == "4 labelled, 4 unlabelled, 3 validation images"
    assert "8 of 8 images are smaller than the crop of 64" in findings[-1].detail


def test_the_embedded_data_are_correct():
    config = configure(dataset="digits", crop=64, region_kernel=4, train_images=64, val_images=16)
    assert {finding.level for finding in inspect_data(config, Runtime())} == {"ok"}


def test_a_missing_image_is_a_fault(root):
    (root / "train.txt").write_text("\n".join([*TRAIN, "t98", "t99"]))
    text = only(inspected(root))
    assert "2 of 10 training images are missing: t98, t99; " in text
    assert text.endswith("t98.png or t98.jpg is missing, but the train list names it")


def test_a_missing_label_of_a_labelled_image_is_a_fault_and_of_an_unlabelled_one_is_not(root):
    (root / "trainannot" / "t1.png").unlink()
    assert wrong(inspected(root)) == []
    (root / "trainannot" / "t2.png").unlink()
    assert "labelled images without a label file: t2; " in only(inspected(root))


def test_broken_labels_of_unlabelled_images_are_warnings_and_diagnostics_leave_them_out(root, caplog):
    advice = "; diagnostics leave them out, because these images are unlabelled in this partition"
    (root / "trainannot" / "t1.png").write_bytes(b"no image")
    findings = inspected(root)
    assert wrong(findings) == []
    text = only(findings, "warn")
    assert text.startswith("camvid 1/2 unlabelled: 1 of 4 no label image: t1; ")
    assert text.endswith(f"not a readable image{advice}")
    label(root, "t1", EVERY_CLASS[:50])
    label(root, "t3", EVERY_CLASS + 100)
    sizes, values = wrong(findings := inspected(root), "warn")
    assert "1 of 4 labels differ in size from their images: t1; " in sizes
    assert "1 of 4 labels hold values that are not allowed: t3; " in values
    assert sizes.endswith(advice)
    assert values.endswith(advice)
    assert wrong(findings) == []
    data = open_dataset(CAMVID, Runtime(data_root=root))
    assert [(label == 255).all() for _, label in (data.train[i] for i in range(8))] == [i in (1, 3) for i in range(8)]
    assert caplog.text.count("unlabelled in this partition, so only diagnostics lack it") == 2
    for name in ("t1", "t3"):
        (root / "trainannot" / f"{name}.png").unlink()
    findings = inspected(root)
    assert {finding.level for finding in findings} == {"ok"}
    assert any("2 with labels, which only diagnostics read" in finding.detail for finding in findings)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_a_fault(root, suffix):
    (root / "train" / "t1.png").unlink()
    file = root / "train" / f"t1.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file)
    assert wrong(inspected(root)) == []
    file.write_bytes(file.read_bytes()[:-1000])
    assert only(inspected(root)).endswith(f"t1.{suffix}: not a readable image, or truncated")


def test_images_are_decoded_as_in_training(root):
    Image.new("RGB", (80, 60)).save(root / "train" / "t1.png", format="PCX")  # which Pillow decodes, but not OpenCV
    assert only(inspected(root)).endswith("t1.png: not a readable image, or truncated")


def test_too_little_memory_to_decode_an_image_is_no_fault_of_the_image(root, monkeypatch):
    def exhausted(file: Path, **_: Any) -> None:
        raise MemoryError(file)

    monkeypatch.setattr("rrn_core.data.file_statistics.decode_image", exhausted)
    with pytest.raises(MemoryError):
        inspected(root)


def test_an_image_that_trains_and_validates_is_a_fault(root):
    for folder in ("", "annot"):
        (root / f"val{folder}" / "t0.png").write_bytes((root / f"train{folder}" / "t0.png").read_bytes())
    assert "both training and validation images: t0; " in only(inspected(root))


def test_every_label_of_another_size_is_counted(root):
    for name in ("t0", "t2", "v0"):
        label(root, name, EVERY_CLASS[:50])
    labeled, val = wrong(inspected(root))
    assert labeled.startswith("camvid 1/2 labelled: 2 of 4 labels differ in size from their images: t0, t2; ")
    assert labeled.endswith("t0.png: 80 x 50, but its image is 80 x 60")
    assert val.startswith("camvid validation: 1 of 3 ")


def test_meaningless_label_values_are_reported_with_their_files(root):
    for name in ("t0", "t4", "t6"):
        label(root, name, np.full((60, 80), 31, np.uint8))
    text = only(findings := inspected(root))
    assert "void" not in " ".join(wrong(findings, "warn"))
    assert "3 of 4 labels hold values that are not allowed: t0, t4, t6; " in text
    assert "t0.png: labels must be 0..11 or 255, got 31; if these are Cityscapes' labelIds" in text


def test_colours_that_are_not_stated_are_not_taken_for_labels(root):
    label(root, "t0", np.full((60, 80, 3), (1, 2, 3), np.uint8))
    text = only(inspected(root))
    assert "1 of 4 no label image: t0; " in text
    assert text.endswith(
        "an RGB mask with colours that are not stated: [1, 2, 3]; save the mask in the data set's own colours, or as grey values"
    )


def test_palette_files_among_grey_ones_are_warned_about_and_palette_files_alone_are_not(root):
    def as_palette(name: str) -> None:
        image = Image.fromarray(EVERY_CLASS)
        image.putpalette([level for level in range(256) for _ in range(3)])
        image.save(root / "trainannot" / f"{name}.png")

    as_palette("t2")
    assert wrong(findings := inspected(root)) == []
    assert "1 palette label files among 3 grey ones: t2; " in only(findings, "warn")
    for name in TRAIN:
        as_palette(name)
    findings = inspected(root)
    assert {finding.level for finding in findings} == {"ok"}
    assert any("with labels (4 palette)" in finding.detail for finding in findings)


def test_unreadable_images_are_counted_also_among_the_unlabelled(root):
    for name in ("t1", "t3"):
        (root / "train" / f"{name}.png").write_bytes(b"no image")
    assert only(inspected(root)).startswith("camvid 1/2 unlabelled: 2 of 4 not readable: t1, t3; ")


def test_void_labels_are_warned_about(root):
    for name in ("t0", "t2", "t4"):
        label(root, name, np.full((60, 80), 255, np.uint8))
    share, wholly = wrong(inspected(root), "warn")
    assert share.startswith("camvid 1/2 labelled: 75.0 % of the label pixels are void")
    assert wholly.startswith("camvid 1/2 labelled: 3 of 4 labels are wholly void: t0, t2, t4")


def test_classes_without_labels_are_named(root):
    for name in TRAIN[::2]:
        label(root, name, EVERY_CLASS % 9)
    assert only(inspected(root), "warn") == "camvid 1/2 labelled: 2 of 11 classes do not occur: pedestrian, bicyclist"


def test_an_image_with_exif_rotation_is_measured_as_training_decodes_it(root):
    turned = Image.Exif()
    turned[0x0112] = 6
    (root / "train" / "t0.png").unlink()
    Image.fromarray(np.zeros((80, 60, 3), np.uint8)).save(root / "train" / "t0.jpg", exif=turned)
    assert wrong(inspected(root)) == []


def test_files_that_two_configurations_share_are_read_once_and_progress_reaches_the_end(root):
    cache, progress = {}, []
    inspected(root, cache=cache, progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (11, 11)
    before = dict(cache)
    inspected(root, CAMVID.model_copy(update={"partition": "1/4"}), cache=cache)
    assert all(cache[record] is statistics for record, statistics in before.items())


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the published lists are not in ../shared/data/splits")
def test_the_published_partition_of_cityscapes_is_recognised(tmp_path):
    names = read_list(SPLITS / "train.txt")
    for folder in ("images", "segmentation"):
        (tmp_path / folder).mkdir()
        for split in ("train", "val"):
            (tmp_path / folder / split).mkdir()
    for split, name in (*(("train", name) for name in names), ("val", "v_0_0")):
        (tmp_path / "images" / split / f"{name}.png").touch()
        (tmp_path / "segmentation" / split / f"{name}_gtFine.png").touch()
    config = configure(dataset="cityscapes", partition="1/8")
    assert sum("CPS's train.txt" in text for text in wrong(inspected(tmp_path, config), "warn")) == 1
    (tmp_path / "train.txt").write_bytes((SPLITS / "train.txt").read_bytes())
    findings = inspected(tmp_path, config)
    assert not any("CPS list" in text for text in wrong(findings, "warn"))
    assert Finding("ok", "cityscapes 1/8", "equals the published CPS list") in findings


def test_each_selection_of_images_is_inspected_and_equal_findings_are_reported_once(root):
    configs = [CAMVID.model_copy(update=change) for change in ({}, {"eps": 0.2}, {"partition": "1/4"})]
    findings = checks.check_data(configs, Runtime(data_root=root))
    assert [finding.what for finding in findings if "images" in finding.detail and finding.what in ("camvid 1/2", "camvid 1/4")] == [
        "camvid 1/2",
        "camvid 1/4",
    ]
    assert len(findings) == len(set(findings))


@pytest.mark.parametrize("here", [None, Path("nowhere")])
def test_missing_data_are_a_fault_that_names_the_option(here):
    assert "--data-root" in only(checks.check_data([CAMVID], Runtime(data_root=here)))


def test_a_folder_that_only_the_cluster_has_is_no_fault():
    findings = checks.check_data([CAMVID], Runtime(data_root=Path("nowhere")), local=False)
    assert [finding.level for finding in findings] == ["warn"]


OWN = configure(dataset="folder", method="supervised", partition="full", crop=64, backbone="tiny", scales=[0.5, 1.0])


@pytest.mark.parametrize("sample", [None, 2])
def test_a_validation_list_without_a_labelled_pixel_is_a_fault_also_at_the_start_of_a_run(tmp_path, sample):
    own = make_folder(tmp_path, images=12)
    (own / "val.txt").write_text("im8\nim9\nim10\nim11\n")
    for name in ("im8", "im9", "im10", "im11"):
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(own / "masks" / f"{name}.png")
    text = only(inspected(own, OWN, sample=sample))
    assert text.startswith("folder validation: none of the 4 labels has a pixel of a class, all are void: im8, im9, im10 and 1 more; ")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(own / "masks" / "im9.png")
    assert wrong(inspected(own, OWN, sample=sample)) == []


def test_an_image_that_the_smallest_scale_leaves_nothing_of_is_a_fault(tmp_path):
    own = make_folder(tmp_path)
    for folder in ("images", "masks"):
        Image.fromarray(np.zeros((1, 40), np.uint8)).save(own / folder / "im0.png")
    assert "1 of 8 images are too small: im0; im0: 40 x 1 pixels" in only(inspected(own, OWN))


def test_two_orders_of_a_palette_are_a_fault(tmp_path):
    own = make_folder(tmp_path)
    for i in range(10):
        image = Image.open(own / "masks" / f"im{i}.png")
        image.putpalette([0, 0, 0, 255, 0, 0] if i else [255, 0, 0, 0, 0, 0])
        image.save(own / "masks" / f"im{i}.png")
    text = only(inspected(own, OWN))
    assert text.startswith("folder palettes: ")
    assert "im0.png" in text


def test_a_start_of_a_sweep_shows_what_a_sample_of_the_files_shows(tmp_path):
    own = make_folder(tmp_path)
    assert checks.data_notes([OWN], Runtime(data_root=own)) == []
    for file in (own / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) * 255).save(file)
    (own / "images" / "a.gif").touch()
    turned = Image.Exif()
    turned[0x0112] = 3
    Image.open(own / "images" / "im0.png").save(own / "images" / "im0.png", exif=turned)
    Image.new("RGB", (64, 64)).save(own / "images" / "im8.png")
    notes = "\n".join(checks.data_notes([OWN], Runtime(data_root=own)))
    assert "write `values: [0, 255]` into dataset.yaml" in notes
    assert "1 files are not used: a.gif" in notes
    assert "1 of 8 images are turned by their EXIF orientation: im0; " in notes
    assert "1 of 2 images are nearly black: im8; " in notes
    assert checks.data_notes([OWN], Runtime()) == []


def test_16_bit_images_of_different_ranges_are_warned_about_with_the_line_to_write(tmp_path):
    own = make_folder(tmp_path)
    for name, largest in (("im0", 2047), ("im1", 1023)):
        Image.fromarray(np.full((64, 64), largest, np.uint16)).save(own / "images" / f"{name}.png")
    assert "need 10 to 11 bits, and each is scaled by its own range; to scale all alike, write `bits: 11`" in only(
        inspected(own, OWN), "warn"
    )
    (own / "dataset.yaml").write_text("classes: [background, thing]\nbits: 16\n")
    text = only(inspected(own, OWN), "warn")
    assert "2 of 8 images are nearly black: im0, im1; 99 % of their values are at most 7 of 255; if these 16-bit images" in text


# store


def test_a_working_folder_passes_and_stays_empty(tmp_path):
    store = open_store(str(tmp_path / "store"))
    assert checks.check_store(store, "demo").level == "ok"
    assert list(store.keys("")) == []


def test_a_working_bucket_passes_and_stays_empty(s3_environment: S3Server):
    store = open_store(f"s3://rrn-test/{uuid.uuid4().hex}", deadline_s=30)
    assert checks.check_store(store, "demo").level == "ok"
    assert list(store.keys("")) == []


def test_a_folder_that_cannot_be_created_is_a_fault(tmp_path):
    (tmp_path / "store").write_text("a file")
    finding = checks.check_store(open_store(str(tmp_path / "store")), "demo")
    assert finding.level == "fault"
    assert str(tmp_path / "store") in finding.detail


def test_a_bucket_that_denies_access_is_a_fault_with_advice(s3_environment: S3Server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    assert "check AWS_ACCESS_KEY_ID" in only([checks.check_store(open_store("s3://rrn-test/x", deadline_s=5), "demo")])


class Unconditional(DirectoryStore):
    """A store that ignores the condition of a conditional put, as some S3 servers do."""

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        self.write(key, body)
        return self.read(key)[1]


def test_a_store_without_conditional_puts_is_a_fault(tmp_path):
    finding = checks.check_store(Unconditional(tmp_path / "store"), "demo")
    assert (finding.level, "conditional put" in finding.detail) == ("fault", True)


# disk space


def test_more_checkpoints_than_the_disk_holds_are_a_fault(tmp_path):
    store, paper = open_store(str(tmp_path / "not" / "yet")), configure(dataset="voc")
    enough = checks.check_disk([paper], Runtime(), trials=0, retention=Retention(), store=store)
    assert [finding.level for finding in enough] == ["ok"]
    full = checks.check_disk([paper], Runtime(), trials=10**9, retention=Retention(), store=store)
    assert "1000000000 trials x 3 checkpoints x 716 MB need up to " in only(full)


# tracking


def test_a_missing_database_is_not_created_by_the_check(tmp_path):
    path = tmp_path / "runs" / "mlflow.db"
    assert checks.check_tracking(f"sqlite:///{path}", "demo").detail == f"{path}: will be created"
    assert not path.parent.exists()


def tracking(uri: str) -> Finding:
    return checks.check_tracking(uri, "demo")


@pytest.fixture
def database(mlflow_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))


def changed(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_a_database_that_opens_passes_and_any_other_file_does_not(database, tmp_path):
    assert tracking(f"sqlite:///{database}").level == "ok"
    assert list((tmp_path / "artifacts" / "demo").iterdir()) == []
    (tmp_path / "other.db").write_text("no database " * 100)
    assert "not a database" in only([tracking(f"sqlite:///{tmp_path / 'other.db'}")])
    (tmp_path / "file").write_text("no folder")
    assert tracking(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}").level == "fault"


OLDER = "UPDATE alembic_version SET version_num = '451aebb31d03'"
"""Of MLflow 1.0."""


@pytest.mark.parametrize("complete", [True, False])
def test_an_older_database_is_left_as_it_is_and_its_upgrade_is_named(database, tmp_path, complete):
    changed(database, OLDER, *([] if complete else ["DROP TABLE trace_info"]))
    before, uri = content(database), f"sqlite:///{database}"
    text = only([tracking(uri)])
    assert f"an older release of MLflow wrote it; back it up, then run: mlflow db upgrade {uri}" in text
    assert content(database) == before


def test_a_newer_database_needs_a_newer_mlflow(database):
    changed(database, "UPDATE alembic_version SET version_num = 'f00f00f00f00'")
    text = only([tracking(f"sqlite:///{database}")])
    assert "a newer release of MLflow wrote it; install that release or a later one" in text
    assert "upgrade" not in text


def test_a_database_whose_creation_was_cut_off_is_completed(tmp_path):
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    Base.metadata.create_all(create_engine(f"sqlite:///{tmp_path}/mlflow.db"))
    assert tracking(f"sqlite:///{tmp_path}/mlflow.db").level == "ok"


def test_a_locked_database_is_named_as_locked(database):
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "database is locked" in only([tracking(f"sqlite:///{database}")])


@pytest.mark.parametrize("name", ["a?b=c", "100%20x", "a b#c", "ünï/cöde", "100% 'x'"])
def test_a_folder_of_any_name_works_or_is_refused_in_one_line(mlflow_database, tmp_path, name):
    path = tmp_path / name / "mlflow.db"
    path.parent.mkdir(parents=True)
    shutil.copy(mlflow_database, path)
    finding = tracking(f"sqlite:///{path}")
    if "?" in name or "%2" in name:
        assert f"{str(path)!r}: MLflow cannot open a path with ?, %20 or a line break; name another" in only([finding])
    else:
        assert finding.level == "ok"
        assert list((path.parent / "artifacts" / "demo").iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == [name.partition("/")[0]]


def test_a_database_whose_files_cannot_be_stored_is_a_fault(database):
    database.with_name("artifacts").write_text("a file where the folder should be")
    assert "files cannot be stored in file:///" in only([tracking(f"sqlite:///{database}")])


def test_a_server_that_answers_passes(mlflow_server: MlflowServer):
    assert checks.check_tracking(mlflow_server.uri, "demo").level == "ok"
    assert MlflowClient(mlflow_server.uri).get_experiment_by_name("demo")


def test_an_unreachable_server_is_a_fault_and_its_password_is_hidden():
    finding = checks.check_tracking(f"http://user:secret@127.0.0.1:{free_port()}", "demo")
    assert "check that MLflow is running" in only([finding])
    assert "secret" not in finding.detail


def test_an_address_of_another_kind_is_a_fault():
    assert "must be sqlite:////absolute/path.db or http(s)://host" in only([checks.check_tracking("postgresql://host/db", "demo")])


# device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_a_fault_here_and_none_on_a_cluster():
    assert "resources.gpu is 0.5" in only(checks.check_device([CAMVID], Resources(gpu=0.5), Runtime(device="cuda")))
    assert wrong(checks.check_device([CAMVID], Resources(gpu=0.5), Runtime(device="cuda"), local=False)) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_trial_fits_a_whole_gpu_and_not_a_sliver_of_it():
    (config,) = {plan.config for plan in expand(spec_of())}
    runtime = Runtime(device="cuda")
    assert [f.level for f in checks.check_device([config], Resources(gpu=1), runtime)] == ["ok"]
    assert "raise resources.gpu" in only(checks.check_device([config], Resources(gpu=0.001), runtime))


def test_a_gpu_that_is_asked_for_and_missing_is_refused_before_ray_starts(tmp_path):
    code = "from orchestration.cli.main import main; main()"
    for arguments, visible, line in (
        (["--set", "resources.gpu=1"], "7", "CUDA_VISIBLE_DEVICES=7 names none; correct or unset it, or set resources.gpu: 0"),
        (["--set", "resources.gpu=1"], "", "CUDA_VISIBLE_DEVICES='' names none; correct or unset it, or set resources.gpu: 0"),
        (["--device", "cuda:7"], "", "device: cuda:7, but torch finds 0 CUDA devices; use --device cpu"),
    ):
        command = [sys.executable, "-c", code, "run", str(ROOT / "sweeps" / "epsilon_grid.yaml"), *arguments]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, line in done.stderr, done.stdout) == (2, True, "")


# memory


def test_trials_that_together_exceed_the_main_memory_are_a_fault_and_the_remedy_helps():
    peak_mb = granted_memory() / 2**20 / 4
    finding = checks.check_main_memory(peak_mb, Resources(), trials=8, cpus=8)
    assert "8 trials at once x " in only([finding])
    assert finding.detail.endswith("Ray would kill trials; set resources: {memory: auto}, or raise resources.cpu")
    assert checks.check_main_memory(peak_mb, Resources(memory="auto"), trials=8, cpus=8).level == "ok"
    assert checks.check_main_memory(peak_mb, Resources(cpu=8), trials=8, cpus=8).level != "fault"
    assert checks.check_main_memory(peak_mb, Resources(gpu=1), trials=8, cpus=8, gpus=1).detail.startswith("1 trial at once x ")
    assert "lower batch_size or crop" in only([checks.check_main_memory(8 * peak_mb, Resources(memory="auto"), trials=1, cpus=8)])


# weights


def test_weights_that_are_missing_or_do_not_fit_are_a_fault(tmp_path):
    store, runtime = open_store(str(tmp_path / "store")), Runtime(lists_root=tmp_path)
    (plan,) = expand(spec_of(base={"init_weights": "start.safetensors"}))
    assert "no such file" in only(checks.check_weights([plan.config], runtime, store))
    (tmp_path / "start.safetensors").write_bytes(b"no weights")
    assert "not a readable safetensors file" in only(checks.check_weights([plan.config], runtime, store))


def test_weights_that_fit_pass_and_those_without_class_names_are_warned_of(tmp_path):
    from rrn_core.data.digits import CLASSES
    from rrn_core.methods import build_networks
    from rrn_core.weights import WeightsMetadata, pack

    (plan,) = expand(spec_of(base={"init_weights": "start.safetensors"}))
    branches = {name: value for name, value in build_networks(plan.config, 11).state_dict().items() if name.startswith("branch")}
    unnamed = WeightsMetadata(kind="branches", backbone="tiny", num_classes=11)
    other = (*CLASSES[1:], "sky")
    for level, metadata in (
        ("warn", unnamed),
        ("ok", unnamed.model_copy(update={"classes": CLASSES[::-1]})),
        ("fault", unnamed.model_copy(update={"classes": other})),
    ):
        (tmp_path / "start.safetensors").write_bytes(pack(branches, metadata))
        findings = checks.check_weights([plan.config], Runtime(lists_root=tmp_path), open_store(str(tmp_path / "store")))
        assert [finding.level for finding in findings] == [level]
    assert "digit_9, sky" in checks.render(findings)


# all checks


def test_a_correct_sweep_has_no_fault_and_a_broken_one_reports_all_of_them(tmp_path, root):
    spec = spec_of(grid={"partition": ["1/8", "1/4"]}, base={"train_images": 64})
    where = {"tracking": f"sqlite:///{tmp_path / 'm.db'}", "runtime": Runtime(device="cpu")}
    correct = checks.check(spec, expand(spec), store=open_store(str(tmp_path / "store")), **where)
    assert not checks.faulty(correct), checks.render(correct)
    (tmp_path / "file").write_text("")
    broken = checks.check(
        parse({"name": "demo", "base": {"dataset": "camvid"}}),
        expand(parse({"name": "demo", "base": {"dataset": "camvid"}})),
        store=open_store(str(tmp_path / "file")),
        tracking="ftp://x",
        runtime=Runtime(device="cpu"),
    )
    assert checks.faulty(broken)
    marks = [line.split()[:2] for line in checks.render(broken).splitlines()]
    assert [what for mark, what in marks if mark == "FAULT"] == ["camvid", "store", "tracking"]


def test_a_search_is_checked_with_each_of_its_choices():
    spec = spec_of(search={"trials": 40}, space={"partition": {"choices": ["1/8", "1/4"]}, "eps": {"low": 0.1, "high": 0.9}})
    assert [(plan.config.partition, plan.config.eps) for plan in representatives(spec)] == [("1/8", 0.1), ("1/4", 0.1)]


def test_planning_with_estimates_needs_no_torch():
    code = "import orchestration.preflight.estimate, orchestration.preflight.check, sys\n"
    code += "print([n for n in ('torch', 'ray', 'mlflow') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# estimates


def trained(tmp_path: Path, plan: TrialPlan, *, epochs: list[tuple[float, float]]) -> dict[str, Any]:
    """Manifests of a store with one trial; `epochs`: seconds of training and of evaluation."""
    store = open_store(str(tmp_path / "store"))
    record = TrialRecord.open(store, plan, retention=Retention())
    per_epoch = plan.iterations // plan.config.epochs
    for epoch, (train_s, eval_s) in enumerate(epochs, start=1):
        metrics = {"val/miou": 0.1, "perf/train_s": train_s, "perf/eval_s": eval_s, "perf/peak_memory_mb": 100.0 * epoch}
        entry = EpochMetrics(epoch=epoch, step=epoch * per_epoch, time_ms=epoch, metrics=metrics)
        record.commit(step=entry.step, epoch=epoch, files={"model.safetensors": b"x"}, entries=[entry], seconds=1)
    return read_manifests(store, "demo")


def test_a_trial_of_equal_cost_is_the_basis_of_an_estimate(tmp_path):
    short, long, other = expand(spec_of(points=[{"epochs": 2}, {"epochs": 4, "eps": 0.3, "val_images": 128}, {"batch_size": 8}]))
    manifests = trained(tmp_path, short, epochs=[(30.0, 6.0), (30.0, 6.0)])
    estimates = estimate([short, long, other], manifests)
    assert estimates[short.trial_id].seconds == pytest.approx(72)
    assert estimates[long.trial_id].seconds == pytest.approx(4 * (30 + 2 * 6))
    assert estimates[long.trial_id].peak_memory_mb == 200
    assert estimates[other.trial_id] is None


def test_an_epoch_that_was_interrupted_does_not_spoil_the_estimate(tmp_path):
    (plan,) = expand(spec_of(base={"epochs": 3}))
    manifests = trained(tmp_path, plan, epochs=[(30.0, 6.0), (1.0, 6.0), (30.0, 6.0)])
    assert estimate([plan], manifests)[plan.trial_id].seconds == pytest.approx(108)


def test_the_main_memory_of_a_trial_is_that_of_trials_that_ran_else_probed(tmp_path):
    ran, new = expand(spec_of(points=[{"epochs": 2}, {"batch_size": 8, "epochs": 2}]))
    manifests = trained(tmp_path, ran, epochs=[(30.0, 6.0)])
    runtime = Runtime(device="cpu", threads=1)
    assert main_memory_mb([ran], manifests, runtime) == 100
    assert main_memory_mb([ran, new], manifests, runtime) > 150  # torch alone takes as much


def test_one_probe_serves_all_trials_of_equal_cost():
    plans, progress = expand(spec_of(base={"epochs": 1}, grid={"lambda1": [0.3, 0.6], "method": ["supervised", "cps"]})), []
    found = probed(plans, Runtime(device="cpu", threads=1), progress=lambda done, total: progress.append((done, total)))
    assert progress == [(1, 2), (2, 2)]
    assert set(found) == {plan.trial_id for plan in plans}
    assert all(value.seconds > 0 for value in found.values())
