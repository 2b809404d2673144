"""Every term against the release's numbers, hand-made cases and its promises at the edges."""

from __future__ import annotations

from functools import partial

import golden
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from rrn_core import configure, losses
from rrn_core.methods.cps import MixedImages, cps_term
from rrn_core.methods.rrn import Verdict, discriminator_inputs, region_loss, region_terms, selections, total_loss

SCENARIOS = ("mix", "none", "ownonly", "all", "eps0.3", "eps0.5", "eps0.7", "eps0.9")
RELEASED = configure("released")


@pytest.fixture(scope="module")
def arrays():
    return {key: torch.from_numpy(value) for key, value in golden.load("losses").items() if value.dtype.kind != "U"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_term_and_its_gradient_equal_the_release(arrays, scenario):
    epoch, eps, cps_weight = arrays[f"{scenario}.cfg"].tolist()
    config = RELEASED.model_copy(update={"eps": eps, "lambda1": cps_weight})
    logits = {key: arrays[f"logits.{key}"].double().requires_grad_() for key in ("stu1", "stu2", "sup1", "sup2")}
    features = {key: arrays[f"feat.{key}"].double().requires_grad_() for key in ("D1.pred1", "D2.pred2", "D1.gt", "D2.gt")}
    verdicts = _verdicts(arrays[f"{scenario}.scores"].double(), logits, features, config)
    label1, label2 = (arrays[f"ps_label_{i}"].long() for i in (1, 2))
    mixed = MixedImages(arrays["mixed"], label1, label2, logits["stu1"], logits["stu2"], label1)
    sups = [losses.supervised_loss(logits[key], arrays["gts"]) for key in ("sup1", "sup2")]
    terms = {"loss_sup": sups[0] + sups[1], "loss_cps": cps_term(mixed, logits["sup1"], logits["sup2"], config)}
    terms |= region_terms(verdicts, config, epoch=int(epoch))
    loss = total_loss(terms, config)
    loss.backward()

    def check(value, name):
        np.testing.assert_allclose(value.detach(), arrays[f"{scenario}.{name}"], rtol=1e-9, atol=1e-15)

    check(loss, "loss")
    check(sups[0], "loss_sup")
    check(sups[1], "loss_sup_r")
    check(cps_weight * terms["loss_cps"], "cps_loss")
    for i, verdict in enumerate(verdicts, start=1):
        check(region_loss(verdict, config), f"loss_st_{i}")
        matching = losses.feature_matching_loss(verdict.feature_labeled, verdict.feature, reduction="mean")
        check(matching, f"loss_fm_branch{i}")
        check(config.lambda3 * matching + config.lambda2 * region_loss(verdict, config), f"loss_adv{i}")
        assert verdict.share.item() * 4 == arrays[f"{scenario}.count{i}"].item()
    for key, tensor in logits.items():
        check(tensor.grad.norm(), f"gradnorm.{key}")
    if scenario == "mix":
        for key, tensor in logits.items():
            np.testing.assert_allclose(tensor.grad, arrays[f"mix.grad.{key}"], rtol=1e-6, atol=1e-10)
    for key in ("D1.pred1", "D2.pred2"):
        np.testing.assert_allclose(features[key].grad, arrays[f"{scenario}.gradfeat.{key}"], rtol=1e-6)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_discriminators_losses_and_gradients_equal_the_release(arrays, scenario):
    rows = arrays[f"{scenario}.scores"].double().unsqueeze(-1)
    for i, row, fake_name in ((1, rows[0], "a2"), (2, rows[2], "c2")):
        fake, real = row.clone().requires_grad_(), arrays[f"score.D{i}.gt"].double().unsqueeze(-1).requires_grad_()
        loss = losses.discriminator_loss(fake.logit(), real.logit())
        loss.backward()
        assert loss.item() == pytest.approx(arrays[f"{scenario}.loss_D{i}"].item(), rel=1e-9)
        np.testing.assert_allclose(fake.grad, arrays[f"{scenario}.gradscore.{fake_name}"], rtol=1e-9)
        np.testing.assert_allclose(real.grad, arrays[f"{scenario}.gradscore.g{i}"], rtol=1e-9)


def test_teachers_labels_and_the_mix_equal_the_release(arrays):
    pasted = arrays["mask"].bool()
    assert torch.equal(torch.where(pasted, arrays["u1"], arrays["u0"]), arrays["mixed"])
    for i in (1, 2):
        label0, label1 = (arrays[f"logits.tea{i}_{u}"].argmax(dim=1) for u in ("u0", "u1"))
        assert torch.equal(torch.where(pasted[:, 0], label1, label0), arrays[f"ps_label_{i}"].long())
        logits = arrays[f"logits.tea{i}_u0"] * (1 - arrays["mask"]) + arrays[f"logits.tea{i}_u1"] * arrays["mask"]
        assert torch.equal(logits.argmax(dim=1), arrays[f"ps_label_{i}"].long())


def test_cross_pseudo_supervision_equals_the_release(arrays):
    z1, z2, label1, label2 = (arrays[key] for key in ("logits.stu1", "logits.stu2", "ps_label_1", "ps_label_2"))
    expected = arrays["cps.stu1_vs_ps2"] + arrays["cps.stu2_vs_ps1"]
    assert losses.cps_loss(z1.double(), z2.double(), label1.long(), label2.long()).item() == pytest.approx(expected.item(), rel=1e-9)


def test_inputs_of_the_discriminators_equal_the_release(arrays):
    z1, z2, mixed = arrays["logits.stu1"].double(), arrays["logits.stu2"].double(), arrays["mixed"].double()
    pairs = discriminator_inputs(MixedImages(mixed, None, None, z1, z2, None), _Labeled(arrays["imgs"].double(), arrays["gts"]), RELEASED)
    for ours, name in ((pairs.predicted1, "D1.in.pred1"), (pairs.predicted2, "D2.in.pred2"), (pairs.labeled, "D1.in.gt")):
        np.testing.assert_allclose(ours, arrays[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [0.3, 0.5, 0.6, 0.7, 0.9])
def test_local_selection_equals_the_release_at_every_threshold(arrays, eps):
    z, rc = arrays["logits.stu1"].double(), arrays["find_good_maps.scores"].double().unsqueeze(-1)
    mask = _mask(rc, (16, 16), eps=eps, gate="gt")
    loss = losses.local_selection_loss(losses.pixel_cross_entropy(z, z.argmax(dim=1)), mask)
    count, expected = arrays[f"find_good_maps.eps{eps}"].tolist()
    assert mask.flatten(1).all(dim=1).sum().item() == count
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_a_float32_score_of_exactly_eps_passes_only_the_papers_gate(arrays):
    scores = arrays["boundary32.scores"]
    assert losses.select(scores, eps=0.6, gate="gt").sum() == arrays["boundary32.count"]
    assert losses.select(scores, eps=0.6, gate="ge").sum() == arrays["boundary32.count"] + 1


def test_the_up_sampled_region_map_equals_the_release():
    expected = golden.load("disc_patch")
    rc = torch.from_numpy(expected["512x512.out"])
    up = []
    _mask(rc, (512, 512), gate=lambda maps: up.append(maps) or maps > 0)
    np.testing.assert_allclose(up[0][..., ::16, ::16], expected["512x512.up.every16"], rtol=1e-9)
    median, count = expected["512x512.up.count_ge_median"].tolist()
    assert abs(_mask(rc, (512, 512), eps=median).sum().item() - count) <= 2


@pytest.mark.parametrize("upsample", ["bilinear", "nearest", "footprint", "threshold_first"])
@pytest.mark.parametrize("cell", [1, 8, 32])
def test_a_map_of_one_score_or_of_every_pixel_is_kept_whatever_the_upsampling(upsample, cell):
    rc = torch.tensor([[0.7], [0.5]])
    assert _mask(rc, (8, 8), upsample=upsample, cell=max(cell, 8)).flatten(1).float().mean(dim=1).tolist() == [1, 0]
    pixels = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_mask(pixels, (8, 8), upsample=upsample, cell=1), pixels[:, 0] >= 0.6)


def test_footprint_selects_true_cells_and_nothing_beyond_the_last():
    rc = torch.tensor([[[[0.9, 0.1], [0.1, 0.9]]]])
    mask = _mask(rc, (10, 10), upsample="footprint", cell=4)[0]
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[:4, :4] = expected[4:8, 4:8] = True
    assert torch.equal(mask, expected)


def test_nearest_stretches_the_cells_over_the_crop():
    mask = _mask(torch.tensor([[[[0.9, 0.1], [0.1, 0.9]]]]), (10, 10), upsample="nearest")[0]
    assert mask[:5, :5].all()
    assert mask[5:, 5:].all()
    assert mask.sum() == 50


def test_bilinear_cuts_the_interpolated_score_and_threshold_first_the_interpolated_choice():
    rc = torch.tensor([[[[1.0, 0.0]]]])
    assert _mask(rc, (1, 11))[0, 0].sum() == 5  # 1.0, 0.9, 0.8, 0.7 and 0.6
    assert _mask(rc, (1, 11), upsample="threshold_first")[0, 0].sum() == 6  # down to 1/2


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("sum_of_masked_means", (1 + 2) / 2 + (2 + 3) / 2), ("eq3_mean_all", (1 + 2 * 2 + 3) / 4), ("eq3_mean_selected", (1 + 2 * 2 + 3) / 3)],
)
def test_dynamic_region_loss_counts_a_pixel_once_for_each_discriminator(weighting, expected):
    ce = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2)
    own = torch.tensor([True, True, False, False]).view(1, 2, 2)
    cross = torch.tensor([False, True, True, False]).view(1, 2, 2)
    assert losses.dynamic_region_loss(ce, own, cross, weighting=weighting).item() == pytest.approx(expected)


