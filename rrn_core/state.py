"""TrainState: all that must survive a crash, to and from bytes or a directory."""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.optim import Adam, Optimizer

from rrn_core.config import TrainConfig
from rrn_core.networks.quartet import Quartet
from rrn_core.step import Optimisers
from rrn_core.weights import WEIGHTS, check_archive, first_sentence, pack, shown, training_facts, unpack

REST = "state.pt"

_NAMES = frozenset(
    {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch FloatStorage", "torch LongStorage", "torch ByteStorage"}
)
"""All that the pickle in `state.pt` may name. torch allows some more, of which a few take as much memory as the file claims."""


class CheckpointError(ValueError):
    """The files are not a checkpoint of this run, or are damaged; one line says how."""


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
        weights = pack(self.quartet.state_dict(), facts)
        rest = _Rest(
            config_digest=self.config.digest(),
            weights_sha256=hashlib.sha256(weights).hexdigest(),
            iteration=self.iteration,
            sums=self.sums,
            seconds=self.seconds,
            optimisers={name: state["state"] for name, state in self.optimisers.state_dict().items()},
            random=_Random.now(),
        )
        body = io.BytesIO()
        torch.save(rest.model_dump(), body)
        return {WEIGHTS: weights, REST: body.getvalue()}

    def load_files(self, files: Mapping[str, bytes]) -> None:
        """Take everything over from `to_files`, random generators included, or nothing at all; executes no pickled code.

        Raises:
            CheckpointError: files of another configuration or of two checkpoints, damaged ones, and any that do not fit.
        """
        weights, rest = self._read(files)
        groups = self.optimisers.state_dict()  # they follow from the configuration, the learning rate from the iteration
        self.quartet.load_state_dict(weights)
        self.optimisers.load_state_dict({name: {**own, "state": _copied(rest.optimisers.get(name, {}))} for name, own in groups.items()})
        self.iteration, self.sums, self.seconds = rest.iteration, rest.sums, rest.seconds
        rest.random.restore()

    def save(self, directory: Path) -> None:
        """Write the files into `directory`, each by rename; the last one written completes the checkpoint."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, body in self.to_files().items():
            with (directory / f".{name}.tmp").open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            (directory / f".{name}.tmp").replace(directory / name)

    def _read(self, files: Mapping[str, bytes]) -> tuple[dict[str, Tensor], _Rest]:
        """The contents, of which everything fits this state: to take them over can fail for want of memory only."""
        try:
            rest = _Rest.model_validate(_unpickled(files[REST]))
            self._check_origin(rest, files[WEIGHTS])
            weights, _ = unpack(files[WEIGHTS])
            _check_tensors(weights, self.quartet.state_dict())
            _check_tensors(_flat(rest.optimisers), self._expected(rest.iteration))
            rest.random.check()
        except (CheckpointError, MemoryError):
            raise
        except ValidationError as error:
            fault = error.errors(include_input=False, include_context=False)[0]
            where = shown(".".join(map(str, fault["loc"])))
            raise CheckpointError(f"the checkpoint cannot be read: {REST}: {where}: {shown(fault['msg'])}") from None
        except Exception as error:  # the loaders raise many kinds for a damaged file
            raise CheckpointError(f"the checkpoint cannot be read: {type(error).__name__}: {first_sentence(error)}") from error
        return weights, rest

    def _check_origin(self, rest: _Rest, weights: bytes) -> None:
        if rest.config_digest != (own := self.config.digest()):
            raise CheckpointError(f"the checkpoint belongs to run {shown(rest.config_digest[:12])}, this is run {own[:12]}")
        if rest.weights_sha256 != hashlib.sha256(weights).hexdigest():
            raise CheckpointError(f"the checkpoint cannot be read: {WEIGHTS} is damaged, or {REST} was saved with another one")

    def _expected(self, iteration: int) -> dict[str, Tensor]:
        """What the optimisers hold after `iteration` iterations, by the names of `_flat`; values do not matter."""
        own = self.optimisers
        present = {"opt1": own.opt1, "opt2": own.opt2, "optD1": own.optD1, "optD2": own.optD2}
        states = {name: _expected_of(optimiser) for name, optimiser in present.items() if optimiser is not None}
        return _flat(states) if iteration else {}


def read_files(directory: Path) -> dict[str, bytes]:
    """The files that `TrainState.save` wrote. Raises FileNotFoundError."""
    return {name: (directory / name).read_bytes() for name in (WEIGHTS, REST)}


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class _Random(_Strict):
    """States of the global generators as tensors and plain numbers, so that they load with weights_only."""

    python: Tensor
    python_gauss: float | None
    numpy: Tensor
    numpy_position: Annotated[int, Field(ge=0, le=624)]
    """NumPy itself would read memory at any position."""
    numpy_gauss: float | None
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> _Random:
        _, internal, gauss = random.getstate()
        state: dict[str, Any] = np.random.get_state(legacy=False)
        return cls(
            python=torch.tensor(internal, dtype=torch.int64),
            python_gauss=gauss,
            numpy=torch.from_numpy(state["state"]["key"].astype(np.int64)),
            numpy_position=int(state["state"]["pos"]),
            numpy_gauss=float(state["gauss"]) if state["has_gauss"] else None,
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        )

    def check(self) -> None:
        """Raises for states that no generator takes, before any of them is changed."""
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
        return self.cuda[: torch.cuda.device_count()]


class _Rest(_Strict):
    """What `state.pt` holds."""

    config_digest: str
    weights_sha256: str
    """Of the `model.safetensors` beside it: a folder may hold files of two checkpoints where a process died between them."""
    iteration: Annotated[int, Field(ge=0)]
    sums: dict[str, float]
    seconds: Annotated[float, Field(ge=0)]
    optimisers: dict[str, dict[int, dict[str, Tensor]]]
    random: _Random


def _unpickled(body: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        check_archive(archive, size=len(body))
        if damaged := archive.testzip():  # torch itself does not look at the checksums
            raise CheckpointError(f"the checkpoint cannot be read: {REST}: {shown(damaged)} is damaged")
        (pickle,) = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    named = {str(argument) for opcode, argument, _ in pickletools.genops(pickle) if opcode.name == "GLOBAL"}
    if odd := sorted(named - _NAMES):
        raise CheckpointError(f"the checkpoint cannot be read: {REST} names {shown(odd[0])}, which no checkpoint of ours does")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def _expected_of(optimiser: Optimizer) -> dict[int, dict[str, Tensor]]:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if isinstance(optimiser, Adam):
        return {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    return {i: {"momentum_buffer": p} for i, p in enumerate(parameters)} if optimiser.defaults["momentum"] else {}


def _flat(states: Mapping[str, Mapping[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    return {f"{name}.{i}.{slot}": t for name, state in states.items() for i, slots in state.items() for slot, t in slots.items()}


def _copied(state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """Tensors of a file can share their memory, among themselves and each within itself; copies do not."""
    return {i: {slot: tensor.detach().clone() for slot, tensor in slots.items()} for i, slots in state.items()}


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless the names, shapes and types are those expected, and the values finite."""
    if odd := sorted(found.keys() ^ expected.keys()):
        raise CheckpointError(f"the checkpoint does not fit: {shown(odd[0])} is {'not ours' if odd[0] in found else 'missing'}")
    for name, tensor in found.items():
        own = expected[name]
        if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
            got, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, own))
            raise CheckpointError(f"the checkpoint does not fit: {name} is {shown(got)}, expected {wanted}")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"the checkpoint does not fit: {name} holds NaN or infinity")
