"""Everything that changes a result (`TrainConfig`: the settings that every method has), and where it runs (`Runtime`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rrn_core.setting import Setting, setting_of

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

PARTITIONS = ("1/16", "1/8", "1/4", "1/2", "full")

METHOD = Setting("run", headline=True)
"""The facts of `method`, which every method states for its own name."""


class Split(BaseModel):
    """The images of a run as its identity knows them: how many, and a SHA-256 of their names in order and by role, and of the classes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    labeled: Count
    unlabeled: Count
    val: Count
    sha256: Digest


class TrainConfig(BaseModel):
    """One training run as a value: the settings that every method has; each method adds its own (`rrn_core.methods`).

    `rrn_core.configure` makes one. The defaults are those of the paper on VOC 2012. Numbers in brackets are equations of the paper.
    Validation is strict: a string is never read as a number, an unknown name is refused, NaN and infinity are refused.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    revision: ClassVar[int] = 1
    """Of the method's arithmetic: part of the identity, raised when a change gives other numbers on purpose."""
    unlabeled_streams: ClassVar[int] = 2
    """Batches of unlabelled images in each iteration."""

    method: Annotated[str, METHOD] = "rrn"
    """How the networks are trained: `supervised`, `cps` or `rrn`; each is a file in `rrn_core/methods`."""
    seed: Annotated[int, Field(ge=0, lt=2**31), Setting("run", changes_cost=False, headline=True)] = 0
    """Seeds the initial weights, the data order, augmentation, CutMix boxes and dropout."""

    dataset: Annotated[Literal["digits", "camvid", "voc", "cityscapes", "folder"], Setting("data", data="set", headline=True)] = "digits"
    """`digits`: the embedded scenes, which need no files. The others are read from the data root as downloaded; `folder`: your own data."""
    train_list: Annotated[str | None, Setting("data", changes_cost=False, data="list")] = None
    """File with the ordered training images, instead of the data set's own list. This list and the two below may be written as CPS or
    UniMatch write theirs, or as bare names. A relative path is looked up beside the sweep file, then in the data root, then beside the
    data set's own lists."""
    partition: Annotated[str, Setting("data", changes_cost=False, data="partition", headline=True)] = "1/8"
    """Share of the training images whose labels are used: 1/16, 1/8, 1/4, 1/2, full, or `n:92` for a count."""
    partition_by: Annotated[Literal["every_kth", "seeded", "balanced", "list"], Setting("data", changes_cost=False, data="partition")] = (
        "every_kth"
    )
    """`every_kth`: images 0, k, 2k, ... of the ordered list, as CPS and the paper do. `seeded`: a random draw.
    `balanced`: a random draw that evens out the number of images in which each class occurs.
    `list`: the images of `labeled_list`; `partition` is then only their name."""
    partition_seed: Annotated[int, Field(ge=0, lt=2**31), Setting("data", changes_cost=False, data="partition")] = 0
    """Seed of `seeded` and `balanced`."""
    labeled_list: Annotated[str | None, Setting("data", changes_cost=False, data="list")] = None
    """File with the labelled images; `{k}` in its name stands for the 8 of "1/8" or the 92 of "n:92"."""
    unlabeled_list: Annotated[str | None, Setting("data", changes_cost=False, data="list")] = None
    """File with the unlabelled images, like `labeled_list`; without it, the training images that `labeled_list` does not name."""
    split: Annotated[Split | None, Setting("data", changes_cost=False, data="contents")] = None
    """What the lists and the partition come to. A sweep fills it in from the data, so that other images make another trial; training
    refuses images that differ. Unset, nothing is compared; `digits` needs none."""
    image_size: Annotated[int, Field(ge=64, le=4096), Setting("data", data="scene")] = 64
    """Side of a `digits` scene in pixels; other data sets have their own sizes."""
    train_images: Annotated[Count, Setting("data", changes_cost=False, data="scene")] = 512
    """Number of `digits` training scenes; other data sets have their own lists."""
    val_images: Annotated[Count, Setting("data", changes_cost=False, data="scene")] = 64
    """Number of `digits` validation scenes."""
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
    """Random resize factors, drawn uniformly (1.25 is missing in the released code too)."""
    hflip: Annotated[Probability, Setting("data", changes_cost=False)] = 0.5
    """Probability that an image is mirrored."""

    backbone: Annotated[Literal["tiny", "resnet18", "resnet50", "resnet101"], Setting("networks", headline=True)] = "resnet50"
    """ResNet with a deep stem (v1c); `tiny` is for CPUs and small images."""
    init_weights: Annotated[str | None, Setting("networks", changes_cost=False)] = None
    """Weights to start from, as `rrn-sweep weights import` writes them: a path, looked up beside the sweep file and then in the data root,
    or (in a sweep) `store:` and a key of the store.
    An ImageNet backbone starts both branches; whole branches, and discriminators where the file has them, start the same parts."""
    init_sha256: Annotated[Digest | None, Setting("networks", changes_cost=False, data="contents")] = None
    """SHA-256 of that file. A sweep fills it in; training refuses other contents."""

    supervised_ce: Annotated[Literal["plain", "ohem"], Setting("objective")] = "plain"
    """L_sup over all labelled pixels, or online hard example mining: only over those that are predicted badly (CPS on Cityscapes)."""
    ohem_threshold: Annotated[float, Field(gt=0, le=1), Setting("objective")] = 0.7
    """Pixels whose true class has at most this probability are hard."""
    ohem_min_kept: Annotated[Count, Setting("objective")] = 50_000
    """At least this many pixels per image of the batch count as hard, the worst ones first."""

    batch_size: Annotated[int, Field(ge=2), Setting("optimisation")] = 6
    """Images per stream and iteration; at least 2, because ASPP normalises a 1x1 map over the batch."""
    accumulate: Annotated[Count, Setting("optimisation")] = 1
    """Iterations whose gradients are averaged into one optimiser step; every epoch starts a new group, its last iteration ends one."""
    epochs: Annotated[Count, Setting("optimisation", changes_cost=False, acts_from="warm-up's end", headline=True)] = 32
    """Passes over the longer of the labelled and unlabelled lists."""
    lr: Annotated[Positive, Setting("optimisation", changes_cost=False)] = 0.0025
    """Learning rate of the branches after warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1), Setting("optimisation", changes_cost=False)] = 0.9
    """Of SGD."""
    weight_decay: Annotated[NonNegative, Setting("optimisation", changes_cost=False)] = 5e-4
    """Of the branches' convolutions; biases and normalisation do not decay."""
    poly_power: Annotated[NonNegative, Setting("optimisation", changes_cost=False, acts_from="warm-up's end")] = 0.9
    """Power of the polynomial decay of the learning rate."""
    warmup_epochs: Annotated[int, Field(ge=0), Setting("optimisation", changes_cost=False)] = 10
    """Epochs in which the learning rate rises from 0 to `lr`."""
    precision: Annotated[Literal["float32", "bfloat16"], Setting("optimisation")] = "float32"
    """`bfloat16`: the networks run under autocast; every loss stays in float32."""

    ensemble: Annotated[Literal["none", "logits", "prob"], Setting("evaluation", acts_from="evaluation")] = "logits"
    """What `val/miou` is: branch 1 alone, or the weighted mean of both branches' logits or probabilities."""
    ensemble_weight: Annotated[Probability, Setting("evaluation", changes_cost=False, acts_from="evaluation")] = 0.5
    """Weight of branch 1 in the ensemble."""
    eval_batch: Annotated[Count, Setting("evaluation", acts_from="evaluation")] = 8
    """Windows per forward pass in evaluation."""

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, value: str) -> str:
        counted = value.startswith("n:") and value[2:].isdecimal() and int(value[2:]) >= 1
        if value not in PARTITIONS and not counted:
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
        """What `{k}` stands for in the name of a list: 8 of "1/8", 92 of "n:92", full."""
        return self.partition.removeprefix("1/").removeprefix("n:")

    def identity(self) -> dict[str, Any]:
        """What tells this run from others: every setting that its method reads, as JSON holds it, and the method's revision.

        Where the contents of lists and weights are known, they count instead of the paths. A setting at its neutral value is left out.
        """
        settings = self.model_dump(mode="json")
        if self.split:
            settings |= {name: None for name, field in type(self).model_fields.items() if setting_of(field).data == "list"}
        if self.init_sha256:
            settings["init_weights"] = None
        neutral = {name: setting_of(field).neutral for name, field in type(self).model_fields.items()}
        return {"revision": self.revision} | {name: value for name, value in settings.items() if value != neutral[name]}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the identity, as 64 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Runtime(BaseModel):
    """Where and how a run is executed; nothing here changes its result, so nothing here is hashed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: str = "auto"
    """`auto` (CUDA where there is one, else the CPU) or a torch device."""
    data_root: Path | None = None
    """Folder of the data set; `digits` needs none."""
    lists_root: Path | None = None
    """Where relative paths of lists and weights start first: the folder of the sweep file."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches; 0 prepares them in the training process. Batches are the same either way."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of the tensor library; unset leaves its own choice. Another number may round differently."""
    cache_images: bool | None = None
    """Keep decoded images in memory; unset: where they take less than 2 GiB."""
    progress_every: Annotated[int, Field(ge=1)] | None = None
    """Also report every so many iterations within an epoch; unset reports after each epoch only."""


def labeled_count(partition: str, images: int) -> int:
    """Number of labelled images that `partition` takes of `images`, as every k-th image gives (rounded up).

    Raises:
        ValueError: a count larger than the data set.
    """
    if partition == "full":
        return images
    if partition.startswith("n:"):
        count = int(partition[2:])
        if count > images:
            raise ValueError(f'partition "{partition}" asks for {count} labelled images; the training list has {images}')
        return count
    return -(-images // int(partition[2:]))


def iterations_per_epoch(config: TrainConfig, images: int | None = None) -> int:
    """max(#labelled, #unlabelled) // batch_size, at least 1 (METHOD.md 1.2).

    Args:
        images: length of the training list, where `config.split` does not tell the counts; unset: as published.

    Raises:
        ValueError: nobody knows how many images there are, or the partition asks for more.
    """
    if config.split:
        return max(1, max(config.split.labeled, config.split.unlabeled) // config.batch_size)
    images = images or listed_train_images(config)
    if images is None:
        raise ValueError(f"dataset {config.dataset}: the number of images is known only from the data; give the data root")
    labeled = labeled_count(config.partition, images)
    unlabeled = images - labeled or images
    return max(1, max(labeled, unlabeled) // config.batch_size)


def listed_train_images(config: TrainConfig) -> int | None:
    """Length of the training list as published, which a plan counts with before the data are seen; None where there is none."""
    if config.dataset == "digits":
        return config.train_images
    own = config.train_list is None and config.partition_by != "list"
    return PUBLISHED_TRAIN_IMAGES.get(config.dataset) if own else None


PUBLISHED_TRAIN_IMAGES = {"camvid": 367, "voc": 10582, "cityscapes": 2975}
