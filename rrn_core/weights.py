"""Weights as files: safetensors under the names of a quartet's parameters, with what the file says of itself, to and from networks."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rrn_core.config import TrainConfig
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.quartet import Quartet, quartet_of
from rrn_core.networks.resnet import branch_spec
from rrn_core.presets import PRESETS
from rrn_core.setting import setting_of

WEIGHTS = "model.safetensors"
"""Name of the networks' file in a checkpoint."""

BACKBONES: tuple[str, ...] = get_args(TrainConfig.model_fields["backbone"].annotation)

_FACTS = "rrn-sweep"
"""The only key of the metadata: safetensors writes several in an order that changes from run to run."""

COUNTER = "num_batches_tracked"
BRANCHES = ("branch1", "branch2")
ANCHOR = "layer1.0.conv1.weight"
"""A tensor that every ResNet has."""

Shapes = Mapping[str, tuple[int, ...]]


class WeightsMetadata(BaseModel):
    """What a weights file says of itself."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["branches", "backbone"]
    """`branches`: branch1.*, branch2.*, and D1.*, D2.* where there are discriminators. `backbone`: backbone.* alone."""
    backbone: str
    num_classes: int | None = None
    discriminator: str | None = None
    """Kind of the discriminators in the file."""
    config: dict[str, Any] | None = None
    """Settings of the run, where the file is a checkpoint of ours."""


@dataclass(frozen=True)
class Model:
    """Both branches in eval mode, without discriminators, and the settings to evaluate them with."""

    quartet: Quartet
    num_classes: int
    config: TrainConfig
    """The run's settings, or the defaults for an imported file, with the caller's changes. What concerns training alone is reset."""
    facts: WeightsMetadata


def pack(tensors: Mapping[str, Tensor], facts: WeightsMetadata) -> bytes:
    """A safetensors file; equal values give equal bytes."""
    text = json.dumps(facts.model_dump(mode="json", exclude_none=True), sort_keys=True, separators=(",", ":"))
    return save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata={_FACTS: text})


def unpack(body: bytes) -> tuple[dict[str, Tensor], WeightsMetadata]:
    """What `pack` wrote. Raises ValueError for a damaged file, or one that something else wrote."""
    tensors = load_tensors(body)
    facts = _metadata(body)
    if facts is None:
        raise ValueError("the file does not say what it holds; convert it with rrn-sweep weights import")
    return tensors, facts


def load_tensors(body: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError for a damaged one."""
    try:
        return dict(load_safetensors(body))
    except Exception as error:  # the loader raises many kinds for a damaged file
        raise ValueError(f"not a readable safetensors file ({first_sentence(error)})") from error


def header_of(body: bytes) -> dict[str, str]:
    """The texts that a readable safetensors file carries beside its tensors."""
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    return dict(header.get("__metadata__") or {})


def initialise(quartet: Quartet, body: bytes, *, sha256: str | None = None) -> str:
    """Put the weights of a file that `pack` wrote into a fresh quartet, and say in one line what was put where.

    A backbone goes into both branches. Branches go in whole, and their discriminators where both sides have the same kind and sizes.

    Raises:
        ValueError: contents other than `sha256`, another backbone, another number of classes.
    """
    if sha256 and (found := hashlib.sha256(body).hexdigest()) != sha256:
        raise ValueError(f"init_weights: planned with SHA-256 {sha256[:12]}, found {found[:12]}; restore the file, or plan anew")
    try:
        tensors, facts = unpack(body)
        _match(quartet, facts)
        if facts.kind == "backbone":
            for branch in (quartet.branch1, quartet.branch2):
                _load(branch.backbone, tensors, "backbone.")
            return f"backbone {facts.backbone} in both branches"
        for name in BRANCHES:
            _load(quartet.get_submodule(name), tensors, f"{name}.")
        return f"both branches; {_start_discriminators(quartet, tensors, facts)}"
    except ValueError as error:
        raise ValueError(f"init_weights: {error}") from None


