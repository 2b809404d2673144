"""Optimisers, the learning rate, and groups of iterations whose gradients are averaged into one optimiser step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from rrn_core.config import TrainConfig
from rrn_core.networks.quartet import Quartet

DISCRIMINATOR_BETAS = (0.9, 0.99)

Slots = dict[int, dict[str, Tensor]]
"""State tensors of an optimiser (momentum, moments), by index of the parameter and name."""


@dataclass(frozen=True)
class AccumulationGroup:
    """The position of an iteration in the group whose gradients are averaged into one optimiser step."""

    begins: bool = True
    """Whether the iteration is the first of its group."""
    ends: bool = True
    """Whether the iteration is the last of its group."""
    size: int = 1
    """Number of iterations in the group."""


ALONE = AccumulationGroup()
"""The group of an iteration without gradient accumulation."""


def group_of(config: TrainConfig, iteration: int, iterations_per_epoch: int) -> AccumulationGroup:
    """The group of an iteration, counted from 0. Groups have `config.accumulate` iterations; the last one of an epoch may be shorter."""
    done = iteration % iterations_per_epoch
    position = done % config.accumulate
    size = min(config.accumulate, iterations_per_epoch - (done - position))
    return AccumulationGroup(begins=position == 0, ends=position == size - 1, size=size)


def learning_rate(config: TrainConfig, iteration: int, iterations_per_epoch: int) -> float:
    """The branches' learning rate: lr (1 - t / T)^p over all T iterations, but linear from 0 to lr during warm-up.

    At the end of warm-up the rate drops from lr to the polynomial, as in the released code.
    """
    warmup = config.warmup_epochs * iterations_per_epoch
    if iteration < warmup:
        return config.lr * iteration / warmup
    total = config.epochs * iterations_per_epoch
    return float(config.lr * (1 - iteration / total) ** config.poly_power)


class Optimisers:
    """SGD for each branch, and Adam for each discriminator if the method has them."""

    def __init__(self, quartet: Quartet, config: TrainConfig) -> None:
        rate: float = getattr(config, "discriminator_lr", 0.0)
        self._sgd = {"opt1": _sgd(quartet.branch1, config), "opt2": _sgd(quartet.branch2, config)}
        discriminators = {"optD1": quartet.D1, "optD2": quartet.D2}
        self._adam = {name: Adam(d.parameters(), lr=rate, betas=DISCRIMINATOR_BETAS) for name, d in discriminators.items() if d}

    def zero_grad(self) -> None:
        """Delete all gradients."""
        for optimiser in self.by_name.values():
            optimiser.zero_grad()

    def step(self, *, lr: float) -> None:
        """Update every network: the branches with `lr`, the discriminators with their constant rate."""
        for sgd in self._sgd.values():
            for group in sgd.param_groups:
                group["lr"] = lr
        for optimiser in self.by_name.values():
            optimiser.step()

    def slots(self) -> dict[str, Slots]:
        """State tensors of each optimiser by its name. All else follows from the configuration and the iteration."""
        return {name: optimiser.state_dict()["state"] for name, optimiser in self.by_name.items()}

    def load_slots(self, slots: dict[str, Slots]) -> None:
        """Restore what `slots` returned. Raises KeyError if an optimiser is missing, as in a checkpoint of another method."""
        for name, optimiser in self.by_name.items():
            optimiser.load_state_dict({**optimiser.state_dict(), "state": slots[name]})

    def expected_slots(self) -> dict[str, Slots]:
        """Names, shapes and types of `slots` after the first step. The values have no meaning."""
        return {name: _expected(optimiser) for name, optimiser in self.by_name.items()}

    @property
    def by_name(self) -> dict[str, Optimizer]:
        """opt1 and opt2 train the branches, optD1 and optD2 the discriminators."""
        return {**self._sgd, **self._adam}


def _sgd(branch: nn.Module, config: TrainConfig) -> SGD:
    """Biases and parameters of batch normalisation, which have one axis, do not decay."""
    decayed = [parameter for parameter in branch.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in branch.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return SGD(groups, lr=config.lr, momentum=config.momentum)


def _expected(optimiser: Optimizer) -> Slots:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if isinstance(optimiser, Adam):
        return {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    return {i: {"momentum_buffer": p} for i, p in enumerate(parameters)} if optimiser.defaults["momentum"] else {}