@pytest.mark.parametrize("weighting", ["sum_of_masked_means", "eq3_mean_all", "eq3_mean_selected"])
def test_nothing_selected_gives_zero_and_zero_gradient(weighting):
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    none = torch.zeros(2, 4, 4, dtype=torch.bool)
    loss = losses.dynamic_region_loss(losses.pixel_cross_entropy(z, z.argmax(dim=1)), none, none, weighting=weighting)
    loss.backward()
    assert loss.item() == 0
    assert not z.grad.any()


def test_a_pixel_with_infinite_loss_outside_the_selection_does_no_harm():
    ce = torch.tensor([[[1.0, torch.inf]]])
    assert losses.local_selection_loss(ce, torch.tensor([[[True, False]]])).item() == 1


def test_labels_that_are_all_void_give_zero_and_zero_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = losses.supervised_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_supervised_loss_is_the_mean_over_pixels_that_have_a_label():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, :2] = 255
    assert losses.supervised_loss(logits, labels).item() == pytest.approx(cross_entropy(logits, labels, ignore_index=255).item())


@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("min_kept", [1, 5, 50, 117, 118, 119, 128, 10_000])
def test_hard_pixels_are_those_that_a_plain_sort_finds(threshold, min_kept):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 8, 8), generator=generator)
    labels[0, 0], labels[1, 0, :2] = 255, 255
    assert (labels != 255).sum() == 118
    loss = losses.ohem_loss(logits, labels, threshold=threshold, min_kept=min_kept)
    assert loss.item() == pytest.approx(_slow_ohem(logits.numpy(), labels.numpy(), threshold, min_kept), rel=1e-12)


