"""Checkpoints of RRN and CPS and ImageNet backbones: read without executing anything, recognised, checked, renamed."""

from __future__ import annotations

import mmap
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar  # type: ignore[import-not-found,unused-ignore]
from safetensors.torch import load as load_safetensors
from torch import Tensor

from rrn_core.weights import ANCHOR, BRANCHES, COUNTER, WeightsMetadata, check_archive, first_sentence, pack, recognise, shapes_of, shown

_NUMBERS: list[Any] = [
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))),
]
"""What a score saved as a NumPy number is made of; nothing of it runs code."""

_Names = dict[str, str]
"""Our name of a tensor, and its name in the file that is imported."""


@dataclass(frozen=True)
class Imported:
    """Weights read from a file of others, complete and of the right shapes."""

    facts: WeightsMetadata
    tensors: dict[str, Tensor]
    """By our names; float32, the counters of the normalisation int64."""
    matched: tuple[str, ...]
    """Our names of what the file holds."""
    missing: tuple[str, ...]
    """Counters of batches, which nothing reads, that the file lacks; they are 0."""
    unexpected: tuple[str, ...]
    """The file's names of what was left out: optimisers, a classifier of ImageNet, layers that nothing uses."""

    source: str
    """Name of the file; no part of `to_bytes`, so that equal tensors give equal bytes, and the same trials."""

    def to_bytes(self) -> bytes:
        return pack(self.tensors, self.facts)

    def __str__(self) -> str:
        facts = self.facts
        what = "a backbone" if facts.kind == "backbone" else f"both branches, {facts.num_classes} classes"
        judges = f"; D1 and D2: {facts.discriminator}" if facts.discriminator else ""
        lines = [f"{self.source}: {what}, {facts.backbone}{judges}", f"taken     {len(self.matched)} tensors"]
        if self.missing:
            lines.append(f"missing   {len(self.missing)} counters {COUNTER}, set to 0")
        if self.unexpected:
            groups = Counter(key.partition(".")[0] for key in self.unexpected)
            lines.append("left out  " + ", ".join(f"{name} ({count})" for name, count in groups.items()))
        return "\n".join(lines)


