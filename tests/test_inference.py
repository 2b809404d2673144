"""The commands about one set of weights, run on a real checkpoint of a short training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_data import make_folder
from PIL import Image
from places import ROOT
from safetensors.torch import load_file

from orchestration.errors import SweepError
from orchestration.inference import evaluate_checkpoint, import_weights, predict_images, read_weights
from orchestration.store.open import open_store
from rrn_core import Runtime, configure, train
from rrn_core.data.camvid import CamVid
from rrn_core.data.dataset import open_dataset
from rrn_core.data.labels import voc_palette
from rrn_core.evaluate import predict
from rrn_core.methods import build_networks
from rrn_core.weights import load_model, pack, unpack

ONE_THREAD = Runtime(device="cpu", threads=1)
SMALL = configure("digits", train_images=8, val_images=4, epochs=1, image_size=80)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """The folder of a checkpoint, and what the training said of it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    *_, last = train(SMALL, ONE_THREAD)
    last.state.save(folder)
    return folder, last.metrics


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Two scenes as files."""
    (tmp_path / "in").mkdir()
    data = open_dataset(SMALL, ONE_THREAD)
    files = [tmp_path / "in" / f"scene.{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        Image.fromarray(data.val[i][0]).save(file)
    return files


def released(folder: Path, **settings: Any) -> Path:
    """A checkpoint as CPS saves it."""
    quartet = build_networks(SMALL.model_copy(update={"method": "cps", **settings}), 11)
    torch.save({"model": {f"module.{key}": tensor for key, tensor in quartet.state_dict().items()}}, folder / "epoch-33.pth")
    return folder / "epoch-33.pth"


def test_an_evaluated_checkpoint_has_the_numbers_that_its_training_reported(trained):
    folder, reported = trained
    found = evaluate_checkpoint(str(folder), ONE_THREAD)
    assert found.miou == {
        **{head: reported[f"val/miou_{head}"] for head in ("branch1", "branch2", "ensemble")},
        "reported": reported["val/miou"],
    }
    for head, classes in found.iou.items():
        assert len(classes) == 11
        assert classes == {name: reported.get(f"val/iou_{head}/{name}") for name in classes}
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert (record["dataset"], record["images"], record["crop"], record["stride"]) == ("digits", 4, 64, 43)
    lines = str(found).splitlines()
    assert lines[0].split() == ["class", "branch1", "branch2", "ensemble"]
    assert lines[12].split() == ["mIoU", *(f"{100 * found.miou[head]:.2f}" for head in ("branch1", "branch2", "ensemble"))]


def test_settings_and_stride_of_the_evaluation_can_be_changed(trained):
    folder, reported = trained
    found = evaluate_checkpoint(str(folder), ONE_THREAD, changes={"ensemble": "none", "crop": 80, "val_images": 2}, stride=20)
    assert found.miou["reported"] == found.miou["branch1"]
    assert (found.protocol["images"], found.protocol["crop"], found.protocol["stride"]) == (2, 80, 20)
    assert found.miou["branch1"] != reported["val/miou_branch1"]


def test_an_imported_checkpoint_can_be_evaluated(tmp_path):
    out = tmp_path / "weights" / "cps.safetensors"
    text = import_weights(released(tmp_path), out)
    assert "both branches, 11 classes, tiny" in text
    assert not [file for file in out.parent.iterdir() if file != out]
    expected = build_networks(SMALL, 11).branch1.state_dict()["classifier.weight"]
    assert torch.equal(load_file(out)["branch1.classifier.weight"], expected)
    settings = {"dataset": "digits", "val_images": 2, "train_images": 8, "crop": 64, "eval_batch": 1}
    found = evaluate_checkpoint(str(out), ONE_THREAD, changes=settings)
    assert found.protocol["images"] == 2
    assert 0 <= found.miou["ensemble"] < 0.3


def test_predictions_are_palette_images_of_the_argmax_and_half_transparent_overlays(trained, pictures, tmp_path):
    folder, _ = trained
    out = tmp_path / "out"
    written = predict_images(str(folder), pictures, out, ONE_THREAD)
    assert written == [out / f"scene.{i}{end}.png" for i in range(2) for end in ("", "_overlay")]
    model, colours = load_model(folder), np.array(voc_palette(11))
    for i, file in enumerate(pictures):
        pixels = np.asarray(Image.open(file))
        picture = Image.open(out / f"scene.{i}.png")
        labels = predict(model.quartet, pixels, model.config, torch.device("cpu"))
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), labels)
        assert np.array_equal(np.asarray(picture.convert("RGB")), colours[labels])
        overlay = np.asarray(Image.open(out / f"scene.{i}_overlay.png")).astype(float)
        assert np.abs(overlay - (pixels / 2 + colours[labels] / 2)).max() <= 0.5


def test_a_prediction_has_the_colours_of_its_data_set(trained, pictures, tmp_path):
    import_weights(released(tmp_path), tmp_path / "unnamed.safetensors")
    changes = {"dataset": "camvid", "crop": 64}
    predict_images(str(tmp_path / "unnamed.safetensors"), pictures[:1], tmp_path / "out", ONE_THREAD, changes=changes)
    assert Image.open(tmp_path / "out" / "scene.0.png").getpalette()[:33] == [value for colour in CamVid.palette for value in colour]


def test_predictions_that_would_replace_each_other_or_an_image_are_refused(trained, pictures, tmp_path):
    twin = tmp_path / "scene.0.jpg"
    with pytest.raises(SweepError, match=r"scene\.0\.jpg: its result scene\.0\.png would replace .*in/scene\.0\.png"):
        predict_images(str(trained[0]), [*pictures, twin], tmp_path / "out", ONE_THREAD)
    with pytest.raises(SweepError, match=r"its result scene\.0\.png would replace"):
        predict_images(str(trained[0]), pictures, pictures[0].parent, ONE_THREAD)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_is_predicted_and_what_is_no_image_named(trained, pictures, tmp_path, caplog):
    folder = pictures[0].parent
    pictures[1].rename(folder / "scene.1.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "sub").mkdir()
    written = predict_images(str(trained[0]), [folder], tmp_path / "out", ONE_THREAD)
    assert [file.name for file in written] == [f"scene.{i}{end}.png" for i in range(2) for end in ("", "_overlay")]
    assert [text.partition(": ")[2] for text in caplog.messages] == ["2 of 4 entries are not images and left out: notes.txt, sub"]
    with pytest.raises(SweepError, match=r"sub: holds no image; expected files that end in \.png"):
        predict_images(str(trained[0]), [folder / "sub"], tmp_path / "out", ONE_THREAD)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "vulkan", "cuda:99", "nonsense"])
def test_a_device_that_is_not_supported_or_absent_is_refused_in_one_line(trained, device):
    with pytest.raises(SweepError, match=r"^device: (must be auto, cpu, cuda or cuda:N, got|cuda:99, but torch finds)"):
        evaluate_checkpoint(str(trained[0]), Runtime(device=device))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[str, Path]:
    """A checkpoint of a training on two classes of one's own, and the data."""
    root, folder = make_folder(tmp_path_factory.mktemp("own") / "data"), tmp_path_factory.mktemp("checkpoint")
    config = configure("digits", dataset="folder", partition="1/2", epochs=1, batch_size=2)
    *_, last = train(config, ONE_THREAD.model_copy(update={"data_root": root}))
    last.state.save(folder)
    return str(folder), root


