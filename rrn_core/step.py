"""One optimisation step: the only place where the terms of the paper meet their weights, the networks and the optimisers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from rrn_core.config import TrainConfig
from rrn_core.data.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from rrn_core.losses import (
    VOID,
    class_probabilities,
    cps_loss,
    discriminator_input,
    discriminator_loss,
    dynamic_region_loss,
    feature_matching_loss,
    hard_labels,
    local_selection_loss,
    ohem_loss,
    one_hot,
    pixel_cross_entropy,
    region_mask,
    scale_image,
    select,
    supervised_loss,
)
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.discriminators import Discriminator
from rrn_core.networks.quartet import Quartet

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class AccumulationGroup:
    """Where an iteration stands among those whose gradients are averaged into one optimiser step."""

    begins: bool = True
    ends: bool = True
    size: int = 1
    """Iterations of the group."""


ALONE = AccumulationGroup()


def train_step(
    quartet: Quartet, optimisers: Optimisers, batch: Batch, config: TrainConfig, *, epoch: int, lr: float, group: AccumulationGroup = ALONE
) -> Terms:
    """One iteration of (7, 8) in the released order (METHOD.md 1.3); the networks and optimisers change in place.

    The order of the passes fixes the running statistics of batch normalisation: u0, u1, the mix, the labelled images.

    Args:
        epoch: counted from 0; the region loss starts at `config.region_loss_from_epoch`.
        lr: learning rate of both branches where the group ends, unused before; the discriminators' is constant.
        group: the optimisers forget the gradients where it begins and step, with the mean over its iterations, where it ends.

    Returns:
        Detached scalars, still on the device: `loss` and its unweighted terms, the discriminators' losses and mean scores, the shares of
        selected regions, and the counts behind the accuracy of the pseudo labels.
    """
    quartet.train()
    if group.begins:
        optimisers.forget()
    f1, f2 = _autocast(quartet.branch1, config), _autocast(quartet.branch2, config)

    mixed = None if config.method == "supervised" else mixed_pass(f1, f2, batch)
    pairs = None if mixed is None or config.method == "cps" else discriminator_pairs(mixed, batch, config)
    verdicts = None if mixed is None or pairs is None else judge(quartet, mixed, pairs, config)

    s1, s2 = f1(batch.x), f2(batch.x)
    terms = {"loss_sup": supervised_term(s1, s2, batch, config)}
    if mixed is not None:
        terms["loss_cps"] = cps_term(mixed, s1, s2, config)
    if verdicts is not None:
        terms |= region_terms(verdicts, config, epoch=epoch)
    terms["loss"] = total_loss(terms, config)
    torch.autograd.backward(terms["loss"] / group.size)

    if pairs is not None:
        terms |= discriminator_terms(quartet, pairs, config)
        torch.autograd.backward((terms["loss_d1"] + terms["loss_d2"]) / group.size)
    if group.ends:
        optimisers.step(lr=lr)
    if mixed is not None:
        terms |= diagnostics(mixed, verdicts)
    return {name: value.detach() for name, value in terms.items()}


def total_loss(terms: Terms, config: TrainConfig) -> Tensor:
    """L of (7, 8), of the terms that the method has."""
    loss = terms["loss_sup"]
    if "loss_cps" in terms:
        loss = loss + config.lambda1 * terms["loss_cps"]
    if "loss_dr" in terms:
        loss = loss + config.lambda2 * terms["loss_dr"] + config.lambda3 * terms["loss_f"]
    return loss


def learning_rate(config: TrainConfig, iteration: int, iterations_per_epoch: int) -> float:
    """lr (1 - t / T)^power over all iterations; during warm-up a straight line from 0 to lr instead, which then jumps down onto it."""
    warmup = config.warmup_epochs * iterations_per_epoch
    if iteration < warmup:
        return config.lr * iteration / warmup
    total = config.epochs * iterations_per_epoch
    return float(config.lr * (1 - iteration / total) ** config.poly_power)


def group_of(config: TrainConfig, iteration: int, iterations_per_epoch: int) -> AccumulationGroup:
    """Groups of `config.accumulate` iterations; every epoch begins a new one, and its last one may be shorter."""
    done = iteration % iterations_per_epoch
    place = done % config.accumulate
    size = min(config.accumulate, iterations_per_epoch - (done - place))
    return AccumulationGroup(begins=place == 0, ends=place == size - 1, size=size)


@dataclass(frozen=True)
class Mixed:
    """The CutMix-ed unlabelled images and what both branches make of them."""

    image: Tensor
    """(B, 3, H, W)"""
    label1: Tensor
    """Branch 1's labels of the two source images, mixed; (B, H, W) int64."""
    label2: Tensor
    z1: Tensor
    """Branch 1's logits of the mix, with gradient; (B, K, H, W)."""
    z2: Tensor
    hidden: Tensor
    """True labels of the mix, 255 where unknown; (B, H, W). For diagnostics only."""


