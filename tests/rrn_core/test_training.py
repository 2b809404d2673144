"""training.py and state.py: real training on small scenes; interrupted equals uninterrupted, and nothing is a dead knob."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import digits
from own_data import make_folder
from PIL import Image

from rrn_core import PRESETS, CheckpointError, DataError, Runtime, TrainConfig, configure, train
from rrn_core.data.dataset import open_dataset
from rrn_core.evaluate import confusion, miou
from rrn_core.methods import METHODS, settings_class
from rrn_core.state import STATE, WEIGHTS
from rrn_core.weights import header_of, load_tensors, unpack

SMALL = {"train_images": 32, "val_images": 4, "batch_size": 4, "epochs": 2, "partition": "1/4", "region_loss_from_epoch": 0}
ONE_THREAD = Runtime(device="cpu", threads=1)


def config(**settings: Any) -> TrainConfig:
    return digits(SMALL, **settings)


def final(reports) -> tuple[dict[str, float], dict[str, bytes]]:
    *_, last = reports
    return last.metrics, last.state.to_files()


@pytest.fixture(scope="module")
def saved() -> dict[str, bytes]:
    """The files of a checkpoint."""
    return final(train(config(epochs=1), ONE_THREAD))[1]


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_every_epoch_reports_what_the_method_is_judged_by():
    reports = list(train(config(), ONE_THREAD))
    assert [report.epoch for report in reports] == [1, 2]
    assert [report.iteration for report in reports] == [6, 12]
    metrics = reports[-1].metrics
    for name in (
        *(f"train/{name}" for name in ("loss", "loss_sup", "loss_cps", "loss_dr", "loss_f", "loss_d1", "loss_d2", "lr")),
        *(f"train/{name}" for name in ("selected1", "selected2", "d1_real", "d1_fake", "d2_real", "d2_fake")),
        *(f"val/{name}" for name in ("miou", "miou_branch1", "miou_branch2", "miou_ensemble")),
        *(f"val/iou_{head}/background" for head in ("branch1", "branch2", "ensemble")),
        *("perf/images_per_s", "perf/peak_memory_mb", "perf/train_s", "perf/eval_s"),
    ):
        assert math.isfinite(metrics[name]), name
    c = config()
    total = metrics["train/loss_sup"] + c.lambda1 * metrics["train/loss_cps"]
    total += c.lambda2 * metrics["train/loss_dr"] + c.lambda3 * metrics["train/loss_f"]
    assert metrics["train/loss"] == pytest.approx(total, rel=1e-5)
    assert {"train/pseudo_accuracy_inside", "train/pseudo_accuracy_outside"} & set(metrics)


def test_an_epoch_reports_the_confusion_of_the_head_that_counts_and_its_data():
    for ensemble, head in (("none", "branch1"), ("logits", "ensemble")):
        runtime = ONE_THREAD.model_copy(update={"progress_every": 3})
        within, at_end = train(config(epochs=1, ensemble=ensemble), runtime)
        assert within.confusion is None
        assert miou(at_end.confusion) == at_end.metrics["val/miou"] == at_end.metrics[f"val/miou_{head}"]
        labels = [at_end.data.val[i][1] for i in range(len(at_end.data.val))]
        truth = np.bincount(np.concatenate(labels, axis=None), minlength=256)[:11]
        assert at_end.confusion.sum(dim=1).tolist() == truth.tolist()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_does_not():
    first, second, other = (final(train(config(seed=seed), ONE_THREAD)) for seed in (1, 1, 2))
    assert without_time(first[0]) == without_time(second[0])
    assert first[1][WEIGHTS] == second[1][WEIGHTS]
    assert first[1][WEIGHTS] != other[1][WEIGHTS]


@pytest.mark.parametrize("method", ["supervised", "cps", "rrn"])
@pytest.mark.parametrize("stop", [2, 6, 8], ids=["in the first epoch", "between epochs", "in the second epoch"])
@pytest.mark.slow
def test_an_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(method, stop):
    runtime = ONE_THREAD.model_copy(update={"progress_every": 2})
    whole = final(train(config(method=method), runtime))
    files = next(report.state.to_files() for report in train(config(method=method), runtime) if report.iteration == stop)
    scramble_random_states()
    resumed = final(train(config(method=method), runtime, resume_from=files))
    assert without_time(resumed[0]) == without_time(whole[0])
    assert resumed[1][WEIGHTS] == whole[1][WEIGHTS]
    assert_same(load_tensors(resumed[1][STATE]), load_tensors(whole[1][STATE]))
    numbers, resumed_numbers = (json.loads(header_of(files[STATE])["rrn-sweep-state"]) for files in (whole[1], resumed[1]))
    untimed = {"seconds": 0, "sha256": ""}
    assert resumed_numbers | untimed == numbers | untimed


@pytest.mark.parametrize("stop", [2, 7])
@pytest.mark.slow
def test_an_interrupted_run_that_accumulates_gradients_equals_the_uninterrupted_one_bit_for_bit(stop):
    settings = {"accumulate": 2, "train_images": 28}  # 5 iterations an epoch: groups of 2, 2 and 1
    runtime = ONE_THREAD.model_copy(update={"progress_every": 1})
    whole = final(train(config(**settings), runtime))
    files = next(report.state.to_files() for report in train(config(**settings), runtime) if report.iteration == stop)
    scramble_random_states()
    resumed = final(train(config(**settings), runtime, resume_from=files))
    assert without_time(resumed[0]) == without_time(whole[0])
    assert resumed[1][WEIGHTS] == whole[1][WEIGHTS]


@pytest.mark.parametrize(("every", "reported"), [(1, [2, 4, 5, 7, 9, 10]), (3, [4, 5, 9, 10]), (None, [5, 10])])
def test_reports_wait_for_the_end_of_a_group_of_accumulated_gradients(every, reported):
    runtime = ONE_THREAD.model_copy(update={"progress_every": every})
    reports = train(config(method="supervised", accumulate=2, train_images=28), runtime)
    assert [report.iteration for report in reports] == reported


def test_accumulated_gradients_make_one_optimiser_step_a_group():
    *_, last = train(config(accumulate=2, train_images=28), ONE_THREAD)
    steps = {value["step"].item() for value in last.state.optimisers.by_name["optD1"].state.values()}
    assert steps == {2 * 3}


def scramble_random_states() -> None:
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def test_batches_prepared_by_worker_processes_change_nothing():
    alone = final(train(config(epochs=1), ONE_THREAD))
    helped = final(train(config(epochs=1), ONE_THREAD.model_copy(update={"workers": 2})))
    assert helped[1][WEIGHTS] == alone[1][WEIGHTS]


@pytest.mark.slow
def test_a_checkpoint_in_a_directory_resumes_as_well(tmp_path):
    reports = train(config(), ONE_THREAD)
    next(reports).state.save(tmp_path / "checkpoint")
    rest = [report.epoch for report in train(config(), ONE_THREAD, resume_from=tmp_path / "checkpoint")]
    assert rest == [2]


def test_a_finished_checkpoint_yields_nothing_more():
    files = final(train(config(epochs=1), ONE_THREAD))[1]
    assert list(train(config(epochs=1), ONE_THREAD, resume_from=files)) == []


def test_a_checkpoint_of_another_run_is_refused():
    files = final(train(config(epochs=1), ONE_THREAD))[1]
    with pytest.raises(CheckpointError, match="belongs to run"):
        next(train(config(epochs=1, eps=0.7), ONE_THREAD, resume_from=files))


def test_a_run_whose_classes_were_renumbered_does_not_resume(tmp_path):
    root = make_folder(tmp_path / "data")
    settings = {"dataset": "folder", "partition": "1/2", "epochs": 1, "batch_size": 2, "crop": 64}
    chosen = config(**settings)
    runtime = ONE_THREAD.model_copy(update={"data_root": root})
    files = final(train(chosen, runtime))[1]
    assert unpack(files[WEIGHTS])[1].classes == ("background", "thing")
    for classes, told in (
        ("[thing, background]\nvalues: [1, 0]", "class 0 was background and is thing"),
        ("[background, object]", r"for 2 classes \(background, thing\), the data have 2 classes \(background, object\)"),
    ):
        (root / "dataset.yaml").write_text(f"classes: {classes}\n")
        with pytest.raises(DataError, match=told):
            list(train(chosen, runtime, resume_from=files))


@pytest.mark.parametrize(
    ("name", "body", "told"),
    [
        (WEIGHTS, None, "incomplete: model.safetensors missing"),
        (STATE, None, "incomplete: state.safetensors missing"),
        (STATE, b"", "state.safetensors is damaged"),
        (STATE, b"\x08\0\0\0\0\0\0\0{broken}", "state.safetensors is damaged"),
        (STATE, b"\x02\0\0\0\0\0\0\0{}", "state.safetensors is damaged"),
        ("state.pt", b"old", "saved by an earlier release as state.pt"),
    ],
)
def test_a_folder_that_is_no_whole_checkpoint_is_refused_in_one_line(tmp_path, saved, name, body, told):
    for file, contents in saved.items():
        (tmp_path / file).write_bytes(contents)
    if name not in saved:
        (tmp_path / STATE).unlink()
    (tmp_path / name).unlink(missing_ok=True) if body is None else (tmp_path / name).write_bytes(body)
    with pytest.raises(CheckpointError, match=told) as caught:
        next(train(config(epochs=1), ONE_THREAD, resume_from=tmp_path))
    assert "Error" not in str(caught.value)
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was executed",))


@pytest.mark.parametrize("body", [b"", b"rubbish", pickle.dumps(Bomb())], ids=["empty", "rubbish", "a pickle that would execute"])
@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_a_damaged_checkpoint_is_refused_and_never_executed(name, body):
    files = final(train(config(epochs=1), ONE_THREAD))[1]
    with pytest.raises(CheckpointError, match="cannot be read"):
        next(train(config(epochs=1), ONE_THREAD, resume_from=files | {name: body}))


def test_a_diverging_run_says_so():
    with pytest.raises(FloatingPointError, match="diverged: loss"):
        list(train(config(lr=1e9, warmup_epochs=0, epochs=5), ONE_THREAD))
    with pytest.raises(FloatingPointError, match=r"not finite at iteration \d+ to \d+; lower"):
        list(train(config(lr=1e9, warmup_epochs=0, epochs=5), ONE_THREAD.model_copy(update={"progress_every": 2})))


def test_camvid_without_a_folder_is_refused_in_one_line():
    with pytest.raises(DataError, match="data") as caught:
        next(train(config(dataset="camvid"), ONE_THREAD))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_setting_is_read(method, tmp_path):
    """A field that nothing reads is a knob that sweeps nothing."""
    kind, read = settings_class(method), set()

    class Recording(kind):
        def __getattribute__(self, name: str) -> Any:
            if name in kind.model_fields:
                read.add(name)
            return super().__getattribute__(name)

    def recording(**settings: Any) -> TrainConfig:
        plain = config(epochs=1, method=method, **settings)
        recorder = Recording.model_construct(**dict(plain))
        read.clear()
        return recorder

    used: set[str] = set()
    weights = final(train(config(epochs=1), ONE_THREAD))[1][WEIGHTS]
    start = {"init_weights": "weights", "init_sha256": hashlib.sha256(weights).hexdigest()}
    in_files = ONE_THREAD.model_copy(update={"data_root": write_folder(tmp_path)})
    lists = {"dataset": "folder", "train_list": "all.txt", "partition_by": "list", "labeled_list": "all.txt", "unlabeled_list": "rest.txt"}
    partitions = [{"partition_by": "seeded"}, {"partition_by": "balanced"}]
    for settings in ({"warmup_epochs": 0}, *partitions, {"supervised_ce": "ohem"}, start, lists):
        list(train(recording(**settings), in_files, init_weights=weights))
        used |= read
    assert used == set(kind.model_fields)


def write_folder(root: Path) -> Path:
    """A data set of five images in files: a, b and v have labels, c and d have none."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for name, image in zip("abvcd", pixels, strict=True):
        Image.fromarray(image).save(root / "images" / f"{name}.png")
    for name in "abv":
        Image.fromarray(np.eye(64, dtype=np.uint8)).save(root / "masks" / f"{name}.png")
    (root / "dataset.yaml").write_text("classes: [background, line]")
    for file, names in (("val", "v"), ("all", "ab"), ("rest", "cd")):
        (root / f"{file}.txt").write_text("\n".join(names))
    return root


def test_the_paper_preset_is_the_defaults_and_the_released_one_differs_only_where_the_script_does():
    assert configure("paper") == configure()
    paper, released = (configure(name).model_dump() for name in ("paper", "released"))
    assert paper.keys() == released.keys()
    assert {name for name in paper if paper[name] != released[name]} == {"discriminator", "gate", "weight_decay"}


def test_the_cityscapes_preset_has_the_paper_s_pool_and_regions_of_an_800_px_crop():
    settings = configure(**PRESETS["cityscapes"])
    assert settings.pool_kernel == 50
    assert settings.conv4_side // settings.region_kernel == 5


@pytest.mark.slow
def test_the_digits_preset_learns_far_beyond_naming_everything_background():
    learning = configure("digits", partition="1/4")
    truth = open_dataset(learning, ONE_THREAD).val
    labels = [torch.from_numpy(truth[i][1]).long() for i in range(len(truth))]
    background = miou(sum(confusion(label, torch.zeros_like(label), 11) for label in labels))
    *_, last = train(learning, ONE_THREAD)
    assert last.metrics["val/miou_ensemble"] >= 2 * background