def described(root: Path, target: Path, text: str) -> Runtime:
    """The same files under another dataset.yaml."""
    shutil.copytree(root, target)
    (target / "dataset.yaml").write_text(text)
    return ONE_THREAD.model_copy(update={"data_root": target})


def test_classes_in_another_order_are_mapped_by_name(own, pictures, tmp_path, caplog):
    folder, root = own
    same, moved = (
        described(root, tmp_path / name, text)
        for name, text in (("same", "classes: [background, thing]"), ("moved", "classes: [thing, background]\nvalues: [1, 0]"))
    )
    expected, found = (evaluate_checkpoint(folder, runtime) for runtime in (same, moved))
    assert found.miou == expected.miou
    assert found.iou == expected.iou
    pictured = [predict_images(folder, pictures[:1], tmp_path / f"out{i}", runtime)[0] for i, runtime in enumerate((same, moved))]
    assert np.array_equal(*(np.asarray(Image.open(file)) ^ i for i, file in enumerate(pictured)))
    assert not caplog.messages


def test_other_classes_are_refused_with_both_lists_in_one_line(own, pictures, tmp_path):
    folder, root = own
    other = described(root, tmp_path / "other", "classes: [background, Thing]")
    for attempt, classes in (
        (lambda: evaluate_checkpoint(folder, other), "2 classes (background, Thing)"),
        (lambda: predict_images(folder, pictures, tmp_path / "out", other), "2 classes (background, Thing)"),
        (lambda: evaluate_checkpoint(folder, ONE_THREAD, changes={"dataset": "digits"}), "11 classes (background, digit_0"),
    ):
        with pytest.raises(SweepError) as caught:
            attempt()
        assert f"{folder}: the weights are for 2 classes (background, thing), the data have {classes}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_without_class_names_are_read_with_one_warning(own, tmp_path, caplog):
    tensors, metadata = unpack((Path(own[0]) / "model.safetensors").read_bytes())
    (tmp_path / "old.safetensors").write_bytes(pack(tensors, metadata.model_copy(update={"classes": None})))
    evaluate_checkpoint(str(tmp_path / "old.safetensors"), ONE_THREAD.model_copy(update={"data_root": own[1]}))
    (warning,) = caplog.messages
    assert "old.safetensors: the weights do not name their classes, so they are matched with those of folder by number" in warning