def test_hard_pixels_alone_get_a_gradient_and_the_cut_gets_none():
    logits = torch.tensor([[2.0, -2.0, 0.5], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3).requires_grad_()
    losses.ohem_loss(logits, torch.zeros(1, 1, 3, dtype=torch.int64), threshold=0.7, min_kept=1).backward()
    reference = logits.detach().clone().requires_grad_()
    cross_entropy(reference[..., 1:], torch.zeros(1, 1, 2, dtype=torch.int64)).backward()
    torch.testing.assert_close(logits.grad, reference.grad)
    assert not logits.grad[..., 0].any()


def test_no_labelled_pixel_gives_hard_example_mining_zero_and_zero_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = losses.ohem_loss(logits, torch.full((2, 4, 4), 255), threshold=0.7, min_kept=5)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("broken", [1, 16], ids=["one pixel", "every pixel"])
def test_hard_example_mining_does_not_hide_a_diverged_prediction(broken):
    logits = torch.zeros(1, 2, 4, 4)
    logits.view(2, 16)[:, :broken] = torch.nan
    assert losses.ohem_loss(logits, torch.zeros(1, 4, 4, dtype=torch.int64), threshold=0.7, min_kept=3).isnan()


def test_feature_matching_by_sum_is_the_papers_norm():
    labeled, unlabeled = torch.randn(4, 8, 1, 1), torch.randn(4, 8, 1, 1)
    by_sum = losses.feature_matching_loss(labeled, unlabeled, reduction="sum")
    assert by_sum.item() == pytest.approx(torch.linalg.vector_norm(labeled.mean(0) - unlabeled.mean(0), ord=1).item(), rel=1e-5)
    assert losses.feature_matching_loss(labeled, unlabeled, reduction="mean").item() == pytest.approx(by_sum.item() / 8, rel=1e-5)


def test_images_are_scaled_by_the_batch_by_themselves_or_back_to_their_pixels():
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 1.0]).view(2, 1, 1, 1)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    images = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    scale = partial(losses.scale_image, images, mean=mean, std=std)
    torch.testing.assert_close(scale(scaling="unnormalise"), pixels)
    assert scale(scaling="batch").aminmax() == (0, 1)
    assert all(image.aminmax() == (0, 1) for image in scale(scaling="per_image"))
    assert losses.scale_image(torch.ones(2, 3, 4, 4), scaling="per_image", mean=mean, std=std).isfinite().all()


