"""The networks of a run: two branches and, if the method has them, a discriminator for each; built from a seed or from weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rrn_core.config import TrainConfig
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.discriminators import Discriminator


class Quartet(nn.Module):
    """Both branches and, if the method has them, the discriminator of each."""

    def __init__(self, branch1: Branch, branch2: Branch, D1: Discriminator | None, D2: Discriminator | None) -> None:
        super().__init__()
        self.branch1 = branch1
        self.branch2 = branch2
        self.D1 = D1
        self.D2 = D2

    def discriminators(self) -> tuple[Discriminator, Discriminator]:
        """D1 and D2. Only for a method that has them."""
        assert self.D1 is not None
        assert self.D2 is not None
        return self.D1, self.D2


def build_quartet(config: TrainConfig, num_classes: int, *, discriminator: Callable[[], Discriminator] | None = None) -> Quartet:
    """The networks at iteration 0, drawn from `config.seed` alone: the backbones are equal, the heads are drawn separately.

    The global random state does not change.

    Args:
        discriminator: draws one discriminator. Unset: there are none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branch1, branch2 = (Branch(config.backbone, num_classes) for _ in range(2))
        branch2.backbone.load_state_dict(branch1.backbone.state_dict())
        D1, D2 = (discriminator() if discriminator else None for _ in range(2))
    return _channels_last(Quartet(branch1, branch2, D1, D2))


def quartet_of(weights: Mapping[str, Tensor], backbone: str, num_classes: int) -> Quartet:
    """Both branches with the tensors of `weights` (branch1.*, branch2.*), without discriminators.

    Raises:
        RuntimeError: missing or unknown tensors, or tensors of another shape.
    """
    with torch.device("meta"):
        branch1, branch2 = (Branch(backbone, num_classes) for _ in range(2))
    quartet = Quartet(branch1, branch2, None, None)
    quartet.load_state_dict(weights, assign=True)
    return _channels_last(quartet)


def branches(quartet: Quartet, config: TrainConfig) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Both branches as functions from images (B, 3, H, W) to logits (B, K, H, W), in the configured precision."""
    return _autocast(quartet.branch1, config), _autocast(quartet.branch2, config)


def judges(quartet: Quartet, config: TrainConfig) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """D1 and D2 as functions with the input and output of `Discriminator.forward`, in the configured precision."""
    d1, d2 = quartet.discriminators()
    return _autocast(d1, config), _autocast(d2, config)


def _autocast(network: nn.Module, config: TrainConfig) -> Callable[[Tensor], Any]:
    def run(inputs: Tensor) -> Any:
        # One context for each pass: autocast would otherwise reuse weights that it cast under no_grad in a later pass, without gradient.
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return network(inputs)

    return run


def _channels_last(quartet: Quartet) -> Quartet:
    # Maps take the layout of the weights. This layout is faster on CPUs, and on GPUs in bfloat16.
    quartet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the argument
    return quartet
