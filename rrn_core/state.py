"""TrainState: everything that a run needs to resume, to and from bytes or a directory. Nothing is pickled."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save as save_safetensors
from torch import Tensor

from rrn_core.class_names import order_of
from rrn_core.config import TrainConfig
from rrn_core.errors import CheckpointError, DataError
from rrn_core.networks.quartet import Quartet
from rrn_core.optimisation import Optimisers, Slots
from rrn_core.untrusted_text import faults_of, first_sentence, printable
from rrn_core.weights import WEIGHTS, header_of, load_tensors, pack, training_metadata, unpack

STATE = "state.safetensors"
"""Name of the state file of a checkpoint: optimisers and random generators as tensors, numbers as JSON in the header."""
_HEADER = "rrn-sweep-state"
"""Key of the JSON in the header."""
_UNSEALED = "0" * 64
"""Placeholder for the state file's own SHA-256 while that is computed."""
_EARLIER = "state.pt"
"""Name of the pickled state file that releases up to 0.1 wrote."""


@dataclass
class TrainState:
    """The only mutable value of a run: networks, optimisers, position, and the sums of the current epoch.

    The data order has no state: every batch is a function of the seed and the iteration.
    """

    quartet: Quartet
    optimisers: Optimisers
    config: TrainConfig
    classes: tuple[str, ...] | None = None
    """Names of the data's classes in order. Unset: unknown."""
    iteration: int = 0
    """Iterations done."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of the values that `train_step` returns, over the current epoch."""
    seconds: float = 0.0
    """Seconds of training and evaluation so far, over all attempts."""

    def to_files(self) -> dict[str, bytes]:
        """The files of a checkpoint by name: `model.safetensors` (networks and settings) and `state.safetensors` (all else).

        Equal networks and settings give equal `model.safetensors`.
        """
        weights = pack(self.quartet.state_dict(), training_metadata(self.config, self.quartet, self.classes))
        generators = _Generators.now()
        numbers = _Numbers(
            sha256=_UNSEALED,
            config_digest=self.config.digest,
            weights_sha256=hashlib.sha256(weights).hexdigest(),
            iteration=self.iteration,
            sums=self.sums,
            seconds=self.seconds,
            **generators.numbers(),
        )
        tensors = _flat(self.optimisers.slots()) | generators.tensors()
        body = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        unsealed = save_safetensors(body, metadata={_HEADER: numbers.model_dump_json()})
        return {WEIGHTS: weights, STATE: unsealed.replace(_UNSEALED.encode(), hashlib.sha256(unsealed).hexdigest().encode(), 1)}

    def load_files(self, files: Mapping[str, bytes]) -> None:
        """Restore everything that `to_files` returned, including the random generators. If that fails, nothing changes.

        Raises:
            CheckpointError: files that are missing or damaged, or that belong to another run, to two checkpoints or to an earlier release.
            DataError: the data's classes have other names or another order than at the checkpoint.
        """
        weights, slots, numbers, generators = self._read(files)
        self.quartet.load_state_dict(weights)
        self.optimisers.load_slots(slots)
        self.iteration, self.sums, self.seconds = numbers.iteration, numbers.sums, numbers.seconds
        generators.restore()

    def save(self, directory: Path) -> None:
        """Write the files into `directory`, each under a temporary name that is then renamed. The last file completes the checkpoint."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, body in self.to_files().items():
            with (directory / f".{name}.tmp").open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            (directory / f".{name}.tmp").replace(directory / name)

    def _read(self, files: Mapping[str, bytes]) -> tuple[dict[str, Tensor], dict[str, Slots], _Numbers, _Generators]:
        """The contents, checked against this state: restoring them can fail only if memory runs out."""
        _check_complete(files)
        try:
            numbers = _numbers(files[STATE])
            _check_seal(numbers, files[STATE])
            self._check_origin(numbers, files[WEIGHTS])
            weights, metadata = unpack(files[WEIGHTS])
            _check_tensors(weights, self.quartet.state_dict())
            tensors = load_tensors(files[STATE])
            generators = _Generators.of(tensors, numbers)
            generators.check()
            expected = self.optimisers.expected_slots() if numbers.iteration else dict.fromkeys(self.optimisers.by_name, Slots())
            _check_tensors({name: tensors[name] for name in tensors.keys() - generators.tensors().keys()}, _flat(expected))
        except (CheckpointError, MemoryError):
            raise
        except ValidationError as error:
            raise CheckpointError(f"the checkpoint cannot be read: {STATE}: {faults_of(error, most=1)}") from None
        except DataError as error:
            raise CheckpointError(f"the checkpoint cannot be read: {error}") from None
        except Exception as error:  # the loaders raise many kinds for a damaged file
            raise CheckpointError(f"the checkpoint cannot be read: {type(error).__name__}: {first_sentence(error)}") from error
        self._check_classes(metadata.classes)
        return weights, _like(expected, tensors), numbers, generators

    def _check_origin(self, numbers: _Numbers, weights: bytes) -> None:
        if numbers.config_digest != (own := self.config.digest):
            raise CheckpointError(f"the checkpoint belongs to run {printable(numbers.config_digest[:12])}, this is run {own[:12]}")
        if numbers.weights_sha256 != hashlib.sha256(weights).hexdigest():
            raise CheckpointError(f"the checkpoint cannot be read: {WEIGHTS} is damaged, or is of another checkpoint than {STATE}")

    def _check_classes(self, saved: tuple[str, ...] | None) -> None:
        """Raise DataError if the data's classes have changed: labels would mean other classes from here on."""
        if saved is None or self.classes is None or saved == self.classes:
            return
        remedy = "restore the data, or start a new run"
        order_of(self.classes, saved, remedy=remedy)
        then, now = next(pair for pair in zip(saved, self.classes, strict=True) if len(set(pair)) > 1)
        raise DataError(
            f"the classes have another order than at the checkpoint: class {saved.index(then)} was {then} and is {now}; {remedy}"
        )


