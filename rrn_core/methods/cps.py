"""Cross pseudo supervision with CutMix (Chen et al., CVPR 2021): each branch learns from the labels that the other one predicts."""

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
    """CutMix of two unlabelled images (French et al.)."""

    cutmix_boxes: Annotated[Count, Setting("data", changes_cost=False)] = 3
    """Boxes XOR-ed into one CutMix mask."""
    cutmix_area: Annotated[tuple[Probability, Probability], Setting("data", changes_cost=False)] = (0.25, 0.5)
    """Range of the share of the image that all boxes together would cover if none overlapped."""
    lambda1: Annotated[NonNegative, Setting("objective", changes_cost=False, headline=True)] = 1.0
    """Weight of L_cps (5, 6)."""
    cps_on_labeled: Annotated[bool, Setting("objective")] = False
    """Adds the labelled images' half of L_cps (5)."""

    @field_validator("cutmix_area")
    @classmethod
    def _ordered_area(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise PydanticCustomError("cutmix_area", "must be [smallest, largest]", {})
        return value


class Settings(CutMixSettings):
    """L_sup + lambda1 L_cps (7)."""

    unlabeled_streams: ClassVar[int] = 2
    method: Annotated[Literal["cps"], METHOD] = "cps"


@dataclass(frozen=True)
class MixedImages:
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
    """Teachers label the whole images, students predict the mix; `f1` and `f2` map images (B, 3, H, W) to logits.

    The order of the passes (u0, u1, the mix, and later the labelled images) fixes the running statistics of batch normalisation.
    """
    label1, label2 = _teacher_label(f1, batch), _teacher_label(f2, batch)
    pasted = batch.mask.bool()
    image = torch.where(pasted, batch.u1, batch.u0)
    hidden = torch.where(pasted[:, 0], batch.hidden1, batch.hidden0)
    return MixedImages(image, label1, label2, f1(image), f2(image), hidden)


def cps_term(mixed: MixedImages, s1: Tensor, s2: Tensor, config: CutMixSettings) -> Tensor:
    """L_cps (5) of the mix, and with `cps_on_labeled` of the labelled images, whose logits are `s1` and `s2`."""
    loss = losses.cps_loss(mixed.z1, mixed.z2, mixed.label1, mixed.label2)
    if config.cps_on_labeled:
        loss = loss + losses.cps_loss(s1, s2, losses.hard_labels(s1), losses.hard_labels(s2))
    return loss


def _teacher_label(branch: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    with torch.no_grad():
        label0, label1 = losses.hard_labels(branch(batch.u0)), losses.hard_labels(branch(batch.u1))
    # Mixing labels equals labelling mixed logits, and reads K times less.
    return torch.where(batch.mask[:, 0].bool(), label1, label0)


def _accuracy(mixed: MixedImages) -> Terms:
    """Counts of right and of all pseudo-labels where the truth is known, summed over the branches."""
    known = mixed.hidden != losses.VOID
    right = losses.count_pixels(known & (label == mixed.hidden) for label in (mixed.label1, mixed.label2))
    return {"correct": right, "total": losses.count_pixels((known, known))}
