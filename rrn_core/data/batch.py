"""What one optimisation step consumes, and the normalisation that its images went through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

NONE = torch.empty(0)


@dataclass(frozen=True)
class Batch:
    """One batch of each stream (METHOD.md 1.2). Images are float32, normalised by `IMAGENET_MEAN` and `IMAGENET_STD`."""

    x: Tensor
    """Labelled images, (B, 3, H, W)."""
    y: Tensor
    """Their labels, (B, H, W) int64, 255 (void) where there is none."""
    u0: Tensor = NONE
    """Unlabelled images, (B, 3, H, W); empty, like all that follows, where the method reads none."""
    u1: Tensor = NONE
    """Unlabelled images to be pasted into `u0`, (B, 3, H, W)."""
    mask: Tensor = NONE
    """CutMix mask, (B, 1, H, W) float in {0, 1}; 1 takes the pixel of `u1`."""
    hidden0: Tensor = NONE
    """True labels of `u0`, (B, H, W) int64, for diagnostics only; 255 everywhere where unknown."""
    hidden1: Tensor = NONE
    """True labels of `u1`, like `hidden0`."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        tensors = (self.x, self.y, self.u0, self.u1, self.mask, self.hidden0, self.hidden1)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))
