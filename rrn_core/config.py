"""The settings that every method has (`TrainConfig`), and where a run executes (`Runtime`)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rrn_core.errors import ConfigError
from rrn_core.setting import Setting, setting_of

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 as 64 hex digits."""

PARTITIONS = ("1/16", "1/8", "1/4", "1/2", "full")

METHOD = Setting("run", headline=True)
"""The properties of `method`. Every method uses them for the field that holds its own name."""


class Split(BaseModel):
    """The images of a run, as they enter its identity."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    labeled: Count
    """Number of labelled training images."""
    unlabeled: Count
    """Number of unlabelled training images."""
    val: Count
    """Number of validation images."""
    sha256: Digest
    """Hash of the image names in order and by role, and of the class names."""


class TrainConfig(BaseModel):
    """The settings of one training run that every method has; each method adds its own (`rrn_core.methods`).

    `rrn_core.configure` makes one. The defaults are those of the paper on VOC 2012. Numbers in brackets are equations of the paper.
    Validation is strict: a string is never read as a number, and unknown names, NaN and infinity are refused.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    revision: ClassVar[int] = 1
    """Version of the method's arithmetic and part of the identity. It is raised when a change gives other numbers on purpose."""
    unlabeled_streams: ClassVar[int] = 2
    """Batches of unlabelled images in each iteration."""

    method: Annotated[str, METHOD] = "rrn"
    """How the networks are trained: `supervised`, `cps` or `rrn`. Each method is a file in `rrn_core/methods`."""
    seed: Annotated[int, Field(ge=0, lt=2**31), Setting("run", changes_cost=False, headline=True)] = 0
    """Seed of the initial weights, the data order, augmentation, CutMix boxes and dropout."""

    dataset: Annotated[Literal["digits", "camvid", "voc", "cityscapes", "folder"], Setting("data", data="set", headline=True)] = "digits"
    """The data set. `digits` is embedded and needs no files. `camvid`, `voc` and `cityscapes` are read from the data root as downloaded.
    `folder` is your own data."""
    train_list: Annotated[str | None, Setting("data", changes_cost=False, data="list")] = None
    """File with the training images in order, instead of the data set's own list. Like `labeled_list` and `unlabeled_list`, it holds bare
    names or lines as in the lists of CPS or UniMatch. A relative path is looked up beside the sweep file, then in the data root, then
    beside the data set's own lists."""
    partition: Annotated[str, Setting("data", changes_cost=False, data="partition", headline=True)] = "1/8"
    """Share of the training images whose labels are used: `1/16`, `1/8`, `1/4`, `1/2` or `full`; or a number of images such as `n:92`."""
    partition_by: Annotated[Literal["every_kth", "seeded", "balanced", "list"], Setting("data", changes_cost=False, data="partition")] = (
        "every_kth"
    )
    """How the labelled images are chosen. `every_kth`: images 0, k, 2k, ... of the ordered list, as in CPS and the paper. `seeded`: a
    random draw. `balanced`: a random draw that evens out the number of images in which each class occurs. `list`: the images of
    `labeled_list`; `partition` then only names them."""
    partition_seed: Annotated[int, Field(ge=0, lt=2**31), Setting("data", changes_cost=False, data="partition")] = 0
    """Seed of the random draw if `partition_by` is `seeded` or `balanced`."""
    labeled_list: Annotated[str | None, Setting("data", changes_cost=False, data="list")] = None
    """File with the labelled images, for `partition_by: list`. `{k}` in its name stands for the 8 of partition `1/8`, or the 92 of `n:92`,
    so one setting names a list for every partition."""
    unlabeled_list: Annotated[str | None, Setting("data", changes_cost=False, data="list")] = None
    """File with the unlabelled images, in the form of `labeled_list`. Unset: all training images that `labeled_list` does not name."""
    split: Annotated[Split | None, Setting("data", changes_cost=False, data="contents")] = None
    """Number and hash of the images that the lists and the partition select. A sweep fills it in from the data, so other images make
    another trial, and training refuses images that differ. Unset: nothing is compared. Not needed for `digits`."""
    image_size: Annotated[int, Field(ge=64, le=4096), Setting("data", data="scene")] = 64
    """Side of a `digits` scene in pixels. Other data sets have their own image sizes."""
    train_images: Annotated[Count, Setting("data", changes_cost=False, data="scene")] = 512
    """Number of `digits` training scenes. Other data sets have their own lists."""
    val_images: Annotated[Count, Setting("data", changes_cost=False, data="scene")] = 64
    """Number of `digits` validation scenes. Other data sets have their own lists."""
    crop: Annotated[int, Field(ge=64, le=4096), Setting("data", data="view")] = 512
    """Side of the square training crop and of the evaluation window, in pixels."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1), Setting("data", changes_cost=False, data="view")] = (
        0.5,
        0.75,
        1.0,
        1.5,
        1.75,
        2.0,
    )
    """Resize factors of training images, drawn uniformly. 1.25 is absent, as in the released code."""
    hflip: Annotated[Probability, Setting("data", changes_cost=False)] = 0.5
    """Probability that a training image is mirrored horizontally."""

    backbone: Annotated[
        Literal["tiny", "resnet18", "resnet50", "resnet101", "resnet50_stem32", "resnet101_stem32"], Setting("networks", headline=True)
    ] = "resnet50"
    """ResNet with a deep stem (v1c). `tiny` is for CPUs and small images. With `_stem32` the stem has 32, 32 and 64 channels, as in
    mmsegmentation's v1c, instead of 64, 64 and 128."""
    init_weights: Annotated[str | None, Setting("networks", changes_cost=False)] = None
    """Weights to start from, in a file that `rrn-sweep weights import` has written. A relative path is looked up beside the sweep file,
    then in the data root. A sweep also accepts `store:` followed by a key of the store. An ImageNet backbone initialises both branches;
    a checkpoint initialises the same branches and, if it has them, the same discriminators."""
    init_sha256: Annotated[Digest | None, Setting("networks", changes_cost=False, data="contents")] = None
    """SHA-256 of the file that `init_weights` names. A sweep fills it in, and training refuses other contents."""

    supervised_ce: Annotated[Literal["plain", "ohem"], Setting("objective")] = "plain"
    """The supervised loss L_sup. `plain`: mean cross entropy over all labelled pixels. `ohem`: online hard example mining, the mean over
    hard pixels only, as CPS does on Cityscapes."""
    ohem_threshold: Annotated[float, Field(gt=0, le=1), Setting("objective")] = 0.7
    """With `supervised_ce: ohem`, pixels whose true class has at most this predicted probability are hard."""
    ohem_min_kept: Annotated[Count, Setting("objective")] = 50_000
    """With `supervised_ce: ohem`, at least this many pixels per image of the batch count as hard, those of lowest probability first."""

    batch_size: Annotated[int, Field(ge=2), Setting("optimisation")] = 6
    """Images per stream and iteration. At least 2, because ASPP normalises a 1x1 map over the batch."""
    accumulate: Annotated[Count, Setting("optimisation")] = 1
    """Iterations whose gradients are averaged into one optimiser step. Every epoch starts a new group, so its last group may be shorter."""
    epochs: Annotated[Count, Setting("optimisation", changes_cost=False, acts_from="warm-up's end", headline=True)] = 32
    """Number of passes over the longer of the labelled and unlabelled lists."""
    lr: Annotated[Positive, Setting("optimisation", changes_cost=False)] = 0.0025
    """Base learning rate of the branches. Warm-up ends at it; after warm-up the polynomial decay scales it."""
    momentum: Annotated[float, Field(ge=0, lt=1), Setting("optimisation", changes_cost=False)] = 0.9
    """Momentum of SGD, which trains the branches."""
    weight_decay: Annotated[NonNegative, Setting("optimisation", changes_cost=False)] = 5e-4
    """Weight decay of the branches' convolutions. Biases and normalisation parameters do not decay."""
    poly_power: Annotated[NonNegative, Setting("optimisation", changes_cost=False, acts_from="warm-up's end")] = 0.9
    """Power p of the polynomial decay lr (1 - t / T)^p of the learning rate over all T iterations."""
    warmup_epochs: Annotated[int, Field(ge=0), Setting("optimisation", changes_cost=False)] = 10
    """Number of epochs, from the first, in which the learning rate rises linearly from 0 to `lr`."""
    precision: Annotated[Literal["float32", "bfloat16"], Setting("optimisation")] = "float32"
    """Precision of the networks. `bfloat16` runs them under autocast; every loss is still computed in float32."""

    ensemble: Annotated[Literal["none", "logits", "prob"], Setting("evaluation", acts_from="evaluation")] = "logits"
    """Which prediction `val/miou` measures: `none` is branch 1 alone, `logits` and `prob` are the weighted mean of both branches' logits or
    probabilities."""
    ensemble_weight: Annotated[Probability, Setting("evaluation", changes_cost=False, acts_from="evaluation")] = 0.5
    """Weight of branch 1 in the ensemble; branch 2 has the rest."""
    eval_batch: Annotated[Count, Setting("evaluation", acts_from="evaluation")] = 8
    """Windows per forward pass in evaluation."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration of these settings, by name. Raises pydantic.ValidationError with every fault."""
        return cls.model_validate_json(
            json.dumps(settings, default=_as_json)
        )  # JSON, because strict Python input refuses a list for a tuple

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, value: str) -> str:
        if value not in PARTITIONS and not re.fullmatch(r"n:[1-9][0-9]{0,17}", value):
            choices = ", ".join(f'"{p}"' for p in PARTITIONS)
            raise PydanticCustomError("partition", 'must be one of {choices}, or "n:92" for a count', {"choices": choices})
        return value

    @model_validator(mode="after")
    def _lists_belong_together(self) -> Self:
        if (self.partition_by == "list") != (self.labeled_list is not None):
            raise PydanticCustomError("lists", "partition_by: list and labeled_list need each other", {})
        if self.unlabeled_list is not None and self.labeled_list is None:
            raise PydanticCustomError("lists", "unlabeled_list needs labeled_list", {})
        if self.dataset == "digits" and (self.train_list or self.labeled_list):
            raise PydanticCustomError("lists", "digits has no files, so it takes no lists", {})
        return self

    @property
    def partition_number(self) -> str:
        """What `{k}` stands for in the name of a list: 8 for "1/8", 92 for "n:92", or full."""
        return self.partition.removeprefix("1/").removeprefix("n:")

    def identity(self) -> dict[str, Any]:
        """What makes this run differ from others: every setting that its method reads, as JSON holds it, and the method's revision.

        If the contents of lists and weights are known, their hashes replace the paths. A setting at its neutral value is left out.
        """
        settings = self.model_dump(mode="json")
        if self.split:
            settings |= {name: None for name, field in type(self).model_fields.items() if setting_of(field).data == "list"}
        if self.init_sha256:
            settings["init_weights"] = None
        neutral = {name: setting_of(field).neutral for name, field in type(self).model_fields.items()}
        left_out = {name for name, value in settings.items() if neutral[name] in (value, getattr(self, name))}  # a tuple is a list in JSON
        return {"revision": self.revision} | {name: value for name, value in settings.items() if name not in left_out}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the identity, as 64 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


