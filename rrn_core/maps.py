"""Resizing of maps, and the precision in which losses are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resizing with aligned corners, as in all of the released code; (B, K, h, w) to (B, K, *size)."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, also under autocast; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
