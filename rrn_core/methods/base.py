"""The contract of a method, which a file in this folder fulfils by its top-level names; and the iteration that all methods share."""

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
    """Scalars by name."""


@dataclass(frozen=True)
class RegionMaps:
    """What a method with discriminators shows of its regions beside its predictions."""

    of: Callable[[Quartet, Tensor, Tensor, TrainConfig], Tensor]
    """Normalised windows (B, 3, H, W) and both branches' logits of them (B, 2, K, H, W) to score and selection of D1, then of D2,
    (B, 4, H, W) in 0..1."""
    legend: Callable[[TrainConfig], str]
    """What a selected region is."""


class Method(Protocol):
    """A method of training. `METHODS` lists the files that fulfil this; `tests/rrn_core/test_methods.py` holds each to it."""

    TITLE: str
    """What a model card says that the networks were trained by."""
    Settings: type[TrainConfig]
    """The settings that the method reads: those of `TrainConfig` and its own. Their names are the sweep file's."""
    REGION_MAPS: RegionMaps | None

    def build_networks(self, config: TrainConfig, num_classes: int) -> Quartet:
        """The networks as at iteration 0, drawn from `config.seed` alone; the global random state is left as it was."""
        ...

    def backward(self, quartet: Quartet, batch: Batch, config: TrainConfig, *, epoch: int, averaged_over: int) -> Terms:
        """The passes of one iteration and the gradients of its losses, each divided by `averaged_over`; the optimisers are the caller's.

        Returns:
            Scalars on the device: `loss` and its unweighted terms, and whatever else the epoch's means shall show. Names that begin
            with `correct` and `total` are counts, whose ratio is shown.
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
    """One iteration; networks and optimisers change in place. Returns the detached scalars of `Method.backward`.

    Args:
        epoch: counted from 0.
        lr: learning rate of the branches where the group ends, unused before; the discriminators' is constant.
        group: the gradients are dropped where it begins; the optimisers step, with the mean over its iterations, where it ends.
    """
    quartet.train()
    if group.begins:
        optimisers.zero_grad()
    terms = method.backward(quartet, batch, config, epoch=epoch, averaged_over=group.size)
    if group.ends:
        optimisers.step(lr=lr)
    return {name: value.detach() for name, value in terms.items()}