def read_files(directory: Path) -> dict[str, bytes]:
    """The files that `TrainState.save` has written. Raises CheckpointError if one is missing or cannot be read."""
    names = [name for name in (WEIGHTS, STATE, _EARLIER) if name != _EARLIER or not (directory / STATE).exists()]
    try:
        files = {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}
        _check_complete(files)
    except OSError as error:
        raise CheckpointError(f"{directory}: the checkpoint cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return files


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _Numbers(BaseModel):
    """The JSON in the header of the state file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    sha256: str
    """SHA-256 of the state file with `_UNSEALED` in this place. The safetensors format has no checksums."""
    config_digest: str
    """`TrainConfig.digest` of the run."""
    weights_sha256: str
    """SHA-256 of the `model.safetensors` beside it. If a process died between writing both, a folder has files of two checkpoints."""
    iteration: Annotated[int, Field(ge=0)]
    sums: dict[str, float]
    seconds: Annotated[float, Field(ge=0)]
    python_gauss: float | None
    numpy_position: Annotated[int, Field(ge=0, le=624)]
    """Bounded here, because NumPy reads memory at any position without a check."""
    numpy_gauss: float | None


@dataclass(frozen=True)
class _Generators:
    """States of the global random generators of Python, NumPy and torch."""

    python: Tensor
    python_gauss: float | None
    numpy: Tensor
    numpy_position: int
    numpy_gauss: float | None
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> _Generators:
        _, internal, gauss = random.getstate()
        state: dict[str, Any] = np.random.get_state(legacy=False)
        return cls(
            python=torch.tensor(internal, dtype=torch.int64),
            python_gauss=gauss,
            numpy=torch.from_numpy(state["state"]["key"].astype(np.int64)),
            numpy_position=int(state["state"]["pos"]),
            numpy_gauss=float(state["gauss"]) if state["has_gauss"] else None,
            torch=torch.get_rng_state(),
            cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else (),
        )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], numbers: _Numbers) -> _Generators:
        """Inverse of `tensors` and `numbers`. Raises KeyError if one is missing."""
        cuda = [name for name in tensors if name.startswith("random.cuda.")]
        return cls(
            python=tensors["random.python"],
            python_gauss=numbers.python_gauss,
            numpy=tensors["random.numpy"],
            numpy_position=numbers.numpy_position,
            numpy_gauss=numbers.numpy_gauss,
            torch=tensors["random.torch"],
            cuda=tuple(tensors[f"random.cuda.{i}"] for i in range(len(cuda))),
        )

    def tensors(self) -> dict[str, Tensor]:
        known = {"random.python": self.python, "random.numpy": self.numpy, "random.torch": self.torch}
        return known | {f"random.cuda.{i}": state for i, state in enumerate(self.cuda)}

    def numbers(self) -> dict[str, Any]:
        return {"python_gauss": self.python_gauss, "numpy_position": self.numpy_position, "numpy_gauss": self.numpy_gauss}

    def check(self) -> None:
        """Raise an exception for states that a generator refuses, before any global generator changes."""
        own = {"python": torch.zeros(625, dtype=torch.int64), "numpy": torch.zeros(624, dtype=torch.int64), "torch": torch.get_rng_state()}
        _check_tensors({"python": self.python, "numpy": self.numpy, "torch": self.torch}, own)
        random.Random().setstate(self._python_state())
        np.random.RandomState().set_state(self._numpy_state())
        torch.Generator().set_state(self.torch)
        for device, state in enumerate(self._cuda_states()):
            torch.Generator(f"cuda:{device}").set_state(state)

    def restore(self) -> None:
        """Set the global generators."""
        random.setstate(self._python_state())
        np.random.set_state(self._numpy_state())
        torch.set_rng_state(self.torch)
        if states := self._cuda_states():
            torch.cuda.set_rng_state_all(states)

    def _python_state(self) -> tuple[Any, ...]:
        return 3, tuple(self.python.tolist()), self.python_gauss

    def _numpy_state(self) -> tuple[Any, ...]:
        keys = self.numpy.numpy().astype(np.uint32)
        return "MT19937", keys, self.numpy_position, int(self.numpy_gauss is not None), self.numpy_gauss or 0.0

    def _cuda_states(self) -> list[Tensor]:
        return list(self.cuda[: torch.cuda.device_count()])


def _check_complete(files: Mapping[str, bytes]) -> None:
    if STATE not in files and _EARLIER in files:
        raise CheckpointError(f"the checkpoint was saved by an earlier release as {_EARLIER}, which this release cannot read")
    if missing := [name for name in (WEIGHTS, STATE) if name not in files]:
        raise CheckpointError(f"the checkpoint is incomplete: {' and '.join(missing)} missing; resume from another checkpoint")


def _numbers(body: bytes) -> _Numbers:
    """The numbers in the header of the state file. Raises ValidationError, or CheckpointError if there is no such header."""
    try:
        text = header_of(body)[_HEADER]
    except (ValueError, LookupError, AttributeError, TypeError):
        raise CheckpointError(f"the checkpoint cannot be read: {STATE} is damaged") from None
    return _Numbers.model_validate_json(text)


def _check_seal(numbers: _Numbers, body: bytes) -> None:
    if numbers.sha256 != hashlib.sha256(body.replace(numbers.sha256.encode(), _UNSEALED.encode(), 1)).hexdigest():
        raise CheckpointError(f"the checkpoint cannot be read: {STATE} is damaged")


def _flat(slots: Mapping[str, Slots]) -> dict[str, Tensor]:
    """The tensors by optimiser, parameter and slot: `opt1.0.momentum_buffer`."""
    return {f"{name}.{i}.{slot}": t for name, state in slots.items() for i, each in state.items() for slot, t in each.items()}


def _like(expected: Mapping[str, Slots], tensors: Mapping[str, Tensor]) -> dict[str, Slots]:
    """The tensors in the structure of `expected` and in its memory layout, which files do not keep."""
    return {
        name: {i: {slot: torch.empty_like(t).copy_(tensors[f"{name}.{i}.{slot}"]) for slot, t in each.items()} for i, each in state.items()}
        for name, state in expected.items()
    }


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names, shapes and types are as expected, and all values are finite."""
    if different := sorted(found.keys() ^ expected.keys()):
        fault = "unknown" if different[0] in found else "missing"
        raise CheckpointError(f"the checkpoint does not fit: {printable(different[0])} is {fault}")
    for name, tensor in found.items():
        own = expected[name]
        if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
            got, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, own))
            raise CheckpointError(f"the checkpoint does not fit: {name} is {printable(got)}, expected {wanted}")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"the checkpoint does not fit: {name} holds NaN or infinity")
