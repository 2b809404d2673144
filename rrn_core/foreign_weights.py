"""Imports weights: checkpoints of the released RRN and CPS code, and ImageNet backbones. No code of a file is executed."""

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

from rrn_core.errors import DataError
from rrn_core.untrusted_text import first_sentence, printable
from rrn_core.weights import ANCHOR, BRANCHES, COUNTER, WeightsMetadata, check_archive, pack, recognise, shapes_of

_NUMBERS: list[Any] = [
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))),
]
"""The classes that a NumPy number is pickled with, such as a score in a checkpoint. None of them executes code."""

_Names = dict[str, str]
"""The names of tensors in the imported file, by their names in a quartet."""


@dataclass(frozen=True)
class Imported:
    """Weights from a foreign file, complete and with the right shapes."""

    metadata: WeightsMetadata
    tensors: dict[str, Tensor]
    """The tensors by their names in a quartet: float32, or int64 for the counters of batch normalisation."""
    matched: tuple[str, ...]
    """Names, in a quartet, of the tensors that the file holds."""
    missing: tuple[str, ...]
    """Names of counters of batches that the file lacks. They are 0; nothing reads them."""
    unexpected: tuple[str, ...]
    """Names, in the file, of tensors that are left out: optimisers, the classifier of ImageNet, unused layers."""

    source: str
    """Name of the file. It is not part of `to_bytes`, so equal tensors give equal bytes and the same trials."""

    def to_bytes(self) -> bytes:
        """The weights file."""
        return pack(self.tensors, self.metadata)

    def __str__(self) -> str:
        metadata = self.metadata
        what = "a backbone" if metadata.kind == "backbone" else f"both branches, {metadata.num_classes} classes"
        discriminators = f"; D1 and D2: {metadata.discriminator}" if metadata.discriminator else ""
        lines = [f"{self.source}: {what}, {metadata.backbone}{discriminators}", f"imported  {len(self.matched)} tensors"]
        if self.missing:
            lines.append(f"missing   {len(self.missing)} counters {COUNTER}, set to 0")
        if self.unexpected:
            groups = Counter(key.partition(".")[0] for key in self.unexpected)
            lines.append("left out  " + ", ".join(f"{name} ({count})" for name, count in groups.items()))
        return "\n".join(lines)


def read_released(file: Path) -> Imported:
    """Read a checkpoint of RRN or CPS, or an ImageNet backbone with a deep stem, from a torch or safetensors file.

    Nested mappings and the prefix `module.` of names are ignored. Backbone and number of classes are recognised from the shapes.

    Raises:
        DataError: a file that is missing, damaged, or holds objects that could execute code; or other networks, with the first
            differences.
    """
    found = _read(file)
    try:
        return _recognise(found, file)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None


def _read(file: Path) -> dict[str, Tensor]:
    """Every tensor of the file by its path of keys, joined by dots."""
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return load_safetensors(file.read_bytes())
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                check_archive(archive, size=file.stat().st_size)
        _refuse_bytearray(file)
        with torch.serialization.safe_globals(_NUMBERS):
            return dict(_tensors(torch.load(file, map_location="cpu", weights_only=True), largest=file.stat().st_size))
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL:? ([\w.]+)", str(error)):
            raise DataError(
                f"{file}: holds {printable(code[1])} beside tensors; loading it could execute code, so it is refused; "
                "if you trust its author, load it yourself and save its state_dict alone"
            ) from None
        raise DataError(f"{file}: not a torch checkpoint; get the file again") from None
    except Exception as error:  # for a damaged file the loaders raise exceptions of many kinds
        raise DataError(f"{file}: not readable ({first_sentence(error)}); get the file again") from error