def test_one_hot_leaves_void_pixels_zero_and_a_mask_blanks_every_channel():
    labels = torch.tensor([[[0, 2, 255]]])
    classes = losses.one_hot(labels, 3, dtype=torch.float32)
    assert classes[0, :, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    pairs = losses.discriminator_input(classes, torch.ones(1, 3, 1, 3), keep=labels != 255)
    assert pairs.sum(dim=1).tolist() == [[[4, 4, 0]]]


def test_losses_of_bfloat16_tensors_are_computed_in_float32_also_under_autocast():
    z, labels = torch.randn(2, 3, 4, 4).bfloat16(), torch.randint(0, 3, (2, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        values = [
            losses.supervised_loss(z, labels),
            losses.ohem_loss(z, labels, threshold=0.7, min_kept=5),
            losses.cps_loss(z, z, labels, labels),
            losses.pixel_cross_entropy(z, labels).mean(),
            losses.discriminator_loss(z, z),
            losses.feature_matching_loss(z, z.flip(0), reduction="mean"),
        ]
    assert all(value.dtype == torch.float32 for value in values)
    torch.testing.assert_close(values[0], losses.supervised_loss(z.float(), labels))


class _Labeled:
    """The labelled half of a batch."""

    def __init__(self, x, y):
        self.x, self.y = x, y


def _slow_ohem(logits, labels, threshold, min_kept):
    """Hard example mining as a list of (probability of the true class) that is sorted."""
    exp = np.exp(logits)
    chances = exp / exp.sum(axis=1, keepdims=True)
    true = sorted(chances[b, labels[b, y, x], y, x] for b, y, x in np.argwhere(labels != 255))
    cut = max(threshold, true[min_kept - 1]) if len(true) > min_kept else 1.0
    return -np.mean([np.log(chance) for chance in true if chance <= cut])


def _mask(rc, size, *, eps=0.6, gate="ge", upsample="bilinear", cell=1):
    passes = gate if callable(gate) else partial(losses.select, eps=eps, gate=gate)
    return losses.region_mask(rc, size, gate=passes, upsample=upsample, cell=cell)


def _verdicts(scores, logits, features, config):
    """Rows of `scores`: D1 and D2 of prediction 1, D2 and D1 of prediction 2."""
    own1, cross1, own2, cross2 = scores.unsqueeze(-1).logit()
    verdicts = []
    for i, own, cross in ((1, own1, cross1), (2, own2, cross2)):
        z = logits[f"stu{i}"]
        chosen = selections(own, cross, config, size=z.shape[2:])
        verdicts.append(Verdict(z, z.argmax(dim=1), *chosen, features[f"D{i}.pred{i}"], features[f"D{i}.gt"]))
    return tuple(verdicts)
