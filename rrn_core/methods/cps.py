"""Cross pseudo supervision (CPS; Chen et al., CVPR 2021) with CutMix: each branch learns from the labels that the other predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from rrn_core.config import METHOD, Count, NonNegative, Probability, TrainConfig
from rrn_core.lazy import Lazy
from rrn_core.methods.supervised import supervised_term
from rrn_core.setting import Setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rrn_core import losses
    from rrn_core.data.batch import Batch
    from rrn_core.methods.base import Terms
    from rrn_core.networks import quartet as networks
    from rrn_core.networks.quartet import Quartet
else:
    torch, losses, networks = Lazy("torch"), Lazy("rrn_core.losses"), Lazy("rrn_core.networks.quartet")

TITLE = "cross pseudo supervision (CPS) with CutMix"
REGION_MAPS = None


class CutMixSettings(TrainConfig):
    """Settings of CPS on CutMix-ed images, which RRN has too."""

    cutmix_boxes: Annotated[Count, Setting("data", changes_cost=False)] = 3
    """Number of boxes that are XOR-ed into one CutMix mask (French et al., BMVC 2020)."""
    cutmix_area: Annotated[tuple[Probability, Probability], Setting("data", changes_cost=False)] = (0.25, 0.5)
    """Range [smallest, largest] of the share of the image that the boxes of a CutMix mask would cover together if none overlapped."""
    lambda1: Annotated[NonNegative, Setting("objective", changes_cost=False, headline=True)] = 1.0
    """Weight of the cross pseudo supervision loss L_cps (5, 6)."""
    cps_on_labeled: Annotated[bool, Setting("objective")] = False
    """Whether L_cps also has its term on the labelled images (5). The released code leaves it out."""

    @field_validator("cutmix_area")
    @classmethod
    def _ordered_area(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise PydanticCustomError("cutmix_area", "must be [smallest, largest]", {})
        return value


class Settings(CutMixSettings):
    """L = L_sup + lambda1 L_cps (7)."""

    unlabeled_streams: ClassVar[int] = 2
    method: Annotated[Literal["cps"], METHOD] = "cps"
    """The name of this method."""


@dataclass(frozen=True)
class MixedImages:
    """The CutMix-ed unlabelled images with both branches' pseudo-labels and predictions."""

    image: Tensor
    """The mixed images, (B, 3, H, W)."""
    label1: Tensor
    """Labels that branch 1 predicts for the two source images, mixed; (B, H, W) int64."""
    label2: Tensor
    """The same for branch 2."""
    z1: Tensor
    """Logits that branch 1 predicts for the mixed images, with gradient; (B, K, H, W)."""
    z2: Tensor
    """The same for branch 2."""
    hidden: Tensor
    """True labels of the mixed images, 255 where unknown; (B, H, W). For diagnostics only."""


def build_networks(config: Settings, num_classes: int) -> Quartet:
    return networks.build_quartet(config, num_classes)


def backward(quartet: Quartet, batch: Batch, config: Settings, *, epoch: int, averaged_over: int) -> Terms:
    f1, f2 = networks.branches(quartet, config)
    mixed = mixed_pass(f1, f2, batch)
    s1, s2 = f1(batch.x), f2(batch.x)
    loss_sup = supervised_term(s1, s2, batch, config)
    loss_cps = cps_term(mixed, s1, s2, config)
    loss = loss_sup + config.lambda1 * loss_cps
    torch.autograd.backward(loss / averaged_over)
    return {"loss_sup": loss_sup, "loss_cps": loss_cps, "loss": loss, **_accuracy(mixed)}


def mixed_pass(f1: Callable[[Tensor], Tensor], f2: Callable[[Tensor], Tensor], batch: Batch) -> MixedImages:
    """Both branches label the source images without gradient, and predict the mixed images with gradient.

    `f1` and `f2` map images (B, 3, H, W) to logits (B, K, H, W). The order of the passes (u0, u1, the mix, and later the labelled images)
    is that of the released code; it decides the running statistics of batch normalisation.
    """
    label1, label2 = _teacher_label(f1, batch), _teacher_label(f2, batch)
    pasted = batch.mask.bool()
    image = torch.where(pasted, batch.u1, batch.u0)
    hidden = torch.where(pasted[:, 0], batch.hidden1, batch.hidden0)
    return MixedImages(image, label1, label2, f1(image), f2(image), hidden)


def cps_term(mixed: MixedImages, s1: Tensor, s2: Tensor, config: CutMixSettings) -> Tensor:
    """L_cps (5) on the mixed images and, with `cps_on_labeled`, on the labelled images, whose logits are `s1` and `s2`."""
    loss = losses.cps_loss(mixed.z1, mixed.z2, mixed.label1, mixed.label2)
    if config.cps_on_labeled:
        loss = loss + losses.cps_loss(s1, s2, losses.hard_labels(s1), losses.hard_labels(s2))
    return loss


def _teacher_label(branch: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    with torch.no_grad():
        label0, label1 = losses.hard_labels(branch(batch.u0)), losses.hard_labels(branch(batch.u1))
    # Mixed labels equal labels of mixed logits, and mixing them reads K times less memory.
    return torch.where(batch.mask[:, 0].bool(), label1, label0)


def _accuracy(mixed: MixedImages) -> Terms:
    """Counts of correct and of all pseudo-labels at pixels with a known true label, summed over the branches."""
    known = mixed.hidden != losses.VOID
    correct = losses.count_pixels(known & (label == mixed.hidden) for label in (mixed.label1, mixed.label2))
    return {"correct": correct, "total": losses.count_pixels((known, known))}
