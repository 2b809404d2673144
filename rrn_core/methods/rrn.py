"""The Region Relevance Network (RRN): CPS, and two discriminators that score the pseudo-labels region by region.

L = L_sup + lambda1 L_cps + lambda2 L_dr + lambda3 L_f (7, 8). Numbers in brackets are equations of the paper. The order of the passes
is that of the released code. Where paper and code differ, or leave a choice open, there is a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from rrn_core.config import METHOD, Count, NonNegative, Positive
from rrn_core.lazy import Lazy
from rrn_core.methods.base import RegionMaps
from rrn_core.methods.cps import CutMixSettings, MixedImages, cps_term, mixed_pass
from rrn_core.methods.supervised import supervised_term
from rrn_core.setting import Setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rrn_core import losses
    from rrn_core.data import batch as batches
    from rrn_core.data.batch import Batch
    from rrn_core.methods.base import Terms
    from rrn_core.networks import discriminators
    from rrn_core.networks import quartet as networks
    from rrn_core.networks.quartet import Quartet
else:
    torch, losses, batches = Lazy("torch"), Lazy("rrn_core.losses"), Lazy("rrn_core.data.batch")
    discriminators, networks = Lazy("rrn_core.networks.discriminators"), Lazy("rrn_core.networks.quartet")

TITLE = "the Region Relevance Network (RRN), rebuilt from its paper"


class Settings(CutMixSettings):
    """The settings that RRN adds to those of CPS."""

    method: Annotated[Literal["rrn"], METHOD] = "rrn"
    """The name of this method."""

    discriminator: Annotated[Literal["patch", "image", "pixel"], Setting("networks")] = "patch"
    """What a discriminator scores. `patch`: each region (paper). `image`: the image (released script). `pixel`: each pixel."""
    discriminator_width: Annotated[Count, Setting("networks")] = 64
    """Channels of a discriminator's first convolution. The next three have 2, 4 and 8 times as many."""
    region_kernel: Annotated[Count, Setting("networks")] = 10
    """Kernel and stride of the `patch` discriminator's classifier on the conv4 map (1/16 of the crop). A region has a side of 16 times this
    number of pixels."""
    feature_pool: Annotated[Count | Literal["auto", "global"], Setting("networks")] = "auto"
    """Kernel of the average pooling of the conv4 map before feature matching; its result must be one cell. `global`: the side of the map.
    `auto`: 20 for a side of 20 to 39 and 50 for a side of 50 to 99, as in the released code; else the side of the map."""

    eps: Annotated[float, Field(gt=0, lt=1), Setting("objective", changes_cost=False, acts_from="region loss", headline=True)] = 0.6
    """Threshold of the region-consistency map: the region loss learns from regions with at least this score (1, 3)."""
    lambda2: Annotated[NonNegative, Setting("objective", changes_cost=False, acts_from="region loss", headline=True)] = 1.0
    """Weight of the dynamic region loss L_dr (3), or of the local selection loss L_ls (1) if `drlc` is off."""
    lambda3: Annotated[NonNegative, Setting("objective", changes_cost=False, headline=True)] = 0.1
    """Weight of the feature matching loss L_f (2)."""
    drlc: Annotated[bool, Setting("objective")] = True
    """Dynamic region loss correction: both discriminators score each branch (3). Off: only its own discriminator scores a branch (1)."""
    drlc_weighting: Annotated[
        Literal["sum_of_masked_means", "eq3_mean_all", "eq3_mean_selected"], Setting("objective", acts_from="region loss")
    ] = "sum_of_masked_means"
    """How the weights 2, 1 and 0 of (3) are averaged. `sum_of_masked_means`: for each discriminator the mean over the pixels that it
    selects, added (released code). `eq3_mean_all`: over all pixels. `eq3_mean_selected`: over the pixels that either selects."""
    region_upsample: Annotated[
        Literal["bilinear", "nearest", "footprint", "threshold_first"], Setting("objective", acts_from="region loss")
    ] = "bilinear"
    """How a map of region scores becomes a mask of pixels. `bilinear` and `nearest`: the scores are up-sampled, then compared with `eps`.
    `footprint`: each selected region fills the pixels that it was computed from; pixels outside all regions are never selected.
    `threshold_first`: the scores are compared with `eps`, up-sampled bilinearly and cut at 1/2."""
    gate: Annotated[Literal["ge", "gt"], Setting("objective", changes_cost=False, acts_from="region loss")] = "ge"
    """Comparison of a score rc with `eps`. `ge`: a region is selected if rc >= eps (paper). `gt`: if rc > eps (released code)."""
    region_label: Annotated[Literal["own", "teacher", "cross"], Setting("objective", acts_from="region loss")] = "own"
    """Target of the region loss. `own`: the classes that the branch predicts for the mixed image. `teacher`: the mixed pseudo-label of the
    same branch. `cross`: that of the other branch."""
    region_loss_from_epoch: Annotated[int, Field(ge=0), Setting("objective", changes_cost=False)] = 1
    """First epoch, counted from 0, with a region loss. Before it the loss is 0."""
    judge_dropout: Annotated[bool, Setting("objective")] = True
    """Whether dropout of the discriminators stays active while they score the branches (released code). Off: the selection is
    deterministic."""
    discriminator_scaling: Annotated[Literal["batch", "per_image", "unnormalise"], Setting("objective")] = "batch"
    """How images are scaled to [0, 1] for the discriminators. `batch`: by minimum and maximum over the batch. `per_image`: over each image.
    `unnormalise`: back to the stored pixel values."""
    mask_void: Annotated[bool, Setting("objective")] = False
    """Whether the discriminators' input is 0 in all channels at pixels where the labelled image is void (255)."""
    feature_matching: Annotated[Literal["mean", "sum"], Setting("objective")] = "mean"
    """L_f as the mean over the channels of the feature (`mean`, released code) or as the L1 norm of (2) (`sum`)."""
    discriminator_lr: Annotated[Positive, Setting("optimisation", changes_cost=False)] = 1e-4
    """Constant learning rate of Adam, which trains the discriminators."""

    @model_validator(mode="after")
    def _fits_the_crop(self) -> Self:
        """Refuse kernels that do not fit the discriminators' last map. Four convolutions halve the crop to it."""
        side = self.conv4_side
        shape = f"crop {self.crop} gives a conv4 map of {side} x {side} (crop / 16)"
        if self.discriminator == "patch" and self.region_kernel > side:
            raise PydanticCustomError(
                "region_kernel",
                "region_kernel {k} does not fit: {shape}; set region_kernel <= {side} or crop >= {crop}",
                {"k": self.region_kernel, "shape": shape, "side": side, "crop": 16 * self.region_kernel},
            )
        if isinstance(self.feature_pool, int) and not side / 2 < self.feature_pool <= side:
            raise PydanticCustomError(
                "feature_pool",
                "feature_pool {k} does not give one cell: {shape}; set feature_pool to {low}..{side}, auto or global",
                {"k": self.feature_pool, "shape": shape, "side": side, "low": side // 2 + 1},
            )
        return self

    @property
    def conv4_side(self) -> int:
        """Side of the discriminators' last feature map (conv4) for a training crop."""
        return self.crop // 16

    @property
    def pool_kernel(self) -> int:
        """`feature_pool` as a kernel size for this crop; the side of the map if the pooling is global."""
        side = self.conv4_side
        if isinstance(self.feature_pool, int):
            return self.feature_pool
        if self.feature_pool == "auto" and (20 <= side < 40 or 50 <= side < 100):
            return 20 if side < 40 else 50
        return side


@dataclass(frozen=True)
class DiscriminatorInputs:
    """Inputs of the discriminators, (B, K + 3, H, W) each: class maps concatenated with images in [0, 1]."""

    predicted1: Tensor
    """The mixed images with the class probabilities that branch 1 predicts; with gradient."""
    predicted2: Tensor
    """The same for branch 2."""
    labeled: Tensor
    """The labelled images with their one-hot ground truth."""


@dataclass(frozen=True)
class Verdict:
    """One branch's prediction for the mixed images, and the discriminators' selection of it."""

    z: Tensor
    """Logits, with gradient; (B, K, H, W)."""
    label: Tensor
    """Target of the region loss, (B, H, W) int64."""
    share: Tensor
    """Share of regions that the branch's own discriminator selects; a scalar."""
    own: Tensor
    """Pixels that the branch's own discriminator selects; (B, H, W) bool."""
    cross: Tensor
    """Pixels that the other branch's discriminator selects, (B, H, W) bool; none without DRLC."""
    feature: Tensor
    """Feature of the prediction by the branch's own discriminator, with gradient to the branch; (B, C, 1, 1)."""
    feature_labeled: Tensor
    """Feature of the ground truth by the same discriminator, (B, C, 1, 1)."""


def build_networks(config: Settings, num_classes: int) -> Quartet:
    discriminator = partial(
        discriminators.Discriminator,
        num_classes,
        kind=config.discriminator,
        width=config.discriminator_width,
        region_kernel=config.region_kernel,
        pool=config.pool_kernel,
    )
    return networks.build_quartet(config, num_classes, discriminator=discriminator)


def backward(quartet: Quartet, batch: Batch, config: Settings, *, epoch: int, averaged_over: int) -> Terms:
    f1, f2 = networks.branches(quartet, config)
    mixed = mixed_pass(f1, f2, batch)
    inputs = discriminator_inputs(mixed, batch, config)
    verdicts = judge(quartet, mixed, inputs, config)
    s1, s2 = f1(batch.x), f2(batch.x)

    terms = {"loss_sup": supervised_term(s1, s2, batch, config), "loss_cps": cps_term(mixed, s1, s2, config)}
    terms |= region_terms(verdicts, config, epoch=epoch)
    terms["loss"] = total_loss(terms, config)
    torch.autograd.backward(terms["loss"] / averaged_over)

    terms |= discriminator_terms(quartet, inputs, config)
    torch.autograd.backward((terms["loss_d1"] + terms["loss_d2"]) / averaged_over)
    return terms | _accuracy(mixed, verdicts)


def total_loss(terms: Terms, config: Settings) -> Tensor:
    """L (7, 8): the weighted sum of the unweighted terms."""
    loss = terms["loss_sup"] + config.lambda1 * terms["loss_cps"]
    return loss + config.lambda2 * terms["loss_dr"] + config.lambda3 * terms["loss_f"]


def discriminator_inputs(mixed: MixedImages, batch: Batch, config: Settings) -> DiscriminatorInputs:
    """Inputs of the discriminators for the mixed and the labelled images.

    With `mask_void`, the inputs of both streams are 0 where the labelled image is void, so that void pixels do not tell them apart.
    """
    scale = partial(losses.scale_image, scaling=config.discriminator_scaling, mean=batches.IMAGENET_MEAN, std=batches.IMAGENET_STD)
    keep = batch.y != losses.VOID if config.mask_void else None
    image = scale(mixed.image)
    p1, p2 = losses.class_probabilities(mixed.z1), losses.class_probabilities(mixed.z2)
    truth = losses.one_hot(batch.y, p1.shape[1], dtype=p1.dtype)
    return DiscriminatorInputs(
        predicted1=losses.discriminator_input(p1, image, keep=keep),
        predicted2=losses.discriminator_input(p2, image, keep=keep),
        labeled=losses.discriminator_input(truth, scale(batch.x), keep=keep),
    )


def judge(quartet: Quartet, mixed: MixedImages, inputs: DiscriminatorInputs, config: Settings) -> tuple[Verdict, Verdict]:
    """Score each branch by its own discriminator and, for DRLC, by the other. The discriminators receive no gradient."""
    d1, d2 = networks.judges(quartet, config)
    with _judging(quartet, dropout=config.judge_dropout):
        score1, feature1 = d1(inputs.predicted1)
        score2, feature2 = d2(inputs.predicted2)
        with torch.no_grad():
            cross1 = d2(inputs.predicted1)[0] if config.drlc else None
            cross2 = d1(inputs.predicted2)[0] if config.drlc else None
            labeled1, labeled2 = d1(inputs.labeled)[1], d2(inputs.labeled)[1]
    label1, label2 = _region_labels(mixed, config)
    return (
        Verdict(mixed.z1, label1, *selections(score1, cross1, config, size=label1.shape[1:]), feature1, labeled1),
        Verdict(mixed.z2, label2, *selections(score2, cross2, config, size=label2.shape[1:]), feature2, labeled2),
    )


def selections(score: Tensor, cross: Tensor | None, config: Settings, *, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Score logits of the own and the other discriminator to `share`, `own` and `cross` of `Verdict`. Only this function applies `eps`.

    Args:
        score, cross: score logits in the shape that `Discriminator.forward` returns; `cross` is None without DRLC.
        size: (H, W) of the masks.
    """
    gate = partial(losses.select, eps=config.eps, gate=config.gate)
    mask = partial(_mask, config=config, size=size, gate=gate, upsample=config.region_upsample)
    rc = score.detach().sigmoid()
    own = mask(rc)
    return gate(rc).float().mean(), own, torch.zeros_like(own) if cross is None else mask(cross.sigmoid())


def region_side(config: Settings, size: torch.Size) -> int:
    """Side in pixels of the area that one score is computed from, in a crop of `size`."""
    return {"patch": 16 * config.region_kernel, "image": max(size), "pixel": 1}[config.discriminator]


def region_terms(verdicts: tuple[Verdict, Verdict], config: Settings, *, epoch: int) -> Terms:
    """L_dr (3), or L_ls (1) without DRLC, and L_f (2), each summed over the branches. `epoch` is counted from 0."""
    loss_dr1, loss_dr2 = (region_loss(verdict, config) for verdict in verdicts)
    loss_f1, loss_f2 = (losses.feature_matching_loss(v.feature_labeled, v.feature, reduction=config.feature_matching) for v in verdicts)
    loss_dr = loss_dr1 + loss_dr2
    started = epoch >= config.region_loss_from_epoch
    return {"loss_dr": loss_dr if started else torch.zeros_like(loss_dr), "loss_f": loss_f1 + loss_f2}


def discriminator_terms(quartet: Quartet, inputs: DiscriminatorInputs, config: Settings) -> Terms:
    """L_D of both discriminators and their mean scores, from separate passes with new dropout."""
    terms: Terms = {}
    predictions = (inputs.predicted1, inputs.predicted2)
    for i, (discriminator, predicted) in enumerate(zip(networks.judges(quartet, config), predictions, strict=True), start=1):
        fake, real = discriminator(predicted.detach())[0], discriminator(inputs.labeled)[0]
        terms[f"loss_d{i}"] = losses.discriminator_loss(fake, real)
        terms[f"d{i}_fake"], terms[f"d{i}_real"] = fake.sigmoid().mean(), real.sigmoid().mean()
    return terms


def region_maps(quartet: Quartet, images: Tensor, logits: Tensor, config: Settings) -> Tensor:
    """Maps for the pictures of a run: rc and selection of D1, then of D2, (B, 4, H, W) in 0..1.

    Args:
        images: normalised, (B, 3, H, W).
        logits: of both branches, (B, 2, K, H, W). Each is scored by its own discriminator.
    """
    pixels = losses.scale_image(images, scaling=config.discriminator_scaling, mean=batches.IMAGENET_MEAN, std=batches.IMAGENET_STD)
    size = images.shape[2:]
    upsample: Any = "bilinear" if config.region_upsample == "threshold_first" else config.region_upsample
    maps: list[Tensor] = []
    for z, discriminator in zip(logits.unbind(1), networks.judges(quartet, config), strict=True):
        score = discriminator(losses.discriminator_input(losses.class_probabilities(z), pixels))[0]
        before_threshold = _mask(score.sigmoid(), config=config, size=size, gate=lambda rc: rc, upsample=upsample)
        maps += [before_threshold, selections(score, None, config, size=size)[1].float()]
    return torch.stack(maps, dim=1)


REGION_MAPS = RegionMaps(region_maps, lambda config: f"selected, eps {config.eps:g}")  # type: ignore[arg-type, attr-defined]


def _region_labels(mixed: MixedImages, config: Settings) -> tuple[Tensor, Tensor]:
    if config.region_label == "own":
        return losses.hard_labels(mixed.z1), losses.hard_labels(mixed.z2)
    return (mixed.label1, mixed.label2) if config.region_label == "teacher" else (mixed.label2, mixed.label1)


def region_loss(verdict: Verdict, config: Settings) -> Tensor:
    """L_dr (3) of one branch, or L_ls (1) without DRLC; a scalar."""
    ce = losses.pixel_cross_entropy(verdict.z, verdict.label)
    if not config.drlc:
        return losses.local_selection_loss(ce, verdict.own)
    return losses.dynamic_region_loss(ce, verdict.own, verdict.cross, weighting=config.drlc_weighting)


def _mask(rc: Tensor, *, config: Settings, size: torch.Size, gate: Callable[[Tensor], Tensor], upsample: Any) -> Tensor:
    return losses.region_mask(rc, (size[0], size[1]), gate=gate, upsample=upsample, cell=region_side(config, size))


@contextmanager
def _judging(quartet: Quartet, *, dropout: bool) -> Iterator[None]:
    """Within, the discriminators' parameters have no gradient and, without `dropout`, their scores are deterministic."""
    both = quartet.discriminators()
    for discriminator in both:
        discriminator.requires_grad_(False).train(dropout)
    try:
        yield
    finally:
        for discriminator in both:
            discriminator.requires_grad_(True).train()


def _accuracy(mixed: MixedImages, verdicts: tuple[Verdict, Verdict]) -> Terms:
    """Counts of correct and of all labels of the region loss, inside and outside each branch's own selection.

    Only pixels with a known true label count.
    """
    known = mixed.hidden != losses.VOID
    correct = [known & (verdict.label == mixed.hidden) for verdict in verdicts]
    own = [verdict.own for verdict in verdicts]
    return {
        "selected1": verdicts[0].share,
        "selected2": verdicts[1].share,
        "correct_inside": losses.count_pixels(hit & inside for hit, inside in zip(correct, own, strict=True)),
        "total_inside": losses.count_pixels(known & inside for inside in own),
        "correct_outside": losses.count_pixels(hit & ~inside for hit, inside in zip(correct, own, strict=True)),
        "total_outside": losses.count_pixels(known & ~inside for inside in own),
    }
