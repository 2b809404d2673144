"""Weights files: safetensors with the parameter names of a quartet and with metadata, to and from networks."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rrn_core.class_names import order_of
from rrn_core.config import TrainConfig
from rrn_core.errors import ConfigError, DataError
from rrn_core.evaluation_settings import evaluation_config
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.quartet import Quartet, quartet_of
from rrn_core.networks.resnet import branch_spec
from rrn_core.untrusted_text import faults_of, first_sentence, printable

WEIGHTS = "model.safetensors"
"""Name of the weights file in a checkpoint."""

BACKBONES: tuple[str, ...] = get_args(TrainConfig.model_fields["backbone"].annotation)

_METADATA_KEY = "rrn-sweep"
"""The only key of the metadata in the header: safetensors writes several keys in an order that changes from run to run."""

COUNTER = "num_batches_tracked"
"""End of the names of batch normalisation's counters, which nothing reads."""
BRANCHES = ("branch1", "branch2")
ANCHOR = "layer1.0.conv1.weight"
"""Name of a tensor that every ResNet has."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


class WeightsMetadata(BaseModel):
    """The metadata of a weights file. Releases read each other's files, so the names and meanings of these fields are fixed."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["branches", "backbone"]
    """`branches`: branch1.*, branch2.* and, if there are discriminators, D1.* and D2.*. `backbone`: backbone.* alone."""
    backbone: str
    """The setting `backbone` that the tensors fit."""
    num_classes: int | None = None
    """Number of classes of the branches; None for a backbone."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of the scores; None for a backbone, an imported file, and in files of releases up to 0.1."""
    discriminator: str | None = None
    """Kind of the discriminators in the file; None if there are none."""
    config: dict[str, Any] | None = None
    """The settings of the run, in a checkpoint; None in an imported file."""

    @model_validator(mode="after")
    def _one_name_a_class(self) -> Self:
        names = self.classes
        if names is not None and (len(names) != self.num_classes or len(set(names)) != len(names) or not all(map(_is_name, names))):
            raise ValueError(f"classes: must be {self.num_classes} different names")
        return self


@dataclass(frozen=True)
class Model:
    """Both branches in eval mode, without discriminators, and the settings to evaluate them with."""

    quartet: Quartet
    num_classes: int
    config: TrainConfig
    """The run's settings, or the defaults for an imported file, with the caller's changes. The images and weights of the training are
    left out."""
    metadata: WeightsMetadata

    def order(self, classes: Sequence[str], *, remedy: str) -> tuple[int, ...]:
        """The index in the model of each of the data's classes. A file without names has their order.

        Raises:
            DataError: other classes, or without names another number of classes; the text ends with `remedy`.
        """
        return _order(self.metadata, classes, remedy=remedy)

    def ordered_as(self, classes: Sequence[str], *, remedy: str) -> Model:
        """The model with its scores in the order of the data's `classes`. Raises DataError as `order`."""
        order = self.order(classes, remedy=remedy)
        if order == tuple(range(self.num_classes)):
            return self
        quartet = quartet_of(_reordered(self.quartet.state_dict(), order), self.metadata.backbone, self.num_classes)
        return replace(self, quartet=quartet.eval(), metadata=self.metadata.model_copy(update={"classes": tuple(classes)}))


def pack(tensors: Mapping[str, Tensor], metadata: WeightsMetadata) -> bytes:
    """A safetensors file with metadata. Equal tensors and metadata give equal bytes."""
    text = json.dumps(metadata.model_dump(mode="json", exclude_none=True), sort_keys=True, separators=(",", ":"))
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save_safetensors(contiguous, metadata={_METADATA_KEY: text})


def unpack(body: bytes) -> tuple[dict[str, Tensor], WeightsMetadata]:
    """The tensors and the metadata of a file that `pack` has written.

    Raises:
        DataError: the file is damaged, or `pack` has not written it.
    """
    tensors = load_tensors(body)
    metadata = _metadata(body)
    if metadata is None:
        raise DataError("the file does not say what it holds: its metadata is missing; convert it with rrn-sweep weights import")
    return tensors, metadata


