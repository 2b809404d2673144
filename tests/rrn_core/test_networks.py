"""The networks against the reference numbers, and the contracts that other modules rely on."""

from __future__ import annotations

import contextlib
import zlib
from functools import partial

import golden
import numpy as np
import pytest
import torch

from rrn_core import ConfigError, configure
from rrn_core.methods import build_networks
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.discriminators import Discriminator

MAPS = ("backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4", "head.aspp", "head")
SIZES = {"65x65": (11, 65, 65), "96x128": (21, 96, 128)}
"""Seed of the image and its height and width; the label's seed is one more."""


def config(**settings):
    return configure("digits", **{"scales": (1.0,), **settings})


@pytest.fixture(scope="module")
def resnet50_branch():
    return golden.fill(Branch("resnet50", 21), "branch1.").double()


def test_the_recipe_rebuilds_the_reference_inputs():
    keys = golden.load_json("keys")
    shapes = keys["network"] | {f"D1.{key}": shape for key, shape in keys["disc_image_voc"].items()}
    shapes |= {f"DP.{key}": shape for key, shape in keys["disc_patch_voc"].items()}
    for key, check in keys["fill_check"].items():
        assert zlib.crc32(golden.parameter(key, tuple(shapes[key])).tobytes()) == check["crc32_of_float32_bytes"]
    image, label = (keys["input_check"][key]["crc32"] for key in ("make_image(1001,2,320,320)", "make_label(1002,2,320,320) as uint8"))
    assert zlib.crc32(golden.make_image(1001, 2, 320, 320).numpy().tobytes()) == image
    assert zlib.crc32(golden.make_label(1002, 2, 320, 320).numpy().astype(np.uint8).tobytes()) == label


def test_resnet50_quartet_loads_released_weights_unmapped():
    expected = golden.load_json("keys")
    with torch.device("meta"):
        branch = Branch("resnet50", 21)
    ours = {f"{name}.{key}": list(value.shape) for name in ("branch1", "branch2") for key, value in branch.state_dict().items()}
    assert ours == expected["network"]
    assert sum(parameter.numel() for parameter in branch.parameters()) == expected["trainable"]["one_branch"]


@pytest.mark.parametrize("kind", ["image", "patch", "pixel"])
def test_discriminators_have_the_released_names_without_unused_parameters(kind):
    expected = golden.load_json("keys")[f"disc_{kind}_voc"]
    if kind != "image":
        expected = {key: shape for key, shape in expected.items() if not key.startswith("fc.")}
    ours = {key: list(value.shape) for key, value in Discriminator(21, kind=kind).state_dict().items()}
    assert ours == expected


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_resnet50_branch_equals_the_release(resnet50_branch, mode, size):
    expected = golden.load(f"segnet_{mode}")
    branch = golden.fill(resnet50_branch, "branch1.").train(mode == "train")
    branch.zero_grad()
    seed, height, width = SIZES[size]
    logits, maps = _run_recorded(branch, MAPS, golden.amp(golden.make_image(seed, 2, height, width)).double())
    ce = torch.nn.functional.cross_entropy(logits, golden.make_label(seed + 1, 2, height, width), ignore_index=255)
    ce.backward()

    np.testing.assert_allclose(logits.detach(), expected[f"{size}.logits"], rtol=2e-7, atol=2e-7)
    assert ce.item() == pytest.approx(expected[f"{size}.ce"].item(), rel=1e-9)
    for name in MAPS:
        assert list(maps[name].shape) == expected[f"{size}.feat.{name}.shape"].tolist()
        np.testing.assert_allclose(golden.summary(maps[name])[:2], expected[f"{size}.feat.{name}.mean_std"], rtol=1e-9)
    np.testing.assert_allclose(maps["head"].mean(dim=(0, 2, 3)), expected[f"{size}.v3plus.channel_mean"], rtol=1e-8)
    gradients = {key: parameter.grad.norm().item() for key, parameter in branch.named_parameters()}
    np.testing.assert_allclose([gradients[key] for key in expected["param_keys"]], expected[f"{size}.gradnorm"], rtol=1e-7, atol=1e-12)
    if mode == "train":
        buffers = dict(branch.named_buffers())
        rows = np.stack([golden.summary(buffers[key]) for key in expected["buffer_keys"]])
        np.testing.assert_allclose(rows, expected[f"{size}.running_after"], rtol=1e-8, atol=1e-12)


def test_resnet50_branch_in_float32_stays_within_the_measured_deviation(resnet50_branch):
    expected = golden.load("segnet_train")
    branch = golden.fill(Branch("resnet50", 21), "branch1.").train()
    logits = branch(golden.amp(golden.make_image(11, 2, 65, 65)))
    assert logits.dtype == torch.float32
    assert np.abs(logits.detach().numpy() - expected["65x65.logits"]).max() < 5 * expected["65x65.f32_maxabs_logit_diff"]


