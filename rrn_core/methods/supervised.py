"""Supervised training of both branches on the labelled images alone: the baseline of semi-supervised methods."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from rrn_core.config import METHOD, TrainConfig
from rrn_core.lazy import Lazy

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

TITLE = "supervised training on the labelled images alone"
REGION_MAPS = None


class Settings(TrainConfig):
    """L = L_sup (4), summed over both branches."""

    unlabeled_streams: ClassVar[int] = 0
    method: Annotated[Literal["supervised"], METHOD] = "supervised"
    """The name of this method."""


def build_networks(config: Settings, num_classes: int) -> Quartet:
    return networks.build_quartet(config, num_classes)


def backward(quartet: Quartet, batch: Batch, config: Settings, *, epoch: int, averaged_over: int) -> Terms:
    f1, f2 = networks.branches(quartet, config)
    loss_sup = supervised_term(f1(batch.x), f2(batch.x), batch, config)
    torch.autograd.backward(loss_sup / averaged_over)
    return {"loss_sup": loss_sup, "loss": loss_sup}


def supervised_term(s1: Tensor, s2: Tensor, batch: Batch, config: TrainConfig) -> Tensor:
    """L_sup (4) summed over both branches, plain or with OHEM.

    `s1` and `s2` are the branches' logits of the labelled images, (B, K, H, W).
    """
    if config.supervised_ce == "plain":
        return losses.supervised_loss(s1, batch.y) + losses.supervised_loss(s2, batch.y)
    ohem = partial(losses.ohem_loss, threshold=config.ohem_threshold, min_kept=config.ohem_min_kept * config.batch_size)
    return ohem(s1, batch.y) + ohem(s2, batch.y)
