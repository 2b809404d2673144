"""The networks of a run: two branches and, for RRN, a discriminator of each; built from a seed or from weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rrn_core.config import TrainConfig
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.discriminators import Discriminator


class Quartet(nn.Module):
    """Both branches and, for method `rrn`, the discriminator of each."""

    def __init__(self, branch1: Branch, branch2: Branch, D1: Discriminator | None, D2: Discriminator | None) -> None:
        super().__init__()
        self.branch1 = branch1
        self.branch2 = branch2
        self.D1 = D1
        self.D2 = D2

    def discriminators(self) -> tuple[Discriminator, Discriminator]:
        """D1 and D2 of a method that has them."""
        assert self.D1 is not None
        assert self.D2 is not None
        return self.D1, self.D2


def build_quartet(config: TrainConfig, num_classes: int) -> Quartet:
    """Networks as at step 0, drawn from `config.seed` alone: equal backbones, heads drawn differently.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branch1, branch2 = (Branch(config.backbone, num_classes) for _ in range(2))
        branch2.backbone.load_state_dict(branch1.backbone.state_dict())
        D1, D2 = (_discriminator(config, num_classes) if config.method == "rrn" else None for _ in range(2))
    return _laid_out(Quartet(branch1, branch2, D1, D2))


def quartet_of(weights: Mapping[str, Tensor], backbone: str, num_classes: int) -> Quartet:
    """Both branches with the values of `weights` (branch1.*, branch2.*), and no discriminators."""
    with torch.device("meta"):
        branch1, branch2 = (Branch(backbone, num_classes) for _ in range(2))
    quartet = Quartet(branch1, branch2, None, None)
    quartet.load_state_dict(weights, assign=True)
    return _laid_out(quartet)


def _laid_out(quartet: Quartet) -> Quartet:
    # Maps follow the layout of the weights. The CPU is faster in this one, and so is bfloat16 on a GPU; the stubs do not know the argument.
    quartet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return quartet


def _discriminator(config: TrainConfig, num_classes: int) -> Discriminator:
    return Discriminator(
        num_classes,
        kind=config.discriminator,
        width=config.discriminator_width,
        region_kernel=config.region_kernel,
        pool=config.pool_kernel,
    )