@pytest.mark.parametrize("where", ["directory", "s3"])
def test_weights_are_read_from_a_store(where, trained, tmp_path, request):
    if where == "s3":
        request.getfixturevalue("s3_environment")
    uri = "s3://rrn-test/models" if where == "s3" else (tmp_path / "store").as_uri()
    body = (trained[0] / "model.safetensors").read_bytes()
    open_store(uri).write("sweep/trial/checkpoints/00000002-1/model.safetensors", body)
    assert read_weights(f"{uri}/sweep/trial/checkpoints/00000002-1") == body
    assert read_weights(f"{uri}/sweep/trial/checkpoints/00000002-1/model.safetensors") == body
    with pytest.raises(SweepError, match=r"00000003-1: 00000003-1/model\.safetensors is not in the store; expected"):
        read_weights(f"{uri}/sweep/trial/checkpoints/00000003-1")


def test_what_a_user_can_fix_is_reported_in_one_line(trained, pictures, tmp_path):
    folder = str(trained[0])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    faults = {
        r"nothing: no such file; expected weights": lambda: evaluate_checkpoint(str(tmp_path / "nothing"), ONE_THREAD),
        r"dataset camvid: no data root": lambda: evaluate_checkpoint(folder, ONE_THREAD, changes={"dataset": "camvid"}),
        r"crop: Input should be .* got 1": lambda: evaluate_checkpoint(folder, ONE_THREAD, changes={"crop": 1}),
        r"stride: must be 1\.\.64": lambda: evaluate_checkpoint(folder, ONE_THREAD, stride=99),
        r"broken\.jpg: not a readable image": lambda: predict_images(folder, [broken], tmp_path / "out", ONE_THREAD),
        r"out\.pth: expected a name that ends": lambda: import_weights(released(tmp_path), tmp_path / "out.pth"),
        r"broken\.jpg: not a torch checkpoint": lambda: import_weights(broken, tmp_path / "out.safetensors"),
        r"11 classes \(background, .*21 classes.*; name": lambda: evaluate_checkpoint(folder, voc(tmp_path), changes={"dataset": "voc"}),
    }
    for pattern, attempt in faults.items():
        with pytest.raises(SweepError, match=pattern) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_the_commands_load_without_torch():
    code = "import sys, orchestration.inference; print(sorted({'torch', 'cv2', 'boto3', 'rich'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def voc(tmp_path: Path) -> Runtime:
    """The smallest VOC: one training and one validation image."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name, lists in (("a", ("train", "train_aug", "trainaug")), ("b", ("val",))):
        Image.new("RGB", (70, 70)).save(root / "JPEGImages" / f"{name}.jpg")
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            Image.new("L", (70, 70)).save(root / folder / f"{name}.png")
        for written in lists:
            (root / "ImageSets" / "Segmentation" / f"{written}.txt").write_text(f"{name}\n")
    return ONE_THREAD.model_copy(update={"data_root": tmp_path})
