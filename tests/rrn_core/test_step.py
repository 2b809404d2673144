"""The optimisation step against two whole iterations of the release, and properties of the method that no number shows."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import golden
import numpy as np
import pytest
import torch
from configs import digits
from torch import nn

from rrn_core import configure, losses
from rrn_core.config import iterations_per_epoch
from rrn_core.data.batch import Batch
from rrn_core.methods import build_networks, cps, method_of, rrn
from rrn_core.methods.base import train_step as step_of
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.discriminators import Discriminator
from rrn_core.networks.quartet import Quartet
from rrn_core.optimisation import ALONE, AccumulationGroup, Optimisers, group_of, learning_rate

CLASSES = 5
RELEASED = configure("released", crop=128, partition="1/16")
TINY = {"scales": (1.0,), "batch_size": 2, "region_loss_from_epoch": 0, "discriminator_width": 4, "eps": 0.4}


def config(**settings):
    return digits(TINY, **settings)


def train_step(quartet, optimisers, data, settings, *, epoch, lr, group=ALONE):
    return step_of(method_of(settings.method), quartet, optimisers, data, settings, epoch=epoch, lr=lr, group=group)


def batch(seed=0, *, size=2, side=64, hidden=True):
    generator = torch.Generator().manual_seed(seed)
    image = partial(torch.randn, size, 3, side, side, generator=generator)
    label = partial(torch.randint, CLASSES, (size, side, side), generator=generator)
    void = torch.full((size, side, side), 255)
    mask = (torch.rand(size, 1, side, side, generator=generator) > 0.7).float()
    return Batch(image(), label(), image(), image(), mask, label() if hidden else void, label() if hidden else void)


def run(settings, *, epoch=1, lr=0.01, of=None, steps=1):
    quartet = build_networks(settings, CLASSES)
    optimisers = Optimisers(quartet, settings)
    torch.manual_seed(0)
    for _ in range(steps):
        terms = train_step(quartet, optimisers, of or batch(), settings, epoch=epoch, lr=lr)
    return quartet, optimisers, terms


@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.slow
def test_two_iterations_equal_the_release(precision):
    expected = golden.load(f"step128_{precision}")
    settings = RELEASED
    quartet = _released_quartet(expected, settings, torch.float64 if precision == "f64" else torch.float32)
    optimisers = Optimisers(quartet, settings)
    per_epoch = iterations_per_epoch(settings, 10582)
    assert per_epoch == 1653
    for i in range(2):
        terms = _run_released_step(quartet, optimisers, settings, expected, i, learning_rate(settings, per_epoch + i, per_epoch))
        (_check_exactly if precision == "f64" else _check_loosely)(quartet, terms, expected, i)


@pytest.mark.parametrize("schedule", ["warmup", "poly"])
def test_the_learning_rate_equals_the_release_at_every_iteration(schedule):
    expected = golden.load("lr")
    base, power, total, warmup = expected["short_cfg"].tolist()
    settings = config(lr=base, poly_power=power, epochs=32, warmup_epochs=10 if schedule == "warmup" else 0)
    assert (total, warmup) == (320, 100)
    ours = [learning_rate(settings, i, 10) for i in range(320)]
    np.testing.assert_allclose(ours, expected[schedule], rtol=1e-12)


def test_the_released_schedule_starts_at_zero_and_jumps_down_after_the_warm_up():
    expected = golden.load("lr")
    settings = RELEASED
    ours = [learning_rate(settings, int(i), 1653) for i in expected["real_idx"]]
    np.testing.assert_allclose(ours, expected["real"], rtol=1e-12)
    last, first = learning_rate(settings, 16529, 1653), learning_rate(settings, 16530, 1653)
    assert learning_rate(settings, 0, 1653) == 0
    assert last == pytest.approx(settings.lr, rel=1e-4)
    assert first == pytest.approx(0.71 * settings.lr, rel=0.01)
    assert 0 < learning_rate(settings, 32 * 1653 - 1, 1653) < 1e-3 * settings.lr


def test_a_step_sets_the_rate_of_both_branches_and_leaves_the_discriminators():
    _, optimisers, _ = run(config(), lr=0.0123)
    assert [group["lr"] for name in ("opt1", "opt2") for group in optimisers.by_name[name].param_groups] == [0.0123] * 4
    assert [group["lr"] for name in ("optD1", "optD2") for group in optimisers.by_name[name].param_groups] == [1e-4] * 2


def test_normalisation_parameters_and_biases_do_not_decay():
    quartet = build_networks(config(weight_decay=0.25), CLASSES)
    decayed, kept = Optimisers(quartet, config(weight_decay=0.25)).by_name["opt1"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.25, 0)
    convolutions = [layer.weight for layer in quartet.branch1.modules() if isinstance(layer, nn.Conv2d)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in convolutions}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(quartet.branch1.parameters()))


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("supervised", set()),
        ("cps", {"loss_cps", "correct", "total"}),
        (
            "rrn",
            {"loss_cps", "loss_dr", "loss_f", "loss_d1", "loss_d2", "selected1", "selected2", "d1_real", "d1_fake", "d2_real", "d2_fake"}
            | {"correct_inside", "total_inside", "correct_outside", "total_outside"},
        ),
    ],
)
def test_a_step_reports_the_terms_of_its_method_as_detached_scalars(method, own):
    _, _, terms = run(config(method=method))
    assert set(terms) == {"loss", "loss_sup"} | own
    assert all(value.shape == () and value.isfinite() and not value.requires_grad for value in terms.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"discriminator": "image"},
        {"discriminator": "pixel"},
        {"region_upsample": "nearest"},
        {"region_upsample": "footprint"},
        {"region_upsample": "threshold_first"},
        {"gate": "gt"},
        {"region_label": "teacher"},
        {"region_label": "cross"},
        {"drlc": False},
        {"drlc_weighting": "eq3_mean_all"},
        {"drlc_weighting": "eq3_mean_selected"},
        {"discriminator_scaling": "per_image"},
        {"discriminator_scaling": "unnormalise"},
        {"mask_void": True},
        {"feature_matching": "sum"},
        {"feature_pool": "global"},
        {"judge_dropout": False},
        {"cps_on_labeled": True},
        {"supervised_ce": "ohem"},
    ],
    ids=lambda settings: "-".join(str(value) for pair in settings.items() for value in pair),
)
def test_every_option_takes_a_finite_step(settings):
    quartet, _, terms = run(config(**settings))
    assert all(value.isfinite() for value in terms.values())
    assert all(parameter.isfinite().all() for parameter in quartet.parameters())


def test_hard_example_mining_keeps_its_share_of_pixels_for_every_image_of_the_batch():
    def loss_sup(**settings):
        return run(config(method="supervised", **settings))[2]["loss_sup"].item()

    pixels, never = 64 * 64, {"supervised_ce": "ohem", "ohem_threshold": 1e-9}
    assert loss_sup(**never, ohem_min_kept=pixels) == pytest.approx(loss_sup(), rel=1e-6)
    assert loss_sup(**never, ohem_min_kept=pixels // 2) > 1.1 * loss_sup()


def test_groups_of_iterations_start_anew_with_every_epoch_and_its_last_may_be_short():
    groups = [group_of(config(accumulate=3), i, 7) for i in range(14)]
    first, middle, last = AccumulationGroup(True, False, 3), AccumulationGroup(False, False, 3), AccumulationGroup(False, True, 3)
    assert groups == 2 * [first, middle, last, first, middle, last, AccumulationGroup(True, True, 1)]
    assert {group_of(config(), i, 7) for i in range(14)} == {AccumulationGroup()}


@pytest.mark.parametrize("method", ["supervised", "cps", "rrn"])
@pytest.mark.slow
def test_a_group_steps_once_with_the_mean_gradient_and_the_rate_of_its_last_iteration(method):
    settings = config(method=method)
    parts = [run(settings, of=batch(i))[0] for i in (1, 2)]
    quartet = build_networks(settings, CLASSES)
    before = {name: parameter.detach().clone() for name, parameter in quartet.named_parameters()}
    optimisers = Optimisers(quartet, settings)
    for i, (lr, group) in enumerate([(9.0, AccumulationGroup(True, False, 2)), (0.01, AccumulationGroup(False, True, 2))], start=1):
        assert all(torch.equal(parameter, before[name]) for name, parameter in quartet.named_parameters())
        torch.manual_seed(0)
        train_step(quartet, optimisers, batch(i), settings, epoch=1, lr=lr, group=group)
    one, other = (dict(part.named_parameters()) for part in parts)
    for name, parameter in quartet.named_parameters():
        torch.testing.assert_close(parameter.grad, (one[name].grad + other[name].grad) / 2, rtol=1e-4, atol=1e-7)
        assert not torch.equal(parameter, before[name])
    bias = "branch1.classifier.bias"  # does not decay, and has no momentum yet
    torch.testing.assert_close(before[bias] - quartet.branch1.classifier.bias, 0.01 * quartet.branch1.classifier.bias.grad)


def test_the_total_is_the_weighted_sum_of_the_terms():
    _, _, terms = run(config(lambda1=0.5, lambda2=2.0, lambda3=0.25))
    expected = terms["loss_sup"] + 0.5 * terms["loss_cps"] + 2 * terms["loss_dr"] + 0.25 * terms["loss_f"]
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_cross_pseudo_supervision_on_labelled_images_adds_to_the_mix():
    without, with_labeled = (run(config(method="cps", cps_on_labeled=value))[2]["loss_cps"] for value in (False, True))
    assert with_labeled > 1.1 * without


def test_the_region_loss_is_off_before_its_first_epoch():
    settings = config(region_loss_from_epoch=1)
    assert run(settings, epoch=0)[2]["loss_dr"] == 0
    assert run(settings, epoch=1)[2]["loss_dr"] > 0


def test_a_threshold_that_no_region_reaches_selects_nothing():
    _, _, terms = run(config(eps=0.999))
    assert terms["loss_dr"] == terms["selected1"] == terms["selected2"] == terms["total_inside"] == 0


def test_labels_that_are_all_void_add_nothing_and_break_nothing():
    empty = dataclasses.replace(batch(), y=torch.full((2, 64, 64), 255))
    quartet, _, terms = run(config(), of=empty)
    assert terms["loss_sup"] == 0
    assert all(value.isfinite() for value in terms.values())
    assert all(parameter.isfinite().all() for parameter in quartet.parameters())


def test_pseudo_labels_are_counted_inside_and_outside_the_selection():
    _, _, terms = run(config())
    assert terms["total_inside"] + terms["total_outside"] == 2 * 2 * 64 * 64
    assert 0 <= terms["correct_inside"] <= terms["total_inside"]
    assert 0 <= terms["correct_outside"] <= terms["total_outside"]


@pytest.mark.slow
def test_pseudo_labels_without_a_known_truth_are_not_counted():
    for method, names in (("cps", ("correct", "total")), ("rrn", ("total_inside", "total_outside", "correct_inside", "correct_outside"))):
        _, _, terms = run(config(method=method), of=batch(hidden=False))
        assert all(terms[name] == 0 for name in names)


@pytest.mark.slow
def test_the_segmentation_loss_gives_the_discriminators_no_gradient():
    settings = config()
    quartet = build_networks(settings, CLASSES)
    _, _, verdicts = _judged(quartet, settings)
    sum(rrn.region_terms(verdicts, settings, epoch=1).values()).backward()
    assert all(parameter.grad is None for net in (quartet.D1, quartet.D2) for parameter in net.parameters())
    assert all(parameter.requires_grad for net in (quartet.D1, quartet.D2) for parameter in net.parameters())


def test_the_discriminators_loss_gives_the_branches_no_gradient():
    settings = config()
    quartet = build_networks(settings, CLASSES)
    _, pairs, _ = _judged(quartet, settings)
    terms = rrn.discriminator_terms(quartet, pairs, settings)
    (terms["loss_d1"] + terms["loss_d2"]).backward()
    assert all(parameter.grad is None for net in (quartet.branch1, quartet.branch2) for parameter in net.parameters())
    assert all(parameter.grad.any() for net in (quartet.D1, quartet.D2) for parameter in net.parameters())


@pytest.mark.parametrize("branch", [0, 1])
def test_feature_matching_reaches_only_its_own_branch(branch):
    settings = config()
    quartet = build_networks(settings, CLASSES)
    _, _, verdicts = _judged(quartet, settings)
    verdict = verdicts[branch]
    losses.feature_matching_loss(verdict.feature_labeled, verdict.feature, reduction="mean").backward()
    reached = [net.classifier.weight.grad is not None for net in (quartet.branch1, quartet.branch2)]
    assert reached == [branch == 0, branch == 1]


def test_running_statistics_see_u0_u1_the_mix_and_the_labelled_images_in_that_order():
    quartet, _, _ = run(config(), of=batch(3))
    replayed, data = build_networks(config(), CLASSES), batch(3)
    mix = data.u0 * (1 - data.mask) + data.u1 * data.mask
    with torch.no_grad():
        for net in (replayed.branch1, replayed.branch2):
            for images in (data.u0, data.u1, mix, data.x):
                net(images)
    expected = dict(replayed.named_buffers())
    assert expected
    for name, ours in quartet.named_buffers():
        torch.testing.assert_close(ours, expected[name], rtol=1e-5, atol=1e-7)


def test_mixed_labels_equal_labels_of_mixed_logits():
    data, generator = batch(), torch.Generator().manual_seed(1)
    logits = {name: torch.randn(2, CLASSES, 64, 64, generator=generator) for name in ("u0", "u1")}
    mixed = cps.mixed_pass(lambda images: logits["u0" if images is data.u0 else "u1"], lambda images: logits["u0"], data)
    expected = (logits["u0"] * (1 - data.mask) + logits["u1"] * data.mask).argmax(dim=1)
    assert torch.equal(mixed.label1, expected)
    assert torch.equal(mixed.image, data.u0 * (1 - data.mask) + data.u1 * data.mask)


def test_without_dropout_the_gate_is_deterministic_and_training_has_dropout_again():
    def scores(dropout):
        settings = config(judge_dropout=dropout, discriminator="pixel")
        quartet = build_networks(settings, CLASSES)
        mixed = cps.mixed_pass(quartet.branch1, quartet.branch2, batch())
        pairs = rrn.discriminator_inputs(mixed, batch(), settings)
        features = [rrn.judge(quartet, mixed, pairs, settings)[0].feature for _ in range(2)]
        assert quartet.D1.training
        return torch.equal(*features)

    assert scores(dropout=False)
    assert not scores(dropout=True)


def test_void_blanks_the_same_pixels_of_both_streams():
    data = batch()
    data.y[:, :10] = 255
    for mask_void, blank in ((True, True), (False, False)):
        settings = config(mask_void=mask_void)
        quartet = build_networks(settings, CLASSES)
        pairs = rrn.discriminator_inputs(cps.mixed_pass(quartet.branch1, quartet.branch2, data), data, settings)
        for pair in (pairs.predicted1, pairs.predicted2, pairs.labeled):
            assert (not pair[:, :, :10].any()) == blank
            assert pair[:, :, 10:].any()


@pytest.mark.slow
def test_bfloat16_keeps_losses_and_weights_in_float32_and_the_loss_close():
    quartet, _, terms = run(config(precision="bfloat16"))
    _, _, exact = run(config())
    assert {value.dtype for value in terms.values()} == {torch.float32}
    assert {parameter.dtype for parameter in quartet.parameters()} == {torch.float32}
    assert terms["loss_sup"].item() == pytest.approx(exact["loss_sup"].item(), rel=0.02)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in quartet.parameters())


@pytest.mark.parametrize("method", ["supervised", "cps", "rrn"])
@pytest.mark.slow
def test_restored_optimisers_continue_as_if_nothing_had_happened(method):
    settings = config(method=method)
    quartet, optimisers, _ = run(settings)
    twin = build_networks(settings, CLASSES)
    twin.load_state_dict(quartet.state_dict())
    restored = Optimisers(twin, settings)
    restored.load_slots(copy.deepcopy(optimisers.slots()))
    for nets, opts in ((quartet, optimisers), (twin, restored)):
        torch.manual_seed(7)
        train_step(nets, opts, batch(5), settings, epoch=1, lr=0.01)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(quartet.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.slow
def test_steps_on_one_batch_lower_the_supervised_loss():
    settings, generator = config(method="supervised", batch_size=4), torch.Generator().manual_seed(0)
    label = torch.randint(CLASSES, (4, 2, 2), generator=generator).repeat_interleave(32, 1).repeat_interleave(32, 2)
    data = batch(size=4)
    data = dataclasses.replace(data, x=data.x + label.unsqueeze(1), y=label)
    first, last = (run(settings, of=data, lr=0.05, steps=steps)[2]["loss_sup"] for steps in (1, 25))
    assert last < 0.5 * first


def _judged(quartet, settings):
    mixed = cps.mixed_pass(quartet.branch1, quartet.branch2, batch())
    pairs = rrn.discriminator_inputs(mixed, batch(), settings)
    return mixed, pairs, rrn.judge(quartet, mixed, pairs, settings)


def _released_quartet(expected, settings, dtype):
    nets = {name: Branch("resnet50", 21) for name in ("branch1", "branch2")}
    nets |= {name: Discriminator(21, kind="image", pool=settings.pool_kernel) for name in ("D1", "D2")}
    for name, net in nets.items():
        golden.fill(net, f"{name}.").to(dtype)
    for name in ("D1", "D2"):
        nets[name].drop.p = 0.0
        # The value that the run started from; the override key of the float64 file was rounded otherwise, by 1e-4.
        nets[name].fc.bias.data.fill_(expected["params.init"][list(expected["keys"]).index(f"{name}.fc.bias"), 0])
    return Quartet(nets["branch1"], nets["branch2"], nets["D1"], nets["D2"])


def _run_released_step(quartet, optimisers, settings, expected, i, lr):
    dtype = quartet.D1.fc.bias.dtype
    seed = 1000 * (i + 1)
    x, u0, u1 = (golden.amp(golden.make_image(seed + k, 2, 128, 128)).to(dtype) for k in (1, 3, 4))
    y = golden.make_label(seed + 2, 2, 128, 128)
    mask = golden.unpack(expected[f"it{i}.mask_packed"], expected[f"it{i}.mask_shape"]).to(dtype)
    assert lr == pytest.approx(expected[f"it{i}.lr"].item(), rel=1e-12)
    return train_step(quartet, optimisers, Batch(x, y, u0, u1, mask, y, y), settings, epoch=1, lr=lr)


def _check_terms(terms, expected, i, rel):
    names = {
        "loss": ("loss",),
        "loss_sup": ("loss_sup", "loss_sup_r"),
        "loss_cps": ("cps_loss",),
        "loss_dr": ("loss_st_1", "loss_st_2"),
        "loss_f": ("loss_fm_branch1", "loss_fm_branch2"),
        "loss_d1": ("loss_D1",),
        "loss_d2": ("loss_D2",),
    }
    for ours, theirs in names.items():
        total = sum(expected[f"it{i}.{name}"].item() for name in theirs)
        assert terms[ours].item() == pytest.approx(total, rel=rel), f"iteration {i}: {ours}"
    assert terms["selected1"].item() * 2 == expected[f"it{i}.count1"]
    assert terms["selected2"].item() * 2 == expected[f"it{i}.count2"]
    assert terms["d1_real"].item() == pytest.approx(expected[f"it{i}.D_out_z_gt1"].mean(), rel=10 * rel)
    assert terms["d2_fake"].item() == pytest.approx(expected[f"it{i}.D_out_z2"].mean(), rel=10 * rel)


def _check_exactly(quartet, terms, expected, i):
    _check_terms(terms, expected, i, 1e-8)
    gradients = {key: parameter.grad for key, parameter in quartet.named_parameters()}
    norms = [gradients[key].norm().item() for key in expected["param_keys"]]
    np.testing.assert_allclose(norms, expected[f"it{i}.grads"][:, 0], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(_rows(gradients, expected["param_keys"])[:, 3:], expected[f"it{i}.grads"][:, 2:], rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(_rows(quartet.state_dict(), expected["keys"]), expected[f"params.after{i}"], rtol=1e-8, atol=1e-10)


def _check_loosely(quartet, terms, expected, i):
    _check_terms(terms, expected, i, (3e-5, 2e-4)[i])
    ours, theirs = _rows(quartet.state_dict(), expected["keys"]), expected[f"params.after{i}"]
    np.testing.assert_allclose(ours[:, 3:], theirs[:, 3:], rtol=0, atol=(5e-6, 3e-4)[i])


def _rows(tensors, keys):
    return np.stack([golden.summary(tensors[key]) for key in keys])