def test_odd_sizes_in_evaluation_equal_the_release(resnet50_branch):
    expected = golden.load("segnet_eval")
    branch = golden.fill(resnet50_branch, "branch1.").eval()
    with torch.no_grad():
        logits = branch(golden.make_image(31, 1, 289, 321).double())
    np.testing.assert_allclose(logits[..., ::8, ::8], expected["289x321.logits_every8"], rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(golden.summary(logits)[:2], expected["289x321.mean_std"], rtol=1e-8)


def test_the_mean_of_both_branches_equals_the_released_ensemble(resnet50_branch):
    expected = golden.load("segnet_eval")
    images = golden.amp(golden.make_image(11, 2, 65, 65)).double()
    with torch.no_grad():
        both = [golden.fill(resnet50_branch, f"{name}.").eval()(images) for name in ("branch1", "branch2")]
    np.testing.assert_allclose(sum(both) / 2, expected["65x65.ensemble_logits"], rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(
    ("case", "seed", "n", "height", "width", "classes", "pool"),
    [
        ("512x512", 21, 2, 512, 512, 21, 20),
        ("320x320", 23, 2, 320, 320, 21, 20),
        ("cityscapes_pool_256x512", 25, 1, 256, 512, 21, (16, 32)),
    ],
)
def test_image_discriminator_equals_the_release(case, seed, n, height, width, classes, pool):
    expected = golden.load("disc_image")
    net = golden.fill(Discriminator(classes, kind="image", pool=pool), "D1.").double().eval()
    score, feature = _judge(net, golden.discriminator_pairs(seed, n, height, width, classes))
    np.testing.assert_allclose(score.sigmoid(), expected[f"{case}.out"], rtol=1e-9)
    np.testing.assert_allclose(feature, expected[f"{case}.feat"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "seed", "n", "side", "regions", "pool"),
    [("512x512", 21, 2, 512, 3, 20), ("320x320", 23, 2, 320, 2, 20), ("cityscapes_800x800", 27, 1, 800, 5, 50)],
)
def test_patch_discriminator_equals_the_release(case, seed, n, side, regions, pool):
    expected = golden.load("disc_patch")
    net = golden.fill(Discriminator(21, kind="patch", pool=pool), "DP.").double().eval()
    score, feature = _judge(net, golden.discriminator_pairs(seed, n, side, side))
    assert score.shape == (n, 1, regions, regions)
    np.testing.assert_allclose(score.sigmoid(), expected[f"{case}.out"], rtol=1e-9)
    np.testing.assert_allclose(feature, expected[f"{case}.feat"], rtol=1e-8, atol=1e-12)


def test_pixel_discriminator_equals_the_release():
    expected = golden.load("disc_patch")
    net = golden.fill(Discriminator(21, kind="pixel"), "DX.").double().eval()
    score, feature = _judge(net, golden.discriminator_pairs(21, 2, 512, 512))
    assert score.shape == (2, 1, 512, 512)
    np.testing.assert_allclose(score[..., ::16, ::16].sigmoid(), expected["pixel.512x512.out.every16"], rtol=1e-9)
    np.testing.assert_allclose(feature, expected["pixel.512x512.feat"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("side", "regions"), [(512, 3), (800, 5), (320, 2)])
def test_a_crop_has_as_many_regions_as_fit(side, regions):
    with torch.device("meta"):
        score, feature = Discriminator(21, kind="patch", width=2, pool=side // 16)(torch.empty(1, 24, side, side))
    assert score.shape == (1, 1, regions, regions)
    assert feature.shape == (1, 16, 1, 1)


@pytest.mark.parametrize("backbone", ["tiny", "resnet18", "resnet50", "resnet101"])
def test_every_backbone_gives_logits_of_the_image_size(backbone):
    with torch.device("meta"):
        branch = Branch(backbone, 5)
        assert branch(torch.empty(2, 3, 96, 64)).shape == (2, 5, 96, 64)
        fine, coarse = branch.backbone(torch.empty(2, 3, 96, 64))
    assert fine.shape[-2:] == (24, 16)
    assert coarse.shape[-2:] == (6, 4)


def test_an_unknown_backbone_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="choose tiny, resnet18"):
        Branch("vgg", 5)


def test_branches_start_with_equal_backbones_and_different_heads():
    quartet = build_networks(config(seed=3), 11)
    first, second = quartet.branch1.state_dict(), quartet.branch2.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("backbone."))
    weights = [key for key in first if not key.startswith("backbone.") and first[key].ndim > 1]
    assert not any(torch.equal(first[key], second[key]) for key in weights)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_networks(config(seed=3), 11).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again, other = build_networks(config(seed=3), 11).state_dict(), build_networks(config(seed=4), 11).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["branch1.classifier.weight"], other["branch1.classifier.weight"])


@pytest.mark.parametrize("method", ["supervised", "cps"])
def test_only_the_full_method_has_discriminators(method):
    quartet = build_networks(config(method=method), 11)
    assert quartet.D1 is None
    assert quartet.D2 is None
    assert not any(key.startswith("D") for key in quartet.state_dict())


def test_heads_are_drawn_he_normal_and_normalisation_starts_neutral():
    branch = Branch("resnet18", 21)
    weight = branch.head.last_conv[0].weight
    assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.01)
    norms = [layer for layer in branch.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert all((layer.weight == 1).all() and (layer.bias == 0).all() for layer in norms)
    assert {(layer.eps, layer.momentum) for layer in norms} == {(1e-5, 0.1)}


def _judge(net, pairs):
    with torch.no_grad():
        return net(pairs)


def _run_recorded(branch, names, images):
    """Logits, and the outputs of the named modules by name."""
    maps = {}
    with contextlib.ExitStack() as hooks:
        for name in names:
            keep = partial(lambda name, _module, _inputs, output: maps.update({name: output.detach()}), name)
            hooks.callback(branch.get_submodule(name).register_forward_hook(keep).remove)
        return branch(images), maps
