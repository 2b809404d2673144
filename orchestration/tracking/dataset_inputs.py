"""The data of a trial as people and MLflow are told of them: which images, how many, in which roles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rrn_core.config import TrainConfig, labeled_count
from rrn_core.setting import setting_of

_LONGEST_DIGEST = 36  # what MLflow takes
_MADE, _LISTS, _PARTITION = (
    tuple(name for name, field in TrainConfig.model_fields.items() if setting_of(field).data == role)
    for role in ("scene", "list", "partition")
)


@dataclass(frozen=True)
class Counts:
    """Images in each role."""

    labeled: int
    unlabeled: int
    val: int

    def __str__(self) -> str:
        return f"{self.labeled} labelled, {self.unlabeled} unlabelled, {self.val} validation images"


@dataclass(frozen=True)
class DatasetInput:
    """One of MLflow's data set inputs."""

    name: str
    digest: str
    context: Literal["training", "validation"]
    source: str
    """What it is, as JSON; no place on any machine."""
    profile: str
    """JSON."""


def counts(config: Mapping[str, Any]) -> Counts | None:
    """From the settings alone; None where only the data would tell."""
    if split := config.get("split"):
        return Counts(split["labeled"], split["unlabeled"], split["val"])
    if config.get("dataset") != "digits" or not {"partition", *_MADE} <= config.keys():
        return None
    images = config["train_images"]
    labeled = labeled_count(config["partition"], images)
    return Counts(labeled, images - labeled or images, config["val_images"])


def split_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 that changes with the images and their roles: of their names where these are known, else of the settings that choose them."""
    if split := config.get("split"):
        return str(split["sha256"])
    chosen = {name: config.get(name) for name in ("dataset", *_MADE, *_LISTS, *_PARTITION)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def data_sets(config: Mapping[str, Any]) -> tuple[DatasetInput, ...]:
    """What a trial trains on, and what it is judged on."""
    name, partition, found = config.get("dataset"), config.get("partition"), counts(config)
    used = {name: config.get(name) for name in _PARTITION}
    training = used | ({"labelled": found.labeled, "unlabelled": found.unlabeled} if found else {})
    validation = {"images": found.val} if found else {}
    digest, source = split_hash(config)[:_LONGEST_DIGEST], json.dumps(_source(config))
    return (
        DatasetInput(f"{name} {partition}", digest, "training", source, json.dumps(training)),
        DatasetInput(f"{name} validation", digest, "validation", source, json.dumps(validation)),
    )


def _source(config: Mapping[str, Any]) -> dict[str, Any]:
    names = _MADE if config.get("dataset") == "digits" else _LISTS
    return {"dataset": config.get("dataset")} | {name: config[name] for name in names if config.get(name) is not None}
