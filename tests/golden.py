"""Reference numbers of the released code, and the recipe that rebuilds their inputs (its README is beside them)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from places import SHARED
from torch import Tensor, nn

FOLDER = SHARED / "golden"


def load(name):
    """Arrays of `name`.npz by key; skips the test where the reference numbers are absent."""
    with np.load(_present(f"{name}.npz"), allow_pickle=False) as arrays:
        return dict(arrays)


def load_json(name):
    return json.loads(_present(f"{name}.json").read_text())


def parameter(key: str, shape) -> np.ndarray:
    """The fill of one entry of a state dict; float32, or int64 zeros for a counter. `key` includes the prefix."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) >= 2:
        return (noise / np.sqrt(np.prod(shape[1:])) * _gain(key)).astype(np.float32)
    match key.rpartition(".")[2]:
        case "running_var":
            value = 1 + np.abs(0.1 * noise)
        case "weight":
            value = (1 + 0.1 * noise) * (0.25 if ".bn3." in key else 1.0)
        case _:
            value = 0.1 * noise
    return value.astype(np.float32)


def fill(module: nn.Module, prefix: str) -> nn.Module:
    """Load the reference parameters into every entry of `module`'s state dict, in its own dtype."""
    state = {key: torch.from_numpy(parameter(prefix + key, tuple(tensor.shape))) for key, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    return module


def make_image(seed: int, n: int, h: int, w: int, c: int = 3) -> Tensor:
    """(n, c, h, w) float32: an offset, blocks of 16 pixels, and pixel noise."""
    rng = np.random.default_rng(seed)
    offset = rng.standard_normal((n, c, 1, 1))
    low = rng.standard_normal((n, c, -(-h // 16), -(-w // 16))).repeat(16, axis=2).repeat(16, axis=3)[..., :h, :w]
    pixel = rng.standard_normal((n, c, h, w))
    return torch.from_numpy((0.5 * offset + low + 0.5 * pixel).astype(np.float32))


def make_label(seed: int, n: int, h: int, w: int, *, classes: int = 21, block: int = 8, void: float = 0.1) -> Tensor:
    """(n, h, w) int64 in blocks, 255 with probability `void`."""
    rng = np.random.default_rng(seed)
    shape = (n, -(-h // block), -(-w // block))
    labels = rng.integers(0, classes, shape)
    labels[rng.random(shape) < void] = 255
    return torch.from_numpy(labels.repeat(block, axis=1).repeat(block, axis=2)[:, :h, :w].copy())


def amp(images: Tensor) -> Tensor:
    """Images with an odd index doubled."""
    images = images.clone()
    images[1::2] *= 2
    return images


def discriminator_pairs(seed: int, n: int, h: int, w: int, classes: int = 21) -> Tensor:
    """Random probabilities joined with an image scaled by the range of the batch; (n, classes + 3, h, w) float64."""
    image = make_image(seed + 1, n, h, w).double()
    image = (image - image.min()) / (image.max() - image.min())
    return torch.cat([(2 * make_image(seed, n, h, w, classes).double()).softmax(dim=1), image], dim=1)


def unpack(packed: np.ndarray, shape) -> Tensor:
    """A bit-packed mask as float32 in {0, 1}."""
    return torch.from_numpy(np.unpackbits(packed)[: np.prod(shape)].reshape(shape).astype(np.float32))


def summary(tensor: Tensor, first: int = 4) -> np.ndarray:
    """Mean, population std, L2 norm and the first values of a tensor, as float64 (NaN where it is shorter)."""
    flat = tensor.detach().double().flatten()
    head = torch.full((first,), torch.nan, dtype=torch.float64)
    head[: min(first, len(flat))] = flat[:first]
    return torch.cat([torch.stack([flat.mean(), flat.std(correction=0), flat.norm()]), head]).numpy()


def _gain(key: str) -> float:
    if not key.startswith("D"):
        return 1.0
    return 2.0 if ".conv" in key else 3.0


def _present(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"no reference numbers: {name} is expected in ../shared/golden beside the repository")
    return path