@dataclass(frozen=True)
class Pairs:
    """What the discriminators see, (B, K + 3, H, W) each: class maps joined with images in [0, 1]."""

    predicted1: Tensor
    """Branch 1's probabilities of the mix, with gradient."""
    predicted2: Tensor
    labeled: Tensor
    """The ground truth of the labelled images."""


@dataclass(frozen=True)
class Verdict:
    """One branch's prediction of the mix, and what the discriminators say of it."""

    z: Tensor
    """Logits, with gradient; (B, K, H, W)."""
    label: Tensor
    """What the branch is to learn where it is trusted, (B, H, W) int64."""
    share: Tensor
    """Share of the branch's regions that its own discriminator selects; a scalar."""
    own: Tensor
    """Pixels that this discriminator selects; (B, H, W) bool."""
    cross: Tensor
    """Pixels that the other branch's discriminator selects; without DRLC nobody asks it, and it selects none."""
    feature: Tensor
    """The discriminator's feature of the prediction, with gradient to the branch; (B, C, 1, 1)."""
    feature_labeled: Tensor
    """Its feature of the ground truth."""


def mixed_pass(f1: Callable[[Tensor], Tensor], f2: Callable[[Tensor], Tensor], batch: Batch) -> Mixed:
    """Teachers label the whole images, students predict the mix; the branches are given as functions from images to logits."""
    label1, label2 = _teacher_label(f1, batch), _teacher_label(f2, batch)
    pasted = batch.mask.bool()
    image = torch.where(pasted, batch.u1, batch.u0)
    hidden = torch.where(pasted[:, 0], batch.hidden1, batch.hidden0)
    return Mixed(image, label1, label2, f1(image), f2(image), hidden)


def supervised_term(s1: Tensor, s2: Tensor, batch: Batch, config: TrainConfig) -> Tensor:
    """L_sup (4) of both branches, whose logits of the labelled images are `s1` and `s2`."""
    if config.supervised_ce == "plain":
        return supervised_loss(s1, batch.y) + supervised_loss(s2, batch.y)
    hard = partial(ohem_loss, threshold=config.ohem_threshold, min_kept=config.ohem_min_kept * config.batch_size)
    return hard(s1, batch.y) + hard(s2, batch.y)


def cps_term(mixed: Mixed, s1: Tensor, s2: Tensor, config: TrainConfig) -> Tensor:
    """L_cps (5) of the mix, and with `cps_on_labeled` of the labelled images, whose logits are `s1` and `s2`."""
    loss = cps_loss(mixed.z1, mixed.z2, mixed.label1, mixed.label2)
    if config.cps_on_labeled:
        loss = loss + cps_loss(s1, s2, hard_labels(s1), hard_labels(s2))
    return loss


