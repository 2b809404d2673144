"""The networks of a run: two branches and, where the method has them, a discriminator of each; built from a seed or from weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rrn_core.config import TrainConfig
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.discriminators import Discriminator


class Quartet(nn.Module):
    """Both branches and the discriminator of each, where there are any."""

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


def build_quartet(config: TrainConfig, num_classes: int, *, discriminator: Callable[[], Discriminator] | None = None) -> Quartet:
    """Networks as at iteration 0, drawn from `config.seed` alone: equal backbones, heads drawn differently.

    The global random state is left as it was.

    Args:
        discriminator: draws one of the two; unset, there are none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branch1, branch2 = (Branch(config.backbone, num_classes) for _ in range(2))
        branch2.backbone.load_state_dict(branch1.backbone.state_dict())
        D1, D2 = (discriminator() if discriminator else None for _ in range(2))
    return _laid_out(Quartet(branch1, branch2, D1, D2))


def quartet_of(weights: Mapping[str, Tensor], backbone: str, num_classes: int) -> Quartet:
    """Both branches with the values of `weights` (branch1.*, branch2.*), and no discriminators."""
    with torch.device("meta"):
        branch1, branch2 = (Branch(backbone, num_classes) for _ in range(2))
    quartet = Quartet(branch1, branch2, None, None)
    quartet.load_state_dict(weights, assign=True)
    return _laid_out(quartet)


def branches(quartet: Quartet, config: TrainConfig) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Both branches as functions of images (B, 3, H, W) to logits (B, K, H, W) that run in the configured precision."""
    return _autocast(quartet.branch1, config), _autocast(quartet.branch2, config)


def judges(quartet: Quartet, config: TrainConfig) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """D1 and D2 as functions, likewise."""
    d1, d2 = quartet.discriminators()
    return _autocast(d1, config), _autocast(d2, config)


def _autocast(network: nn.Module, config: TrainConfig) -> Callable[[Tensor], Any]:
    def run(inputs: Tensor) -> Any:
        # One context a pass: weights cast under no_grad would otherwise be reused in a later pass, without gradient.
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return network(inputs)

    return run


def _laid_out(quartet: Quartet) -> Quartet:
    # Maps follow the layout of the weights. The CPU is faster in this one, and so is bfloat16 on a GPU; the stubs do not know the argument.
    quartet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return quartet
