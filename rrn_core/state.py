"""TrainState: all that must survive a crash, to and from bytes or a directory."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rrn_core.config import TrainConfig
from rrn_core.networks import Quartet
from rrn_core.step import Optimisers
from rrn_core.weights import WEIGHTS, pack, training_facts, unpack

REST = "state.pt"


@dataclass
class TrainState:
    """The one mutable value of a run: networks, optimisers, position, and the sums of the epoch under way.

    The data order needs no state: every batch is a function of the seed and the iteration.
    """

    quartet: Quartet
    optimisers: Optimisers
    config: TrainConfig
    iteration: int = 0
    """Iterations done."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of the step's values over the epoch under way."""
    seconds: float = 0.0
    """Seconds of training and evaluation so far, over all attempts."""

    def to_files(self) -> dict[str, bytes]:
        """`model.safetensors` (every network, the settings) and `state.pt` (the rest); equal states give equal weights files."""
        facts = training_facts(self.config, self.quartet.branch1.classifier.out_channels)
        rest = io.BytesIO()
        torch.save(
            {
                "config_digest": self.config.digest(),
                "iteration": self.iteration,
                "sums": self.sums,
                "seconds": self.seconds,
                "optimisers": self.optimisers.state_dict(),
                "random": _random_state(),
            },
            rest,
        )
        return {WEIGHTS: pack(self.quartet.state_dict(), facts), REST: rest.getvalue()}

    def load_files(self, files: Mapping[str, bytes]) -> None:
        """Take everything over from `to_files`, random generators included; executes no pickled code.

        Raises:
            ValueError: files of another configuration, or damaged ones.
        """
        try:
            weights, _ = unpack(files[WEIGHTS])
            rest: dict[str, Any] = torch.load(io.BytesIO(files[REST]), map_location="cpu", weights_only=True)
        except Exception as error:  # the loaders raise many kinds for a damaged file
            raise ValueError(f"the checkpoint cannot be read: {error}") from error
        if rest["config_digest"] != (own := self.config.digest()):
            raise ValueError(f"the checkpoint belongs to run {rest['config_digest'][:12]}, this is run {own[:12]}")
        self.quartet.load_state_dict(weights)
        self.optimisers.load_state_dict(rest["optimisers"])
        self.iteration, self.sums, self.seconds = rest["iteration"], rest["sums"], rest["seconds"]
        _set_random_state(rest["random"])

    def save(self, directory: Path) -> None:
        """Write the files into `directory`, each by rename; the last one written completes the checkpoint."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, body in self.to_files().items():
            with (directory / f".{name}.tmp").open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            (directory / f".{name}.tmp").replace(directory / name)


def read_files(directory: Path) -> dict[str, bytes]:
    """The files that `TrainState.save` wrote. Raises FileNotFoundError."""
    return {name: (directory / name).read_bytes() for name in (WEIGHTS, REST)}


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    """States of the global generators as tensors and plain numbers, so that they load with weights_only."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