def discriminator_pairs(mixed: Mixed, batch: Batch, config: TrainConfig) -> Pairs:
    """Inputs of the discriminators; with `mask_void`, both streams are blank where the labelled image is void: it gives neither away."""
    scale = partial(scale_image, scaling=config.discriminator_scaling, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    keep = batch.y != VOID if config.mask_void else None
    image = scale(mixed.image)
    p1, p2 = class_probabilities(mixed.z1), class_probabilities(mixed.z2)
    truth = one_hot(batch.y, p1.shape[1], dtype=p1.dtype)
    return Pairs(
        predicted1=discriminator_input(p1, image, keep=keep),
        predicted2=discriminator_input(p2, image, keep=keep),
        labeled=discriminator_input(truth, scale(batch.x), keep=keep),
    )


def judge(quartet: Quartet, mixed: Mixed, pairs: Pairs, config: TrainConfig) -> tuple[Verdict, Verdict]:
    """Each branch judged by its own discriminator and, for DRLC, by the other; the discriminators learn nothing from it."""
    d1, d2 = discriminators(quartet, config)
    with _judging(quartet, dropout=config.judge_dropout):
        score1, feature1 = d1(pairs.predicted1)
        score2, feature2 = d2(pairs.predicted2)
        with torch.no_grad():
            cross1 = d2(pairs.predicted1)[0] if config.drlc else None
            cross2 = d1(pairs.predicted2)[0] if config.drlc else None
            labeled1, labeled2 = d1(pairs.labeled)[1], d2(pairs.labeled)[1]
    label1, label2 = _region_labels(mixed, config)
    return (
        Verdict(mixed.z1, label1, *selections(score1, cross1, config, size=label1.shape[1:]), feature1, labeled1),
        Verdict(mixed.z2, label2, *selections(score2, cross2, config, size=label2.shape[1:]), feature2, labeled2),
    )


def discriminators(quartet: Quartet, config: TrainConfig) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """D1 and D2 as functions that run in the configured precision."""
    d1, d2 = quartet.discriminators()
    return _autocast(d1, config), _autocast(d2, config)


def selections(score: Tensor, cross: Tensor | None, config: TrainConfig, *, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Score logits of both discriminators to `share`, `own` and `cross` of `Verdict`; the one place that decides by `eps`."""
    gate = partial(select, eps=config.eps, gate=config.gate)
    mask = partial(region_mask, size=(size[0], size[1]), gate=gate, upsample=config.region_upsample, cell=region_side(config, size))
    rc = score.detach().sigmoid()
    own = mask(rc)
    return gate(rc).float().mean(), own, torch.zeros_like(own) if cross is None else mask(cross.sigmoid())


def region_side(config: TrainConfig, size: torch.Size) -> int:
    """Side in pixels of the area that one score was computed from, in a crop of `size`."""
    return {"patch": 16 * config.region_kernel, "image": max(size), "pixel": 1}[config.discriminator]


def region_terms(verdicts: tuple[Verdict, Verdict], config: TrainConfig, *, epoch: int) -> Terms:
    """L_dr (3), or L_ls (1) without DRLC, and L_f (2), each summed over the branches."""
    loss_dr1, loss_dr2 = (region_loss(verdict, config) for verdict in verdicts)
    loss_f1, loss_f2 = (feature_matching_loss(v.feature_labeled, v.feature, reduction=config.feature_matching) for v in verdicts)
    loss_dr = loss_dr1 + loss_dr2
    started = epoch >= config.region_loss_from_epoch
    return {"loss_dr": loss_dr if started else torch.zeros_like(loss_dr), "loss_f": loss_f1 + loss_f2}


def region_loss(verdict: Verdict, config: TrainConfig) -> Tensor:
    """L_dr (3) of one branch, or L_ls (1) without DRLC."""
    ce = pixel_cross_entropy(verdict.z, verdict.label)
    if not config.drlc:
        return local_selection_loss(ce, verdict.own)
    return dynamic_region_loss(ce, verdict.own, verdict.cross, weighting=config.drlc_weighting)


def discriminator_terms(quartet: Quartet, pairs: Pairs, config: TrainConfig) -> Terms:
    """L_D of both discriminators in passes of their own, with fresh dropout, and their mean scores."""
    terms: Terms = {}
    predictions = (pairs.predicted1, pairs.predicted2)
    for i, (discriminator, predicted) in enumerate(zip(discriminators(quartet, config), predictions, strict=True), start=1):
        fake, real = discriminator(predicted.detach())[0], discriminator(pairs.labeled)[0]
        terms[f"loss_d{i}"] = discriminator_loss(fake, real)
        terms[f"d{i}_fake"], terms[f"d{i}_real"] = fake.sigmoid().mean(), real.sigmoid().mean()
    return terms


def diagnostics(mixed: Mixed, verdicts: tuple[Verdict, Verdict] | None) -> Terms:
    """Counts of right and of all pseudo labels where the truth is known, summed over the branches.

    CPS: of the teachers' labels. RRN: of the region loss's labels, inside and outside the branch's own selection; and its share of regions.
    """
    known = mixed.hidden != VOID
    if verdicts is None:
        right = _count(known & (label == mixed.hidden) for label in (mixed.label1, mixed.label2))
        return {"correct": right, "total": _count((known, known))}
    hits = [known & (judged.label == mixed.hidden) for judged in verdicts]
    own = [judged.own for judged in verdicts]
    return {
        "selected1": verdicts[0].share,
        "selected2": verdicts[1].share,
        "correct_inside": _count(hit & inside for hit, inside in zip(hits, own, strict=True)),
        "total_inside": _count(known & inside for inside in own),
        "correct_outside": _count(hit & ~inside for hit, inside in zip(hits, own, strict=True)),
        "total_outside": _count(known & ~inside for inside in own),
    }


class Optimisers:
    """SGD for each branch and, where there are discriminators, Adam for each (METHOD.md 1.4)."""

    def __init__(self, quartet: Quartet, config: TrainConfig) -> None:
        self.opt1 = _sgd(quartet.branch1, config)
        self.opt2 = _sgd(quartet.branch2, config)
        self.optD1 = _adam(quartet.D1, config)
        self.optD2 = _adam(quartet.D2, config)

    def forget(self) -> None:
        """Drop the gradients."""
        for optimiser in self._present().values():
            optimiser.zero_grad()

    def step(self, *, lr: float) -> None:
        """Step every network, the branches with `lr`; the discriminators' learning rate never changes."""
        for group in (*self.opt1.param_groups, *self.opt2.param_groups):
            group["lr"] = lr
        for optimiser in self._present().values():
            optimiser.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: optimiser.state_dict() for name, optimiser in self._present().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError where `state` comes from another method."""
        for name, optimiser in self._present().items():
            optimiser.load_state_dict(state[name])

    def _present(self) -> dict[str, Optimizer]:
        every = {"opt1": self.opt1, "opt2": self.opt2, "optD1": self.optD1, "optD2": self.optD2}
        return {name: optimiser for name, optimiser in every.items() if optimiser is not None}


def _teacher_label(branch: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    with torch.no_grad():
        label0, label1 = hard_labels(branch(batch.u0)), hard_labels(branch(batch.u1))
    # Mixing labels equals labelling mixed logits, and reads K times less.
    return torch.where(batch.mask[:, 0].bool(), label1, label0)


def _region_labels(mixed: Mixed, config: TrainConfig) -> tuple[Tensor, Tensor]:
    if config.region_label == "own":
        return hard_labels(mixed.z1), hard_labels(mixed.z2)
    return (mixed.label1, mixed.label2) if config.region_label == "teacher" else (mixed.label2, mixed.label1)


def _autocast(network: Branch | Discriminator, config: TrainConfig) -> Callable[[Tensor], Any]:
    """The network as a function that runs in the configured precision."""

    def run(inputs: Tensor) -> Any:
        # One context a pass: weights cast under no_grad would otherwise be reused in a later pass, without gradient.
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return network(inputs)

    return run


@contextmanager
def _judging(quartet: Quartet, *, dropout: bool) -> Iterator[None]:
    """Discriminators whose parameters are constants and, without `dropout`, whose answers are deterministic."""
    both = quartet.discriminators()
    for discriminator in both:
        discriminator.requires_grad_(False).train(dropout)
    try:
        yield
    finally:
        for discriminator in both:
            discriminator.requires_grad_(True).train()


def _count(masks: Iterable[Tensor]) -> Tensor:
    return torch.stack([mask.sum() for mask in masks]).sum().float()


def _sgd(branch: Branch, config: TrainConfig) -> SGD:
    """Biases and the parameters of batch normalisation, which are the ones with one axis, do not decay."""
    decayed = [parameter for parameter in branch.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in branch.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return SGD(groups, lr=config.lr, momentum=config.momentum)


def _adam(discriminator: Discriminator | None, config: TrainConfig) -> Adam | None:
    if discriminator is None:
        return None
    return Adam(discriminator.parameters(), lr=config.discriminator_lr, betas=(0.9, 0.99))