def load_model(source: Path | bytes, *, name: str = "checkpoint", changes: Mapping[str, Any] | None = None) -> Model:
    """Both branches of a checkpoint (its folder, its `model.safetensors`, or the bytes of that) or of an imported file.

    Args:
        name: what to call bytes in an error.
        changes: settings by name, as JSON would hold them, instead of the file's own.

    Raises:
        ValueError: a file without both branches, or settings that cannot be.
    """
    body, where = (source, name) if isinstance(source, bytes) else _body(source)
    try:
        tensors, facts = unpack(body)
        if facts.kind == "backbone" or facts.num_classes is None:
            raise ValueError("holds a backbone alone; there is nothing to evaluate before it was trained")
        config = _evaluation_config(facts, changes or {})
        branches = {name: tensor for name, tensor in tensors.items() if name.startswith(BRANCHES)}
        _check_facts(facts, recognise(shapes_of(branches))[0])
        quartet = quartet_of(branches, facts.backbone, facts.num_classes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except RuntimeError as error:  # tensors that contradict the facts
        raise ValueError(f"{where}: {first_sentence(error)}") from error
    return Model(quartet.eval(), facts.num_classes, config, facts)


def recognise(shapes: Shapes) -> tuple[WeightsMetadata, tuple[str, ...]]:
    """Kind, backbone and number of classes of tensors by their names and shapes, and the counters of batches that are missing.

    Raises:
        ValueError: they are not a backbone or two branches of ours, with the first differences.
    """
    kind: Literal["branches", "backbone"] = "backbone" if f"backbone.{ANCHOR}" in shapes else "branches"
    prefix = "backbone." if kind == "backbone" else "branch1.backbone."
    classifier = shapes.get("branch1.classifier.weight")
    facts = WeightsMetadata(kind=kind, backbone=_backbone_name(shapes, prefix), num_classes=classifier[0] if classifier else None)
    expected = _expected(facts)
    _compare(shapes, expected, facts)
    return facts, tuple(name for name in expected if name not in shapes)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def first_sentence(error: Exception) -> str:
    """Of an error of a library, on one line."""
    return shown(" ".join(str(error).split()).partition(". ")[0], most=160) or type(error).__name__


def shown(text: str, *, most: int = 80) -> str:
    """A text that a file made up, fit for one line of a terminal."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[: most + 1])
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def check_archive(archive: zipfile.ZipFile, *, size: int) -> None:
    """Raises ValueError for an archive of `size` bytes that would fill more memory than that: torch compresses nothing."""
    parts = archive.infolist()
    if sum(part.file_size for part in parts) > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are compressed, which torch never does")


def training_metadata(config: TrainConfig, quartet: Quartet) -> WeightsMetadata:
    """What a checkpoint of a run says of itself."""
    return WeightsMetadata(
        kind="branches",
        backbone=config.backbone,
        num_classes=quartet.branch1.classifier.out_channels,
        discriminator=quartet.D1.kind if quartet.D1 else None,
        config=config.identity(),
    )


def _backbone_name(shapes: Shapes, prefix: str) -> str:
    if prefix + ANCHOR not in shapes:
        raise ValueError(f"{prefix}{ANCHOR} is missing; expected a DeepLabv3+ on a ResNet, as RRN and CPS save it")
    block = "bottleneck" if f"{prefix}layer1.0.conv3.weight" in shapes else "basic"
    blocks = tuple(_count(shapes, rf"{prefix}layer{stage}\.(\d+)\.conv1\.weight") for stage in (1, 2, 3, 4))
    width = shapes[prefix + ANCHOR][:1]
    for name in BACKBONES:
        spec = branch_spec(name)
        if (spec.block, spec.blocks, spec.widths[:1]) == (block, blocks, width):
            return name
    got = f"{block} blocks {', '.join(map(str, blocks))} of {_size(width)} channels"
    raise ValueError(f"its ResNet has {got}, which is none of {', '.join(BACKBONES)}")


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


def _expected(facts: WeightsMetadata) -> Shapes:
    try:
        with torch.device("meta"):
            branch = Branch(facts.backbone, facts.num_classes or 1)
    except RuntimeError:
        raise ValueError(f"its classifier would have {facts.num_classes} classes") from None
    shapes = shapes_of(branch.state_dict())
    if facts.kind == "backbone":
        return {name: shape for name, shape in shapes.items() if name.startswith("backbone.")}
    return {f"{which}.{name}": shape for which in BRANCHES for name, shape in shapes.items()}


def _compare(got: Shapes, expected: Shapes, facts: WeightsMetadata) -> None:
    """Raises ValueError with the first differences; counters may be missing."""
    faults = [f"{name} is missing" for name in expected if name not in got and not name.endswith(COUNTER)]
    faults += [f"{shown(name)} is not ours" for name in got if name not in expected]
    wrong = [name for name, shape in got.items() if expected.get(name, shape) != shape]
    faults += [f"{name} is {shown(_size(got[name]), most=40)}, expected {_size(expected[name])}" for name in wrong]
    if faults:
        what = facts.backbone if facts.kind == "backbone" else f"two branches on {facts.backbone} with {facts.num_classes} classes"
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"looks like {what}, but {'; '.join(faults[:3])}{more}")


def _match(quartet: Quartet, facts: WeightsMetadata) -> None:
    """Raises ValueError where the quartet is of other sizes."""
    asked = _backbone_name(shapes_of(quartet.branch1.state_dict()), "backbone.")
    if facts.backbone != asked:
        raise ValueError(f"the weights are of {facts.backbone}, the run is of {asked}; set backbone: {facts.backbone}")
    classes = quartet.branch1.classifier.out_channels
    if facts.kind == "branches" and facts.num_classes != classes:
        raise ValueError(f"the weights are for {facts.num_classes} classes, the data have {classes}; start from an ImageNet backbone")


def _check_facts(said: WeightsMetadata, found: WeightsMetadata) -> None:
    """Raises ValueError where a file says of itself what its tensors are not."""
    if (said.backbone, said.num_classes) != (found.backbone, found.num_classes):
        told = f"{shown(said.backbone)} with {shown(str(said.num_classes))} classes"
        raise ValueError(f"says that it holds {told}, but its tensors are {found.backbone} with {found.num_classes}; get it again")


def _start_discriminators(quartet: Quartet, tensors: Mapping[str, Tensor], facts: WeightsMetadata) -> str:
    if quartet.D1 is None:
        return "the method has no discriminators"
    if facts.discriminator is None:
        return "discriminators as drawn, the file has none"
    if facts.discriminator != quartet.D1.kind:
        return f"discriminators as drawn, those of the file are of kind {facts.discriminator}, the run's of kind {quartet.D1.kind}"
    for name, judge in zip(("D1", "D2"), quartet.discriminators(), strict=True):
        if shapes_of(judge.state_dict()) != shapes_of(_part(tensors, f"{name}.")):
            return "discriminators as drawn, those of the file are of other sizes"
    for name, judge in zip(("D1", "D2"), quartet.discriminators(), strict=True):
        _load(judge, tensors, f"{name}.")
    return "both discriminators"


def _load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    try:
        module.load_state_dict(_part(tensors, prefix))
    except RuntimeError as error:
        raise ValueError(first_sentence(error)) from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _body(source: Path) -> tuple[bytes, Path]:
    file = source / WEIGHTS if source.is_dir() else source
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    return file.read_bytes(), file


def _evaluation_config(facts: WeightsMetadata, changes: Mapping[str, Any]) -> TrainConfig:
    """The settings that an evaluation reads: those that all methods have, without the images and weights of the training."""
    if changes.get("backbone", facts.backbone) != facts.backbone:
        raise ValueError(f"backbone: the weights are of {facts.backbone}, got {changes['backbone']}; leave it out")
    protocol = PRESETS["cityscapes"] if changes.get("dataset") == "cityscapes" else {}  # its windows have another size
    stored = facts.config or protocol | {"backbone": facts.backbone}
    kept = {name: value for name, value in stored.items() if name in TrainConfig.model_fields and name not in _TRAINING_INPUTS}
    try:
        return TrainConfig.model_validate_json(json.dumps(kept | dict(changes), default=str))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}" for fault in error.errors())
        raise ValueError("; ".join(shown(fault, most=120) for fault in islice(faults, 3))) from None


_TRAINING_INPUTS = {
    "init_weights",
    *(name for name, field in TrainConfig.model_fields.items() if setting_of(field).data in ("list", "partition", "contents")),
}
"""Settings that name the images and weights of a training, which need not be there to evaluate it."""


def _metadata(body: bytes) -> WeightsMetadata | None:
    """What a readable safetensors file of ours says of itself; None of a file that something else wrote."""
    text = header_of(body).get(_FACTS)
    try:
        return None if text is None else WeightsMetadata.model_validate_json(text)
    except ValidationError as error:
        raise ValueError("what the file says of itself was written by another version; import its source again") from error


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