class Runtime(BaseModel):
    """Where and how a run executes. Nothing here changes its result, so nothing here is part of the identity."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: str = "auto"
    """A torch device such as `cpu` or `cuda:1`, or `auto`: CUDA if there is a GPU, else the CPU."""
    data_root: Path | None = None
    """Folder of the data set. `digits` needs none."""
    lists_root: Path | None = None
    """Folder in which relative paths of lists and weights are looked up first: that of the sweep file."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Number of processes that prepare batches. 0: the training process prepares them. Any number gives the same batches."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of torch. Unset: torch's own choice. Another number may round differently."""
    cache_images: bool | None = None
    """Whether to keep decoded images in memory. Unset: only if they take at most 2 GiB."""
    progress_every: Annotated[int, Field(ge=1)] | None = None
    """Number of iterations between reports within an epoch. Unset: one report after each epoch."""


def labeled_count(partition: str, images: int) -> int:
    """Number of labelled images that `partition` selects from `images`: a k-th of them, rounded up.

    Raises:
        ConfigError: the partition asks for more images than there are.
    """
    if partition == "full":
        return images
    if partition.startswith("n:"):
        count = int(partition[2:])
        if count > images:
            raise ConfigError(f'partition "{partition}" asks for {count} labelled images; the training list has {images}')
        return count
    return -(-images // int(partition[2:]))


def iterations_per_epoch(config: TrainConfig, images: int | None = None) -> int:
    """max(#labelled, #unlabelled) // batch_size, at least 1 (see docs/method.md).

    Args:
        images: length of the training list, used if `config.split` is unset. Unset: the published length.

    Raises:
        ConfigError: the number of images is unknown without the data, or the partition asks for more images than there are.
    """
    if config.split:
        return max(1, max(config.split.labeled, config.split.unlabeled) // config.batch_size)
    images = images or listed_train_images(config)
    if images is None:
        raise ConfigError(f"dataset {config.dataset}: the number of images is unknown without the data; give the data root")
    labeled = labeled_count(config.partition, images)
    unlabeled = images - labeled or images
    return max(1, max(labeled, unlabeled) // config.batch_size)


def listed_train_images(config: TrainConfig) -> int | None:
    """Published length of the training list, which a plan uses before it sees the data; None if there is none."""
    if config.dataset == "digits":
        return config.train_images
    own = config.train_list is None and config.partition_by != "list"
    return PUBLISHED_TRAIN_IMAGES.get(config.dataset) if own else None


PUBLISHED_TRAIN_IMAGES = {"camvid": 367, "voc": 10582, "cityscapes": 2975}
"""Length of each data set's own training list."""
