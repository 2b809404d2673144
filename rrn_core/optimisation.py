"""Optimisers, the learning rate, and groups of iterations whose gradients are averaged into one step."""

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
"""What an optimiser remembers of each parameter, by the parameter's number."""


@dataclass(frozen=True)
class AccumulationGroup:
    """The place of an iteration among those whose gradients are averaged into one optimiser step."""

    begins: bool = True
    ends: bool = True
    size: int = 1
    """Iterations of the group."""


ALONE = AccumulationGroup()


def group_of(config: TrainConfig, iteration: int, iterations_per_epoch: int) -> AccumulationGroup:
    """Groups of `config.accumulate` iterations; every epoch begins a new one, and its last one may be shorter."""
    done = iteration % iterations_per_epoch
    place = done % config.accumulate
    size = min(config.accumulate, iterations_per_epoch - (done - place))
    return AccumulationGroup(begins=place == 0, ends=place == size - 1, size=size)


def learning_rate(config: TrainConfig, iteration: int, iterations_per_epoch: int) -> float:
    """lr (1 - t / T)^power over all iterations; during warm-up a straight line from 0 to lr instead, which then jumps down to the curve."""
    warmup = config.warmup_epochs * iterations_per_epoch
    if iteration < warmup:
        return config.lr * iteration / warmup
    total = config.epochs * iterations_per_epoch
    return float(config.lr * (1 - iteration / total) ** config.poly_power)


class Optimisers:
    """SGD for each branch and, where there are discriminators, Adam for each."""

    def __init__(self, quartet: Quartet, config: TrainConfig) -> None:
        rate: float = getattr(config, "discriminator_lr", 0.0)
        self._sgd = {"opt1": _sgd(quartet.branch1, config), "opt2": _sgd(quartet.branch2, config)}
        judges = {"optD1": quartet.D1, "optD2": quartet.D2}
        self._adam = {name: Adam(judge.parameters(), lr=rate, betas=DISCRIMINATOR_BETAS) for name, judge in judges.items() if judge}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimiser in self.by_name.values():
            optimiser.zero_grad()

    def step(self, *, lr: float) -> None:
        """Step every network, the branches with `lr`; the discriminators' learning rate never changes."""
        for optimiser in self._sgd.values():
            for group in optimiser.param_groups:
                group["lr"] = lr
        for each in self.by_name.values():
            each.step()

    def slots(self) -> dict[str, Slots]:
        """What each optimiser remembers, by its name; all else follows from the configuration and the iteration."""
        return {name: optimiser.state_dict()["state"] for name, optimiser in self.by_name.items()}

    def load_slots(self, slots: dict[str, Slots]) -> None:
        """Take over what `slots` gave. Raises KeyError for those of another method."""
        for name, optimiser in self.by_name.items():
            optimiser.load_state_dict({**optimiser.state_dict(), "state": slots[name]})

    def expected_slots(self) -> dict[str, Slots]:
        """Names, shapes and types of `slots` once a step was made; the values do not matter."""
        return {name: _expected(optimiser) for name, optimiser in self.by_name.items()}

    @property
    def by_name(self) -> dict[str, Optimizer]:
        """opt1 and opt2 of the branches, optD1 and optD2 of the discriminators."""
        return {**self._sgd, **self._adam}


def _sgd(branch: nn.Module, config: TrainConfig) -> SGD:
    """Biases and the parameters of batch normalisation, which are the ones with one axis, do not decay."""
    decayed = [parameter for parameter in branch.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in branch.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return SGD(groups, lr=config.lr, momentum=config.momentum)


def _expected(optimiser: Optimizer) -> Slots:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if isinstance(optimiser, Adam):
        return {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    return {i: {"momentum_buffer": p} for i, p in enumerate(parameters)} if optimiser.defaults["momentum"] else {}
