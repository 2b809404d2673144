"""Contents of the files that a configuration names: the split of the data and the hash of weights. Identities contain these, not paths."""

from __future__ import annotations

import hashlib
from typing import Any

from orchestration.errors import NotFound, user_errors
from orchestration.store.base import Store, is_key
from rrn_core.config import Runtime, Split, TrainConfig
from rrn_core.errors import DataError
from rrn_core.methods import settings_where

STORED = "store:"
"""Prefix of `init_weights` that names a key of the store."""

SPLIT_FIELDS = tuple(sorted(settings_where(lambda setting: setting.data in ("set", "list", "partition"))))
"""The settings that decide which images a run uses, and in which role."""


class InputContents:
    """Fills `split` and `init_sha256` into configurations. Each file is read once. If a file is not available, the setting stays unset."""

    def __init__(self, runtime: Runtime, store: Store) -> None:
        self._runtime, self._store = runtime, store
        self._splits: dict[tuple[Any, ...], Split] = {}
        self._hashes: dict[str, str] = {}
        self.weights: dict[str, bytes] = {}
        """Contents of the weights files that were read, by SHA-256."""

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the contents of its files. Raises SweepError for data that cannot be used."""
        known: dict[str, Any] = {}
        root = self._runtime.data_root
        if config.dataset != "digits" and root is not None and root.is_dir():
            known["split"] = self._split(config).model_dump()
        if config.init_weights and (found := self.weights_hash(config.init_weights)):
            known["init_sha256"] = found
        return type(config).model_validate(config.model_dump() | known) if known else config

    def weights_hash(self, init_weights: str) -> str | None:
        """SHA-256 of the file that the setting `init_weights` names; None if there is no such file. `weights` then has its contents."""
        if init_weights not in self._hashes:
            body = self._read_weights(init_weights)
            if body is None:
                return None
            self._hashes[init_weights] = hashlib.sha256(body).hexdigest()
            self.weights[self._hashes[init_weights]] = body
        return self._hashes[init_weights]

    def upload(self) -> None:
        """Copy the weights that were read into the store, where trials on any machine find them by their hash."""
        for sha256, body in self.weights.items():
            key = weights_key(sha256)
            if key not in set(self._store.keys(key)):
                self._store.write(key, body)

    def _split(self, config: TrainConfig) -> Split:
        from rrn_core.data.dataset import find_split

        key = tuple(getattr(config, name) for name in SPLIT_FIELDS)
        if key not in self._splits:
            with user_errors():
                self._splits[key] = find_split(config, self._runtime)
        return self._splits[key]

    def _read_weights(self, init_weights: str) -> bytes | None:
        from rrn_core.data.lists import find_file, roots

        try:
            if init_weights.startswith(STORED):
                key = init_weights.removeprefix(STORED)
                return self._store.read(key)[0] if is_key(key) else None
            file = find_file(init_weights, roots=roots(self._runtime))
        except (NotFound, DataError):
            return None
        with user_errors():
            return file.read_bytes()


def unresolved(config: TrainConfig) -> bool:
    """Whether the identity lacks contents, because the files were not available when the run was planned."""
    return (config.dataset != "digits" and config.split is None) or (config.init_weights is not None and config.init_sha256 is None)


def weights_key(sha256: str) -> str:
    """Key of initial weights in the store."""
    return f"weights/{sha256}.safetensors"
