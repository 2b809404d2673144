"""What the files that a configuration names hold, so that identities follow contents: the split of the data, the hash of weights."""

from __future__ import annotations

import hashlib
from typing import Any

from orchestration.errors import NotFound, mendable
from orchestration.store.base import Store
from rrn_core.config import Runtime, Split, TrainConfig
from rrn_core.methods import settings_where

STORED = "store:"
"""Marks weights that lie in the store already."""

SPLIT_FIELDS = tuple(sorted(settings_where(lambda setting: setting.data in ("set", "list", "partition"))))
"""The settings that decide which images a run uses, and how."""


class InputContents:
    """Fills `split` and `init_sha256` into configurations, each file looked at once; what is not at hand stays unset."""

    def __init__(self, runtime: Runtime, store: Store) -> None:
        self._runtime, self._store = runtime, store
        self._splits: dict[tuple[Any, ...], Split] = {}
        self._hashes: dict[str, str] = {}
        self.weights: dict[str, bytes] = {}
        """Weights that were read from files, by their SHA-256."""

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the contents of its files. Raises SweepError for data that are unusable."""
        known: dict[str, Any] = {}
        root = self._runtime.data_root
        if config.dataset != "digits" and root is not None and root.is_dir():
            known["split"] = self._split(config).model_dump()
        if config.init_weights and (found := self.weights_hash(config.init_weights)):
            known["init_sha256"] = found
        return type(config).model_validate(config.model_dump() | known) if known else config

    def weights_hash(self, written: str) -> str | None:
        """SHA-256 of a weights file as a setting names it; None where there is none. Its contents are then in `weights`."""
        if written not in self._hashes:
            body = self._read_weights(written)
            if body is None:
                return None
            self._hashes[written] = hashlib.sha256(body).hexdigest()
            self.weights[self._hashes[written]] = body
        return self._hashes[written]

    def upload(self) -> None:
        """Put the weights that were read into the store, where trials on any machine find them by their hash."""
        for sha256, body in self.weights.items():
            key = weights_key(sha256)
            if key not in set(self._store.keys(key)):
                self._store.write(key, body)

    def _split(self, config: TrainConfig) -> Split:
        from rrn_core.data.dataset import find_split

        key = tuple(getattr(config, name) for name in SPLIT_FIELDS)
        if key not in self._splits:
            with mendable():
                self._splits[key] = find_split(config, self._runtime)
        return self._splits[key]

    def _read_weights(self, written: str) -> bytes | None:
        from rrn_core.data.lists import find_file, roots

        try:
            if written.startswith(STORED):
                return self._store.read(written.removeprefix(STORED))[0]
            file = find_file(written, roots=roots(self._runtime))
        except (NotFound, ValueError):
            return None
        with mendable():
            return file.read_bytes()


def unresolved(config: TrainConfig) -> bool:
    """Whether the identity lacks contents: the files were not at hand when the run was planned."""
    return (config.dataset != "digits" and config.split is None) or (config.init_weights is not None and config.init_sha256 is None)


def weights_key(sha256: str) -> str:
    """Where the store keeps initial weights."""
    return f"weights/{sha256}.safetensors"
