"""The input of one training iteration, and the normalisation of its images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of red, green and blue in 0..1."""

NONE = torch.empty(0)
"""Stands for a tensor that the method does not read."""


@dataclass(frozen=True)
class Batch:
    """One batch of each stream. Images are float32, normalised by `IMAGENET_MEAN` and `IMAGENET_STD`."""

    x: Tensor
    """Labelled images, (B, 3, H, W)."""
    y: Tensor
    """Their labels, (B, H, W) int64; 255 is void."""
    u0: Tensor = NONE
    """Unlabelled images, (B, 3, H, W). This tensor and all below are empty for a method that reads no unlabelled images."""
    u1: Tensor = NONE
    """Unlabelled images that are pasted into `u0`, (B, 3, H, W)."""
    mask: Tensor = NONE
    """CutMix mask, (B, 1, H, W) float in {0, 1}. Where it is 1, the mix has the pixel of `u1`."""
    hidden0: Tensor = NONE
    """True labels of `u0`, (B, H, W) int64, 255 where unknown. For diagnostics only."""
    hidden1: Tensor = NONE
    """True labels of `u1`, in the form of `hidden0`."""

    def to(self, device: torch.device | str) -> Batch:
        """A copy of the batch on `device`."""
        tensors = (self.x, self.y, self.u0, self.u1, self.mask, self.hidden0, self.hidden1)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))