def _refuse_bytearray(file: Path) -> None:
    """Refuse `bytearray`: of all calls that torch allows, only it allocates as much memory as the file claims. No checkpoint needs it."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as body:
        if body.find(b"\nbytearray\n") >= 0:
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")


def _tensors(value: Any, path: str = "", *, largest: int, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, with its path of keys. A tensor may have at most `largest` bytes.

    Each mapping is entered once: in a small file, mappings that contain each other several times could unfold without end.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.nbytes > min(largest, value.untyped_storage().nbytes()):
            raise DataError(f"{printable(path)} is not a plain tensor")
        yield path, value.detach()
    elif isinstance(value, Mapping) and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items():
            yield from _tensors(inner, f"{path}.{key}" if path else str(key), largest=largest, seen=seen)


def _recognise(found: Mapping[str, Tensor], file: Path) -> Imported:
    usable = [key for key in found if not any(part.startswith("optim") for part in key.split("."))]
    branches = _branch_names(usable)
    names = branches or _backbone_names(found, usable)
    metadata, missing = recognise(shapes_of({name: found[key] for name, key in names.items()}))
    matched = names | (_discriminator_names(found, usable, inputs=(metadata.num_classes or 0) + 3) if branches else {})
    tensors = {name: _converted(name, found[key]) for name, key in matched.items()}
    tensors |= {name: torch.zeros((), dtype=torch.int64) for name in missing}
    metadata = metadata.model_copy(update={"discriminator": _discriminator_kind(tensors)})
    used = set(matched.values())
    return Imported(metadata, tensors, tuple(matched), missing, tuple(key for key in found if key not in used), file.name)


def _branch_names(keys: Iterable[str]) -> _Names:
    names: _Names = {}
    for key in keys:
        parts = [part for part in key.split(".") if part != "module"]
        start = next((i for i, part in enumerate(parts) if part in BRANCHES), None)
        if start is None:
            continue
        name = ".".join(parts[start:])
        if name in names:
            raise DataError(
                f"{printable(names[name])} and {printable(key)} both hold {printable(name)}; save a file with one of the networks alone"
            )
        names[name] = key
    return names


def _backbone_names(found: Mapping[str, Tensor], keys: Iterable[str]) -> _Names:
    prefixes = _prefixes(keys, ANCHOR)
    if len(prefixes) != 1:
        what = f"{len(prefixes)} ResNets" if prefixes else "neither branch1.* and branch2.* nor a ResNet's layer1.*"
        keys_found = f"its first keys: {', '.join(map(printable, list(found)[:3]))}" if found else "it has no tensors"
        raise DataError(f"holds {what}, expected two branches or one ResNet; {keys_found}")
    prefix = prefixes[0]
    own, mmseg = (all(f"{prefix}{stem}.{i}.weight" in found for i in (0, 3, 6)) for stem in ("conv1", "stem"))
    if not own and not mmseg:
        raise DataError(
            f"its stem is {_stem(found, prefix)}, expected three convolutions of 3 x 3 (conv1.0, conv1.3, conv1.6, or mmsegmentation's "
            "stem.0, stem.3, stem.6); use a v1c ResNet, such as resnet50_v1c.pth"
        )
    pattern = re.compile(re.escape(prefix) + (r"((conv1|bn1|layer[1-4])\..+)" if own else r"((stem|layer[1-4])\..+)"))
    return {f"backbone.{_own_name(match[1])}": key for key in keys if (match := pattern.fullmatch(key))}


def _own_name(name: str) -> str:
    """Our name of a tensor of mmsegmentation's ResNet v1c, whose `stem` also holds the last normalisation. Other names stay."""
    return re.sub(r"^stem\.", "conv1.", re.sub(r"^stem\.7\.", "bn1.", name))


def _stem(found: Mapping[str, Tensor], prefix: str) -> str:
    """The convolutions outside the stages: `one convolution of 64 x 3 x 7 x 7 (conv1.weight)`."""
    outside = re.compile(re.escape(prefix) + r"(?!layer[1-4]\.|\w*(head|classifier)\.)(.+)")
    convs = [(match[2], found[key]) for key in found if found[key].ndim == 4 and (match := outside.fullmatch(key))]
    shown = [f"{' x '.join(map(str, tensor.shape))} ({name})" for name, tensor in convs[:3]]
    count = {0: "of an unknown form", 1: "one convolution of "}.get(len(convs), f"{len(convs)} convolutions of ")
    return printable(count + ", ".join(shown), longest=160)


def _discriminator_names(found: Mapping[str, Tensor], keys: Iterable[str], *, inputs: int) -> _Names:
    """The names of exactly two discriminators with `inputs` input channels, else none. The first by name belongs to branch 1."""
    prefixes = [prefix for prefix in _prefixes(keys, "conv4.weight") if _is_discriminator(found, prefix, inputs)]
    if len(prefixes) != 2:
        return {}
    return {
        f"{name}.{layer}": prefix + layer for name, prefix in zip(("D1", "D2"), prefixes, strict=True) for layer in _layers(found, prefix)
    }


def _layers(found: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The layers of a discriminator. `fc` beside a classifier is unused and left out."""
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
    """The kind by the last layer: `pixel` has a 4 x 4 kernel, `patch` one of another size, `image` a linear layer."""
    if "D1.classifier.weight" in tensors:
        return "pixel" if tensors["D1.classifier.weight"].shape[-1] == 4 else "patch"
    return "image" if "D1.fc.weight" in tensors else None


def _prefixes(keys: Iterable[str], tensor: str) -> list[str]:
    """The prefixes of all keys that end with `tensor`, sorted."""
    return sorted(key.removesuffix(tensor) for key in keys if key == tensor or key.endswith(f".{tensor}"))


def _converted(name: str, tensor: Tensor) -> Tensor:
    """A copy as float32, or int64 for a counter."""
    if name.endswith(COUNTER):
        return tensor.long().clone()
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
        raise DataError(f"{printable(name)} must hold finite floating-point numbers; get the file again")
    return tensor.float().contiguous().clone()