def read_released(file: Path) -> Imported:
    """A checkpoint of RRN or CPS, or an ImageNet backbone with a deep stem, as torch or safetensors file.

    Nesting and `module.` in front of names are ignored; backbone and number of classes follow from the shapes.

    Raises:
        ValueError: a file that is missing, damaged or holds more than tensors; networks that are not ours, with the first differences.
    """
    found = _read(file)
    try:
        return _recognise(found, file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read(file: Path) -> dict[str, Tensor]:
    """Every tensor of the file by its path of keys."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(file.read_bytes())
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                check_archive(archive, size=file.stat().st_size)
        _refuse_bytearray(file)
        with torch.serialization.safe_globals(_NUMBERS):
            return dict(_tensors(torch.load(file, map_location="cpu", weights_only=True), most=file.stat().st_size))
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL:? ([\w.]+)", str(error)):
            raise ValueError(
                f"{file}: holds {shown(code[1])} beside tensors; to load that could run code, so it is refused: if you trust its author, "
                "load it yourself and save its state_dict alone"
            ) from None
        raise ValueError(f"{file}: not a torch checkpoint; get it again") from None
    except Exception as error:  # the loaders raise many kinds for a damaged file
        raise ValueError(f"{file}: not readable ({first_sentence(error)}); get it again") from error


def _refuse_bytearray(file: Path) -> None:
    """Of all that torch allows, the one call that fills as much memory as the file claims; no checkpoint needs it."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as body:
        if body.find(b"\nbytearray\n") >= 0:
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")


def _tensors(value: Any, path: str = "", *, most: int, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every mapping is entered once: a small file can hold one that contains another twice, and so on. A tensor has `most` bytes."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.nbytes > min(most, value.untyped_storage().nbytes()):
            raise ValueError(f"{shown(path)} is not a plain tensor")
        yield path, value.detach()
    elif isinstance(value, Mapping) and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items():
            yield from _tensors(inner, f"{path}.{key}" if path else str(key), most=most, seen=seen)


def _recognise(found: Mapping[str, Tensor], file: Path) -> Imported:
    usable = [key for key in found if not any(part.startswith("optim") for part in key.split("."))]
    branches = _branch_names(usable)
    names = branches or _backbone_names(found, usable)
    facts, missing = recognise(shapes_of({name: found[key] for name, key in names.items()}))
    taken = names | (_discriminator_names(found, usable, inputs=(facts.num_classes or 0) + 3) if branches else {})
    tensors = {name: _own(name, found[key]) for name, key in taken.items()} | {name: torch.zeros((), dtype=torch.int64) for name in missing}
    facts = facts.model_copy(update={"discriminator": _discriminator_kind(tensors)})
    used = set(taken.values())
    return Imported(facts, tensors, tuple(taken), missing, tuple(key for key in found if key not in used), file.name)


def _branch_names(keys: Iterable[str]) -> _Names:
    names: _Names = {}
    for key in keys:
        parts = [part for part in key.split(".") if part != "module"]
        start = next((i for i, part in enumerate(parts) if part in BRANCHES), None)
        if start is None:
            continue
        name = ".".join(parts[start:])
        if name in names:
            raise ValueError(f"{shown(names[name])} and {shown(key)} both hold {shown(name)}; save the networks that you want alone")
        names[name] = key
    return names


def _backbone_names(found: Mapping[str, Tensor], keys: Iterable[str]) -> _Names:
    prefixes = _prefixes(keys, ANCHOR)
    if len(prefixes) != 1:
        what = f"{len(prefixes)} ResNets" if prefixes else "neither branch1.* and branch2.* nor a ResNet's layer1.*"
        raise ValueError(
            f"holds {what}, expected two branches or one ResNet; its keys start {', '.join(map(shown, list(found)[:3])) or 'nowhere'}"
        )
    prefix = prefixes[0]
    if prefix + "conv1.0.weight" not in found:
        stem = found.get(prefix + "conv1.weight")
        got = "another one" if stem is None else f"one convolution of {shown(' x '.join(map(str, stem.shape)), most=40)}"
        raise ValueError(
            f"its stem is {got}, expected three of 3 x 3 (conv1.0, conv1.3, conv1.6); use a v1c ResNet, such as resnet50_v1c.pth"
        )
    ours = re.compile(re.escape(prefix) + r"((conv1|bn1|layer[1-4])\..+)")
    return {f"backbone.{match[1]}": key for key in keys if (match := ours.fullmatch(key))}


def _discriminator_names(found: Mapping[str, Tensor], keys: Iterable[str], *, inputs: int) -> _Names:
    """Of exactly two discriminators of our form, for that many input channels; the first by name belongs to branch 1."""
    prefixes = [prefix for prefix in _prefixes(keys, "conv4.weight") if _is_discriminator(found, prefix, inputs)]
    if len(prefixes) != 2:
        return {}
    return {
        f"{ours}.{layer}": prefix + layer for ours, prefix in zip(("D1", "D2"), prefixes, strict=True) for layer in _layers(found, prefix)
    }


def _layers(found: Mapping[str, Tensor], prefix: str) -> list[str]:
    """`fc` beside a classifier is never used, and stays out."""
    last = "classifier" if f"{prefix}classifier.weight" in found else "fc"
    return [f"{layer}.{part}" for layer in ("conv1", "conv2", "conv3", "conv4", last) for part in ("weight", "bias")]


def _is_discriminator(found: Mapping[str, Tensor], prefix: str, inputs: int) -> bool:
    layers = _layers(found, prefix)
    if any(prefix + layer not in found for layer in layers):
        return False
    weights = [found[prefix + layer].shape for layer in layers if layer.endswith("weight")]
    if any(len(shape) < 2 for shape in weights):
        return False
    widths = [inputs, *(shape[0] for shape in weights)]
    return [shape[1] for shape in weights] == widths[:-1] and widths[-1] == 1


def _discriminator_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """By the last layer, as released: `pixel` has a 4 x 4 kernel, a region one of another size, `image` has no map at all."""
    if "D1.classifier.weight" in tensors:
        return "pixel" if tensors["D1.classifier.weight"].shape[-1] == 4 else "patch"
    return "image" if "D1.fc.weight" in tensors else None


def _prefixes(keys: Iterable[str], tensor: str) -> list[str]:
    """What stands before `tensor` in the keys that end with it, sorted."""
    return sorted(key.removesuffix(tensor) for key in keys if key == tensor or key.endswith(f".{tensor}"))


def _own(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(COUNTER):
        return tensor.long().clone()
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
        raise ValueError(f"{shown(name)} holds other values than finite numbers in floating point")
    return tensor.float().contiguous().clone()
