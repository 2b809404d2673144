"""The data of a trial, for descriptions and MLflow: which images, how many, in which roles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestration.tracking.mlflow_private import LONGEST_DIGEST
from rrn_core.config import TrainConfig, labeled_count
from rrn_core.setting import setting_of

_SCENE, _LISTS, _PARTITION = (
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
class UsedData:
    """One of MLflow's data set inputs."""

    name: str
    digest: str
    context: Literal["training", "validation"]
    source: str
    """The settings that choose the images, as JSON; never a path of any machine."""
    profile: str
    """Counts, as JSON."""


def counts(config: Mapping[str, Any]) -> Counts | None:
    """From the settings alone; None where the data would have to be read."""
    if split := config.get("split"):
        return Counts(split["labeled"], split["unlabeled"], split["val"])
    if config.get("dataset") != "digits" or not {"partition", *_SCENE} <= config.keys():
        return None
    images = config["train_images"]
    try:
        labeled = labeled_count(config["partition"], images)
    except (ValueError, ZeroDivisionError):  # a partition of another release
        return None
    return Counts(labeled, images - labeled or images, config["val_images"])


def split_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 that changes with the images and their roles: of their names where these are known, else of the settings that choose them."""
    if split := config.get("split"):
        return str(split["sha256"])
    chosen = {name: config.get(name) for name in ("dataset", *_SCENE, *_LISTS, *_PARTITION)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def data_sets(config: Mapping[str, Any]) -> tuple[UsedData, ...]:
    """The data that a trial trains on and the data that it is validated on."""
    name, partition, images = config.get("dataset"), config.get("partition"), counts(config)
    used = {name: config.get(name) for name in _PARTITION}
    training = used | ({"labelled": images.labeled, "unlabelled": images.unlabeled} if images else {})
    validation = {"images": images.val} if images else {}
    digest, source = split_hash(config)[:LONGEST_DIGEST], json.dumps(_source(config))
    return (
        UsedData(f"{name} {partition}", digest, "training", source, json.dumps(training)),
        UsedData(f"{name} validation", digest, "validation", source, json.dumps(validation)),
    )


def _source(config: Mapping[str, Any]) -> dict[str, Any]:
    names = _SCENE if config.get("dataset") == "digits" else _LISTS
    return {"dataset": config.get("dataset")} | {name: config[name] for name in names if config.get(name) is not None}
