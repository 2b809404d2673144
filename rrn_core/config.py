"""Everything that changes a result (`TrainConfig`), and where it runs (`Runtime`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

PARTITIONS = ("1/16", "1/8", "1/4", "1/2", "full")


class Split(BaseModel):
    """The images of a run as its identity knows them: how many, and a SHA-256 of their names in order and by role, and of the classes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    labeled: Count
    unlabeled: Count
    val: Count
    sha256: Digest


class TrainConfig(BaseModel):
    """One training run as a value. The defaults are the default column of METHOD.md 1.6, VOC 2012 sizes.

    Numbers in brackets below are the paper's equations. Validation is strict: a string is never read as a
    number, an unknown key is refused, NaN and infinity are refused.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: Literal["supervised", "cps", "rrn"] = "rrn"
    """`supervised`: L_sup alone. `cps`: L_sup + lambda1 L_cps. `rrn`: all terms of (7, 8)."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seeds the initial weights, the data order, augmentation, CutMix boxes and dropout."""

    # data
    dataset: Literal["digits", "camvid", "voc", "cityscapes", "folder"] = "digits"
    train_list: str | None = None
    """File with the ordered training images, instead of the data set's own list. This and the two lists below are read in the spelling of
    CPS, of UniMatch or as bare names; a relative path starts at the sweep file, at the data root, or at the data set's own lists."""
    partition: str = "1/8"
    """Share of the training images whose labels are used: 1/16, 1/8, 1/4, 1/2, full, or `n:92` for a count."""
    partition_by: Literal["every_kth", "seeded", "balanced", "list"] = "every_kth"
    """`every_kth`: images 0, k, 2k, ... of the ordered list (CPS's and the paper's). `seeded`: a random draw.
    `balanced`: a seeded draw that evens out the number of images in which each class occurs.
    `list`: the images of `labeled_list`; `partition` is then no more than their name."""
    partition_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    labeled_list: str | None = None
    """File with the labelled images; `{k}` in its name stands for the 8 of "1/8" or the 92 of "n:92"."""
    unlabeled_list: str | None = None
    """File with the unlabelled images, like `labeled_list`; without it, the training images that `labeled_list` does not name."""
    split: Split | None = None
    """What the lists and the partition come to. A sweep fills it in from the data, so that other images make another run; training refuses
    images that differ. Unset, nothing is compared; `digits` needs none, its scenes are made from the settings."""
    image_size: Annotated[int, Field(ge=64, le=4096)] = 64
    """Side of a `digits` scene in pixels; other data sets have their own sizes."""
    train_images: Count = 512
    """Number of `digits` training scenes; other data sets have their own lists."""
    val_images: Count = 64
    """Number of `digits` validation scenes."""
    crop: Annotated[int, Field(ge=64, le=4096)] = 512
    """Side of the square training crop and of the evaluation window, in pixels."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    """Random resize factors, drawn uniformly (1.25 is missing in the release too)."""
    hflip: Probability = 0.5
    cutmix_boxes: Count = 3
    """Boxes XOR-ed into one CutMix mask (French et al.)."""
    cutmix_area: tuple[Probability, Probability] = (0.25, 0.5)
    """Range of the share of the image that all boxes together would cover if none overlapped."""

    # networks
    backbone: Literal["tiny", "resnet18", "resnet50", "resnet101"] = "resnet50"
    init_weights: str | None = None
    """Weights to start from, as `rrn-sweep weights import` writes them: a path, which if relative starts at the sweep file or at the data
    root, or (in a sweep) `store:` and a key of the store.
    An ImageNet backbone starts both branches; whole branches, and discriminators where the file has them, start the same parts."""
    init_sha256: Digest | None = None
    """SHA-256 of that file. A sweep fills it in; training refuses other contents."""
    discriminator: Literal["patch", "image", "pixel"] = "patch"
    """`patch`: one score per region (the paper). `image`: one per image (the released script). `pixel`: one per pixel."""
    discriminator_width: Count = 64
    """Channels of the discriminator's first convolution; the next three have 2, 4 and 8 times as many."""
    region_kernel: Count = 10
    """Kernel and stride of the patch classifier on the conv4 map (1/16 of the crop): a region spans 16 x this many pixels."""
    feature_pool: Count | Literal["auto", "global"] = "auto"
    """Kernel of the average pooling before feature matching. `auto`: 20, or 50 on a conv4 map of at least 50, as released; `global`
    where the map is below 20 or would pool to more than one cell."""

    # objective
    eps: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Threshold of the region-consistency map (1, 3). The loss reads it, nothing else does."""
    lambda1: NonNegative = 1.0
    """Weight of L_cps (5, 6)."""
    lambda2: NonNegative = 1.0
    """Weight of L_dr (3), or of L_ls (1) where `drlc` is off."""
    lambda3: NonNegative = 0.1
    """Weight of feature matching L_f (2)."""
    drlc: bool = True
    """Dynamic region loss: both discriminators judge each branch (3). Off: each branch by its own discriminator only (1)."""
    drlc_weighting: Literal["sum_of_masked_means", "eq3_mean_all", "eq3_mean_selected"] = "sum_of_masked_means"
    region_upsample: Literal["bilinear", "nearest", "footprint", "threshold_first"] = "bilinear"
    """How a region map becomes a pixel mask. `footprint`: each region covers its true cells, the rest of the crop is never selected.
    `threshold_first`: bilinear, but the thresholded map is up-sampled and cut at 1/2."""
    gate: Literal["ge", "gt"] = "ge"
    """A region is selected where rc >= eps (paper) or rc > eps (release)."""
    region_label: Literal["own", "teacher", "cross"] = "own"
    """Target of the region loss: the branch's own argmax on the mixed image, its teacher's mixed label, or the other teacher's."""
    region_loss_from_epoch: Annotated[int, Field(ge=0)] = 1
    """Cold start: L_dr is zero before this epoch (counted from 0)."""
    judge_dropout: bool = True
    """Dropout of the discriminators stays active while they judge (as released). Off: a deterministic gate."""
    discriminator_scaling: Literal["batch", "per_image", "unnormalise"] = "batch"
    """How an image is brought to [0, 1] for the discriminators: min/max over the batch, over each image, or the stored pixel value."""
    mask_void: bool = False
    """Zero the discriminators' whole input where the labelled image is void (255)."""
    feature_matching: Literal["mean", "sum"] = "mean"
    """L_f as the mean over channels (release) or the L1 norm (2)."""
    cps_on_labeled: bool = False
    """Adds the labelled images' half of L_cps (5)."""
    supervised_ce: Literal["plain", "ohem"] = "plain"
    """L_sup over all labelled pixels, or online hard example mining: only over those that are predicted badly (CPS on Cityscapes)."""
    ohem_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Pixels whose true class has at most this probability are hard."""
    ohem_min_kept: Count = 50_000
    """At least so many pixels per image of the batch count as hard, the worst ones first."""

    # optimisation
    batch_size: Annotated[int, Field(ge=2)] = 6
    """Images per stream (labelled, u0, u1) and step; at least 2, because ASPP normalises a 1x1 map over the batch."""
    accumulate: Count = 1
    """Iterations whose gradients are averaged into one optimiser step; every epoch starts a new group, its last iteration ends one."""
    epochs: Count = 32
    lr: Positive = 0.0025
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4
    poly_power: NonNegative = 0.9
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    discriminator_lr: Positive = 1e-4
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: the networks run under autocast; every loss stays in float32."""

    # evaluation
    ensemble: Literal["none", "logits", "prob"] = "logits"
    """What `val/miou` is: branch 1 alone, or the weighted mean of both branches' logits or probabilities."""
    ensemble_weight: Probability = 0.5
    """Weight of branch 1 in the ensemble."""
    eval_batch: Count = 8
    """Windows per forward pass in evaluation."""

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, value: str) -> str:
        counted = value.startswith("n:") and value[2:].isdecimal() and int(value[2:]) >= 1
        if value not in PARTITIONS and not counted:
            choices = ", ".join(f'"{p}"' for p in PARTITIONS)
            raise PydanticCustomError("partition", 'must be one of {choices}, or "n:92" for a count', {"choices": choices})
        return value

    @field_validator("cutmix_area")
    @classmethod
    def _ordered_area(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise PydanticCustomError("cutmix_area", "must be [smallest, largest]", {})
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

    @model_validator(mode="after")
    def _fits_the_crop(self) -> Self:
        """The discriminators halve the crop four times: refuse what does not fit their last map, with the arithmetic."""
        if self.method != "rrn":
            return self
        side = self.conv4_side
        shape = f"crop {self.crop} gives a conv4 map of {side} x {side} (crop / 16)"
        if self.discriminator == "patch" and self.region_kernel > side:
            raise PydanticCustomError(
                "region_kernel",
                "region_kernel {k} does not fit: {shape}; set region_kernel <= {side} or crop >= {crop}",
                {"k": self.region_kernel, "shape": shape, "side": side, "crop": 16 * self.region_kernel},
            )
        if isinstance(self.feature_pool, int) and not side / 2 < self.feature_pool <= side:
            raise PydanticCustomError(
                "feature_pool",
                "feature_pool {k} does not give one cell: {shape}; set feature_pool to {low}..{side}, auto or global",
                {"k": self.feature_pool, "shape": shape, "side": side, "low": side // 2 + 1},
            )
        return self

    @property
    def conv4_side(self) -> int:
        """Side of the discriminator's last feature map for a training crop."""
        return self.crop // 16

    @property
    def pool_kernel(self) -> int:
        """`feature_pool` resolved for this crop; the whole map where it is global."""
        side = self.conv4_side
        if isinstance(self.feature_pool, int):
            return self.feature_pool
        if self.feature_pool == "auto" and (20 <= side < 40 or 50 <= side < 100):
            return 20 if side < 40 else 50
        return side

    @property
    def partition_number(self) -> str:
        """What `{k}` stands for in the name of a list: 8 of "1/8", 92 of "n:92", full."""
        return self.partition.removeprefix("1/").removeprefix("n:")

    def identity(self) -> dict[str, Any]:
        """Every setting as JSON holds it. Where the contents of lists and weights are known, they count, and not where the files lay."""
        settings = self.model_dump(mode="json")
        if self.split:
            settings |= {"train_list": None, "labeled_list": None, "unlabeled_list": None}
        if self.init_sha256:
            settings["init_weights"] = None
        return settings

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