def load_tensors(body: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises DataError if it is damaged."""
    try:
        return dict(load_safetensors(body))
    except Exception as error:  # for a damaged file the loader raises exceptions of many kinds
        raise DataError(f"not a readable safetensors file ({first_sentence(error)})") from error


def header_of(body: bytes) -> dict[str, str]:
    """The metadata of a readable safetensors file as texts by key."""
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    return dict(header.get("__metadata__") or {})


def initialise(quartet: Quartet, body: bytes, *, classes: Sequence[str], sha256: str | None = None) -> str:
    """Copy the weights of a file that `pack` has written into a new quartet, and return one line that says which parts were copied.

    A backbone is copied into both branches. Other files hold both branches, and discriminators, which are copied if the quartet's have the
    same kind and sizes. Classes that the file has in another order than the data are put into the order of the data.

    Args:
        classes: names of the data's classes in order.
        sha256: expected SHA-256 of `body`. Unset: any.

    Raises:
        DataError: a damaged file, contents other than `sha256`, another backbone, or other classes.
    """
    if sha256 and (found := hashlib.sha256(body).hexdigest()) != sha256:
        raise DataError(f"init_weights: planned with SHA-256 {sha256[:12]}, found {found[:12]}; restore the file, or plan the sweep again")
    try:
        tensors, metadata = unpack(body)
        _match(quartet, metadata)
        if metadata.kind == "backbone":
            for branch in (quartet.branch1, quartet.branch2):
                _load(branch.backbone, tensors, "backbone.")
            return f"backbone {metadata.backbone} in both branches"
        unnamed = "" if metadata.classes else "; the file does not name its classes, so they are matched by number"
        tensors = _reordered(tensors, _order(metadata, classes, remedy="start from an ImageNet backbone"))
        for name in BRANCHES:
            _load(quartet.get_submodule(name), tensors, f"{name}.")
        return f"both branches; {_start_discriminators(quartet, tensors, metadata)}{unnamed}"
    except DataError as error:
        raise DataError(f"init_weights: {error}") from None


def load_model(source: Path | bytes, *, name: str = "checkpoint", changes: Mapping[str, Any] | None = None) -> Model:
    """Both branches of a checkpoint (its folder, its `model.safetensors`, or the bytes of that file) or of an imported file.

    Args:
        name: name of `source` in errors, if it is bytes.
        changes: settings by name, as JSON holds them, that replace those of the file.

    Raises:
        DataError: a file that is missing or damaged, or that does not hold both branches.
        ConfigError: `changes` that cannot be used.
    """
    body, where = (source, name) if isinstance(source, bytes) else _body(source)
    try:
        tensors, metadata = unpack(body)
        if metadata.kind == "backbone" or metadata.num_classes is None:
            raise DataError("holds a backbone alone, which cannot be evaluated; train it first")
        config = evaluation_config(metadata.config, metadata.backbone, changes or {})
        branches = {name: tensor for name, tensor in tensors.items() if name.startswith(BRANCHES)}
        _check_metadata(metadata, recognise(shapes_of(branches))[0])
        quartet = quartet_of(branches, metadata.backbone, metadata.num_classes)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{where}: {error}") from None
    except RuntimeError as error:  # tensors that contradict the metadata
        raise DataError(f"{where}: {first_sentence(error)}") from error
    return Model(quartet.eval(), metadata.num_classes, config, metadata)


def recognise(shapes: Shapes) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """Kind, backbone and number of classes of tensors by their names and shapes, and the names of missing counters of batches.

    Raises:
        DataError: the tensors are not a backbone or two branches of this program; it names the first differences.
    """
    kind: Literal["branches", "backbone"] = "backbone" if f"backbone.{ANCHOR}" in shapes else "branches"
    prefix = "backbone." if kind == "backbone" else "branch1.backbone."
    classifier = shapes.get("branch1.classifier.weight")
    metadata = WeightsMetadata(kind=kind, backbone=_backbone_name(shapes, prefix), num_classes=classifier[0] if classifier else None)
    expected = _expected(metadata)
    _compare(shapes, expected, metadata)
    return metadata, tuple(name for name in expected if name not in shapes)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_archive(archive: zipfile.ZipFile, *, size: int) -> None:
    """Raise DataError if an archive of `size` bytes is compressed. Its parts could fill much more memory, and torch never compresses."""
    parts = archive.infolist()
    if sum(part.file_size for part in parts) > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise DataError("its parts are compressed, which torch never does")


def training_metadata(config: TrainConfig, quartet: Quartet, classes: Sequence[str] | None = None) -> WeightsMetadata:
    """The metadata of a checkpoint. `classes`: names of the data's classes in order."""
    return WeightsMetadata(
        kind="branches",
        backbone=config.backbone,
        num_classes=quartet.branch1.classifier.out_channels,
        classes=None if classes is None else tuple(classes),
        discriminator=quartet.D1.kind if quartet.D1 else None,
        config=config.model_dump(mode="json") | config.identity(),  # without paths; with the values that an identity leaves out
    )


def _backbone_name(shapes: Shapes, prefix: str) -> str:
    if prefix + ANCHOR not in shapes:
        raise DataError(f"{prefix}{ANCHOR} is missing; expected a DeepLabv3+ on a ResNet, as RRN and CPS save it")
    block = "bottleneck" if f"{prefix}layer1.0.conv3.weight" in shapes else "basic"
    blocks = tuple(_count(shapes, rf"{prefix}layer{stage}\.(\d+)\.conv1\.weight") for stage in (1, 2, 3, 4))
    width = shapes[prefix + ANCHOR][:1]
    alike = [name for name in BACKBONES if _sizes(name) == (block, blocks, width)]
    stem = shapes.get(f"{prefix}conv1.0.weight", ())[:1]
    if alike:  # of an unknown width of the stem, the first: the shapes are compared next
        return next((name for name in alike if (branch_spec(name).stem,) == stem), alike[0])
    got = f"{block} blocks {', '.join(map(str, blocks))} of {_size(width)} channels"
    raise DataError(f"its ResNet has {got}, which is none of {', '.join(BACKBONES)}")


def _sizes(backbone: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    spec = branch_spec(backbone)
    return spec.block, spec.blocks, spec.widths[:1]


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


def _expected(metadata: WeightsMetadata) -> Shapes:
    """The tensors that a file with this metadata holds, without discriminators."""
    try:
        with torch.device("meta"):
            branch = Branch(metadata.backbone, metadata.num_classes or 1)
    except RuntimeError:
        raise DataError(f"its classifier would have {metadata.num_classes} classes") from None
    shapes = shapes_of(branch.state_dict())
    if metadata.kind == "backbone":
        return {name: shape for name, shape in shapes.items() if name.startswith("backbone.")}
    return {f"{branch_name}.{name}": shape for branch_name in BRANCHES for name, shape in shapes.items()}


def _compare(got: Shapes, expected: Shapes, metadata: WeightsMetadata) -> None:
    """Raise DataError with the first differences. Counters may be missing."""
    faults = [f"{name} is missing" for name in expected if name not in got and not name.endswith(COUNTER)]
    faults += [f"{printable(name)} is unknown" for name in got if name not in expected]
    wrong = [name for name, shape in got.items() if expected.get(name, shape) != shape]
    faults += [f"{name} is {printable(_size(got[name]), longest=40)}, expected {_size(expected[name])}" for name in wrong]
    if faults:
        branches = f"two branches on {metadata.backbone} with {metadata.num_classes} classes"
        what = metadata.backbone if metadata.kind == "backbone" else branches
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise DataError(f"looks like {what}, but {'; '.join(faults[:3])}{more}")


def _match(quartet: Quartet, metadata: WeightsMetadata) -> None:
    """Raise DataError if the quartet has another backbone."""
    own = _backbone_name(shapes_of(quartet.branch1.state_dict()), "backbone.")
    if metadata.backbone != own:
        raise DataError(f"the weights are of {metadata.backbone}, the run is of {own}; set backbone: {metadata.backbone}")


def _check_metadata(metadata: WeightsMetadata, found: WeightsMetadata) -> None:
    """Raise DataError if the metadata contradicts what the tensors were recognised as."""
    if (metadata.backbone, metadata.num_classes) != (found.backbone, found.num_classes):
        claim = f"{printable(metadata.backbone)} with {printable(str(metadata.num_classes))} classes"
        raise DataError(f"says that it holds {claim}, but its tensors are {found.backbone} with {found.num_classes}; get the file again")


def _order(metadata: WeightsMetadata, classes: Sequence[str], *, remedy: str) -> tuple[int, ...]:
    """The index in the file of each of the data's classes. Raises DataError as `Model.order`."""
    if metadata.classes is not None:
        return order_of(classes, metadata.classes, remedy=remedy)
    if metadata.num_classes != len(classes):
        raise DataError(f"the weights are for {metadata.num_classes} classes, the data have {len(classes)}; {remedy}")
    return tuple(range(len(classes)))


def _reordered(tensors: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """Branches and discriminators whose class k is class `order[k]` of `tensors`."""
    chosen = list(order)
    inputs = [*chosen, *range(len(chosen), len(chosen) + 3)]  # a discriminator sees the classes, then red, green and blue

    def moved(name: str, tensor: Tensor) -> Tensor:
        if name.partition(".")[2] in ("classifier.weight", "classifier.bias") and name.startswith(BRANCHES):
            return tensor[chosen]
        if name in ("D1.conv1.weight", "D2.conv1.weight") and tensor.shape[1:2] == (len(inputs),):
            return tensor[:, inputs]
        return tensor

    return {name: moved(name, tensor) for name, tensor in tensors.items()}


def _start_discriminators(quartet: Quartet, tensors: Mapping[str, Tensor], metadata: WeightsMetadata) -> str:
    """Copy the discriminators if they fit, and say in a few words whether they were copied."""
    if quartet.D1 is None:
        return "the method has no discriminators"
    if metadata.discriminator is None:
        return "discriminators start at random: the file has none"
    if metadata.discriminator != quartet.D1.kind:
        return f"discriminators start at random: the file's are of kind {metadata.discriminator}, the run's of kind {quartet.D1.kind}"
    for name, discriminator in zip(("D1", "D2"), quartet.discriminators(), strict=True):
        if shapes_of(discriminator.state_dict()) != shapes_of(_part(tensors, f"{name}.")):
            return "discriminators start at random: the file's are of other sizes"
    for name, discriminator in zip(("D1", "D2"), quartet.discriminators(), strict=True):
        _load(discriminator, tensors, f"{name}.")
    return "both discriminators"


def _load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    try:
        module.load_state_dict(_part(tensors, prefix))
    except RuntimeError as error:
        raise DataError(first_sentence(error)) from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _body(source: Path) -> tuple[bytes, Path]:
    file = source / WEIGHTS if source.is_dir() else source
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    return file.read_bytes(), file


def _metadata(body: bytes) -> WeightsMetadata | None:
    """The metadata of a readable safetensors file; None if this program has not written it."""
    text = header_of(body).get(_METADATA_KEY)
    try:
        return None if text is None else WeightsMetadata.model_validate_json(text)
    except ValidationError as error:
        raise DataError(
            f"its metadata was written by another version of this program ({faults_of(error, most=1)}); import the source file again"
        ) from error


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 100 and text.isprintable()


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
