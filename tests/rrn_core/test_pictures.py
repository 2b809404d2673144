"""pictures.py and picture_grid.py: what is drawn is what the networks say, as training asks them, and drawing changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from configs import digits
from test_evaluate import Grey

from rrn_core import Runtime, TrainConfig, train
from rrn_core.data.augment import normalise
from rrn_core.data.batch import Batch
from rrn_core.evaluate import HEADS, predict
from rrn_core.methods import build_networks
from rrn_core.methods.cps import MixedImages
from rrn_core.methods.rrn import discriminator_inputs, selections
from rrn_core.picture_grid import (
    BLANK,
    OUTLINE,
    PANEL,
    RIGHT,
    UNKNOWN,
    WRONG,
    GridRow,
    coloured,
    errors,
    fitted,
    heat,
    photograph,
    sheet,
    swatch,
)
from rrn_core.pictures import panels, spread, views
from rrn_core.state import STATE, WEIGHTS
from rrn_core.weights import load_tensors

CPU = torch.device("cpu")
SMALL = {"train_images": 32, "val_images": 5, "batch_size": 4, "epochs": 2, "partition": "1/4", "region_loss_from_epoch": 0}
PALETTE = ((0, 0, 0), (255, 0, 0), (0, 0, 255))


def config(**settings: Any) -> TrainConfig:
    return digits(SMALL, **settings)


def generators(files) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_tensors(files[STATE]).items() if name.startswith("random.")}


def random_images(count: int, size: tuple[int, int] = (64, 64)) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 200 + 10 * i, (*size, 3), dtype=np.uint8) for i in range(count)]


def after(settings: TrainConfig, *, drawn: bool) -> tuple[dict[str, float], dict[str, bytes]]:
    for report in train(settings, Runtime(device="cpu", threads=1)):
        if drawn:
            data = report.data
            panels(report.state.quartet, data.val, data.palette, data.classes, settings, CPU, indices=spread(3, len(data.val)))
    return {name: value for name, value in report.metrics.items() if not name.startswith("perf/")}, report.state.to_files()


@pytest.mark.parametrize("method", ["cps", "rrn"])
@pytest.mark.slow
def test_a_run_with_pictures_equals_one_without_bit_for_bit(method):
    (metrics, files), (plain_metrics, plain_files) = (after(config(method=method), drawn=drawn) for drawn in (True, False))
    assert metrics == plain_metrics
    assert files[WEIGHTS] == plain_files[WEIGHTS]
    random, plain_random = generators(files), generators(plain_files)
    assert random.keys() == plain_random.keys()
    assert all(torch.equal(state, plain_random[name]) for name, state in random.items())


def test_drawing_leaves_modes_gradients_and_random_state_as_they_were():
    settings = config()
    quartet = build_networks(settings, 3)
    quartet.branch1.eval()
    modes = [module.training for module in quartet.modules()]
    before, state = {name: value.clone() for name, value in quartet.state_dict().items()}, torch.get_rng_state()
    panels(quartet, Grey(), PALETTE, "abc", settings, CPU, indices=[0, 1])
    assert [module.training for module in quartet.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in quartet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in quartet.state_dict().items())


def test_modes_are_restored_after_a_failure():
    settings = config()
    quartet = build_networks(settings, 3)
    quartet.D2.forward = None
    with pytest.raises(TypeError):
        views(quartet, random_images(1), settings, CPU)
    assert all(module.training for module in quartet.modules())
    assert not torch.is_inference_mode_enabled()


ASKED = [
    {},
    {"discriminator_scaling": "per_image"},
    {"discriminator_scaling": "unnormalise", "gate": "gt"},
    {"region_upsample": "nearest"},
    {"region_upsample": "footprint", "region_kernel": 3},
    {"region_upsample": "threshold_first"},
    {"discriminator": "image"},
    {"discriminator": "pixel"},
]


@pytest.mark.parametrize("settings", ASKED, ids=str)
def test_a_region_map_is_what_the_discriminator_says_in_training(settings):
    asked = config(judge_dropout=False, eps=0.5, **settings)
    quartet, images = build_networks(asked, 3).eval(), random_images(3)
    batch = torch.from_numpy(np.stack([normalise(image) for image in images]))
    void = torch.full((3, 64, 64), 255)
    with torch.no_grad():
        mixed = MixedImages(batch, void, void, quartet.branch1(batch), quartet.branch2(batch), void)
        pairs = discriminator_inputs(mixed, Batch(batch, void, batch, batch, batch[:, :1], void, void), asked)
        scores = [judge(pair)[0] for judge, pair in zip(quartet.discriminators(), (pairs.predicted1, pairs.predicted2), strict=True)]
    seen = views(quartet.train(), images, asked, CPU)
    for k, score in enumerate(scores):
        own = selections(score, None, asked, size=torch.Size((64, 64)))[1]
        rc = score.sigmoid().flatten(1)
        for i, view in enumerate(seen):
            assert np.array_equal(view.selected[k], own[i].numpy())
            assert view.rc[k].shape == (64, 64)
            assert rc[i].min() - 1e-6 <= view.rc[k][view.rc[k] > 0].min() <= view.rc[k].max() <= rc[i].max() + 1e-6
            if asked.region_upsample != "threshold_first":
                assert np.array_equal(view.selected[k], view.rc[k] >= 0.5)


@pytest.mark.parametrize("size", [(64, 64), (40, 50), (70, 90), (64, 150)])
@pytest.mark.parametrize("ensemble", ["none", "prob"])
def test_predictions_are_those_of_the_evaluation_whatever_the_size(size, ensemble):
    settings = config(ensemble=ensemble, eval_batch=3)
    quartet, images = build_networks(settings, 3), random_images(2, size)
    for image, view in zip(images, views(quartet, images, settings, CPU), strict=True):
        head = HEADS.index("branch1" if ensemble == "none" else "ensemble")
        assert np.array_equal(view.labels[head], predict(quartet, image, settings, CPU))
        assert view.labels.shape == (3, *size)
        assert view.rc.shape == view.selected.shape == (2, *size)


def test_where_windows_overlap_a_region_map_is_their_mean():
    settings = config(discriminator_scaling="unnormalise")
    quartet, (image,) = build_networks(settings, 3), random_images(1, (64, 100))
    (whole,) = views(quartet, [image], settings, CPU)
    left, right = views(quartet, [image[:, :64], image[:, 36:]], settings, CPU)
    np.testing.assert_allclose(whole.rc[..., :36], left.rc[..., :36], atol=1e-6)
    np.testing.assert_allclose(whole.rc[..., 64:], right.rc[..., 28:], atol=1e-6)
    np.testing.assert_allclose(whole.rc[..., 36:64], (left.rc[..., 36:] + right.rc[..., :28]) / 2, atol=1e-6)


def test_a_row_shows_image_truth_three_predictions_two_region_maps_and_errors():
    settings = config(ensemble="none", eps=0.45)
    quartet, images = build_networks(settings, 3), Grey()
    picture = panels(quartet, images, PALETTE, "abc", settings, CPU, indices=[1])
    image, truth = images[1]
    (view,) = views(quartet, [image], settings, CPU)
    labels = [coloured(label, PALETTE) for label in (truth, *view.labels)]
    regions = [heat(rc, selected) for rc, selected in zip(view.rc, view.selected, strict=True)]
    expected = [photograph(image), *labels, *regions, errors(view.labels[0], truth)]
    height, width = fitted(truth.shape)
    left, step = picture.shape[1] % (width + 6), width + 6
    for i, panel in enumerate(expected):
        shown = picture[32 : 32 + height - 25, left + step * i : left + step * i + width]  # without the captions at its foot
        assert np.array_equal(shown, panel[: height - 25]), i


@pytest.mark.parametrize("method", ["supervised", "cps"])
def test_methods_without_discriminators_have_no_region_maps(method):
    widths = {}
    for name in (method, "rrn"):
        settings = config(method=name)
        widths[name] = panels(build_networks(settings, 3), Grey(), PALETTE, "abc", settings, CPU, indices=[0, 1]).shape[1]
    assert widths["rrn"] - widths[method] == 2 * (fitted((70, 93))[1] + 6)


def test_images_are_spread_evenly_over_the_list():
    assert spread(4, 64) == [8, 24, 40, 56]
    assert spread(4, 3) == [0, 1, 2]
    assert spread(3, 3) == [0, 1, 2]
    assert spread(0, 9) == spread(4, 0) == []
    assert all(len(set(spread(n, 101))) == n for n in range(102))


@pytest.mark.parametrize(
    ("size", "panel"),
    [((64, 64), (256, 256)), ((360, 480), (192, 256)), ((1024, 2048), (128, 256)), ((500, 375), (256, 192)), ((100, 90), (200, 180))],
)
def test_a_panel_has_no_side_above_its_bound(size, panel):
    assert fitted(size) == panel
    assert max(fitted((1, 5000))) == PANEL


def test_right_is_grey_wrong_is_vermilion_and_void_black():
    truth, predicted = np.array([[0, 1], [2, 255]]), np.array([[0, 2], [2, 1]])
    panel = errors(predicted, truth)
    assert [tuple(panel[y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))] == [RIGHT, WRONG, RIGHT, UNKNOWN]
    assert tuple(coloured(truth, PALETTE)[-1, -1]) == BLANK
    assert tuple(coloured(truth, PALETTE)[0, -1]) == PALETTE[1]


def test_a_map_gets_brighter_with_its_values_and_its_selection_is_outlined():
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    brightness = heat(ramp)[0].astype(int) @ (299, 587, 114)
    assert (np.diff(brightness) >= -1500).all()  # as good as monotonic, in steps of 8 bits
    assert brightness[-1] > 4 * brightness[0]
    outlined = (heat(ramp, ramp >= 0.5) == OUTLINE).all(axis=2)
    columns = np.flatnonzero(outlined.any(axis=0))
    assert outlined[:, columns].all()
    assert columns.tolist() == [PANEL // 2]


def test_a_sheet_takes_names_of_any_length_many_classes_and_images_of_different_sizes():
    rows = [
        GridRow("a_name_that_is_much_longer_than_its_row" * 5, (swatch(WRONG), swatch(RIGHT))),
        GridRow("b", tuple(random_images(2, (64, 40)))),
    ]
    many = [(f"class number {k}", swatch(WRONG)) for k in range(150)]
    few, all_of_them = (sheet(rows, ["left", "right, and much longer"], [key]) for key in (many[:1], many))
    assert few.shape[1] == all_of_them.shape[1]
    assert all_of_them.shape[0] > few.shape[0] + 500
    assert few.dtype == np.uint8
