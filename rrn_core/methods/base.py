"""The contract of a method, which the top-level names of each file in this folder fulfil, and the iteration that all methods share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rrn_core.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from rrn_core.data.batch import Batch
    from rrn_core.networks.quartet import Quartet
    from rrn_core.optimisation import AccumulationGroup, Optimisers

    Terms = dict[str, Tensor]
    """Scalar tensors by name."""


@dataclass(frozen=True)
class RegionMaps:
    """What the pictures of a method with discriminators show beside its predictions."""

    of: Callable[[Quartet, Tensor, Tensor, TrainConfig], Tensor]
    """Maps normalised windows (B, 3, H, W) and both branches' logits (B, 2, K, H, W) to maps (B, 4, H, W) in 0..1: score and selection by
    D1, then by D2."""
    legend: Callable[[TrainConfig], str]
    """Text that explains a selected region."""


class Method(Protocol):
    """A method of training. `METHODS` lists the files that fulfil this; `tests/rrn_core/test_methods.py` checks each."""

    TITLE: str
    """Name of the method in a model card."""
    Settings: type[TrainConfig]
    """The settings that the method reads: those of `TrainConfig` and its own. A sweep file uses the same names."""
    REGION_MAPS: RegionMaps | None
    """Maps for the pictures of a run; None for a method without discriminators."""

    def build_networks(self, config: TrainConfig, num_classes: int) -> Quartet:
        """The networks at iteration 0, drawn from `config.seed` alone. The global random state does not change."""
        ...

    def backward(self, quartet: Quartet, batch: Batch, config: TrainConfig, *, epoch: int, averaged_over: int) -> Terms:
        """Run the forward and backward passes of one iteration. The gradients of each loss are divided by `averaged_over`.

        The caller steps the optimisers.

        Returns:
            Scalars on the device: `loss`, its unweighted terms, and other values whose mean over the epoch is reported. Names that begin
            with `correct` and `total` are counts; their ratio is reported.
        """
        ...


def train_step(
    method: Method,
    quartet: Quartet,
    optimisers: Optimisers,
    batch: Batch,
    config: TrainConfig,
    *,
    epoch: int,
    lr: float,
    group: AccumulationGroup,
) -> Terms:
    """One iteration. Changes networks and optimisers in place, and returns the detached scalars of `Method.backward`.

    Args:
        epoch: counted from 0.
        lr: learning rate of the branches; used only at the end of the group. That of the discriminators is constant.
        group: its first iteration deletes old gradients; its last steps the optimisers with the mean gradient of the group.
    """
    quartet.train()
    if group.begins:
        optimisers.zero_grad()
    terms = method.backward(quartet, batch, config, epoch=epoch, averaged_over=group.size)
    if group.ends:
        optimisers.step(lr=lr)
    return {name: value.detach() for name, value in terms.items()}
