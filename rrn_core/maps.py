"""Maps of pixels: resizing, and the precision in which losses are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear with aligned corners, as everywhere in the released code; (B, K, h, w) to (B, K, *size)."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def at_least_float32(tensor: Tensor) -> Tensor:
    """float32 also under autocast; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
