"""One pure function per term of the paper: tensors and floats in, scalar out, in float32 or wider. (n) are its equations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rrn_core.maps import at_least_float32, resize

VOID = 255


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_sup of one branch (4): mean cross entropy over labelled pixels; 0 with zero gradient where every label is void.

    `logits` (B, K, H, W), `labels` (B, H, W) int64 with 255 = void.
    """
    total = F.cross_entropy(at_least_float32(logits), labels, ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)


def ohem_loss(logits: Tensor, labels: Tensor, *, threshold: float, min_kept: int) -> Tensor:
    """L_sup of one branch over hard pixels only: mean cross entropy where the true class has at most the probability of the cut.

    The cut is `threshold`, or the `min_kept`-th smallest of these probabilities where that is larger; with no more than `min_kept` labelled
    pixels in the batch all of them count (CPS on Cityscapes). 0 with zero gradient where every label is void. Shapes as `supervised_loss`.
    """
    ce = F.cross_entropy(at_least_float32(logits), labels, ignore_index=VOID, reduction="none")
    # 1 at void pixels: they rank last, so k needs no count of the others, for which a GPU would have to be waited for.
    probability = torch.exp(-ce.detach())
    smallest = probability.flatten().topk(min(min_kept, labels.numel()), largest=False, sorted=False).values
    easy = probability > smallest.max().clamp(min=threshold)
    # Not `<=`: a NaN is kept, so that a diverged loss shows.
    return local_selection_loss(ce, (labels != VOID) & ~easy)


def cps_loss(z1: Tensor, z2: Tensor, label1: Tensor, label2: Tensor) -> Tensor:
    """L_cps (5): each branch learns from the other's labels, over all pixels. Logits (B, K, H, W), labels (B, H, W)."""
    return F.cross_entropy(at_least_float32(z1), label2) + F.cross_entropy(at_least_float32(z2), label1)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every pixel, (B, H, W); `logits` (B, K, H, W), `labels` (B, H, W) without void."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def local_selection_loss(ce: Tensor, selected: Tensor) -> Tensor:
    """L_ls (1): mean of `ce` over the selected pixels, 0 where none is. Both (B, H, W), `selected` bool."""
    # Without a branch on the count: the device is never asked for a number.
    return torch.where(selected, ce, 0).sum() / selected.sum().clamp(min=1)


def dynamic_region_loss(
    ce: Tensor,
    own: Tensor,
    cross: Tensor,
    *,
    weighting: Literal["sum_of_masked_means", "eq3_mean_all", "eq3_mean_selected"],
) -> Tensor:
    """L_dr (3): pixels that both discriminators select weigh twice. `ce` (B, H, W); `own`, `cross` (B, H, W) bool.

    `sum_of_masked_means` (release): L_ls by each discriminator, added. `eq3_mean_all`: weights 2, 1, 0, averaged over all pixels;
    `eq3_mean_selected`: averaged over the pixels that at least one discriminator selects.
    """
    if weighting == "sum_of_masked_means":
        return local_selection_loss(ce, own) + local_selection_loss(ce, cross)
    weighted = (own.to(ce.dtype) + cross.to(ce.dtype)) * ce
    return weighted.mean() if weighting == "eq3_mean_all" else local_selection_loss(weighted, own | cross)


def feature_matching_loss(labeled: Tensor, unlabeled: Tensor, *, reduction: Literal["mean", "sum"]) -> Tensor:
    """L_f of one branch (2): distance of the mean features of both streams, (B, C, 1, 1) each.

    `sum` is the L1 norm of the paper, `mean` divides it by C (release).
    """
    gap = (at_least_float32(labeled).mean(dim=0) - at_least_float32(unlabeled).mean(dim=0)).abs()
    return gap.mean() if reduction == "mean" else gap.sum()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """L_D: half the binary cross entropy of predictions towards 0 plus that of true labels towards 1; score logits of any shape."""
    fake, real = at_least_float32(fake), at_least_float32(real)
    predicted = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    labeled = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    return (predicted + labeled) / 2


def select(rc: Tensor, *, eps: float, gate: Literal["ge", "gt"]) -> Tensor:
    """Where the region-consistency map (after the sigmoid) passes the threshold of (1, 3); bool."""
    return rc >= eps if gate == "ge" else rc > eps


def region_mask(
    rc: Tensor,
    size: tuple[int, int],
    *,
    gate: Callable[[Tensor], Tensor],
    upsample: Literal["bilinear", "nearest", "footprint", "threshold_first"],
    cell: int,
) -> Tensor:
    """The filter mask m of (1): a discriminator's scores after the sigmoid, brought to pixels and cut by `gate`.

    Args:
        rc: (B, 1, h, w), or (B, 1) for one score an image.
        size: (H, W) of the mask.
        gate: `select` with its threshold.
        cell: side in pixels of the area that one score was computed from; `footprint` fills it, and selects nothing beyond the last.

    Returns:
        (B, H, W) bool.
    """
    maps = rc.reshape(rc.shape[0], 1, *(rc.shape[2:] or (1, 1)))
    if upsample == "footprint":
        mask = _footprint(gate(maps), size, cell)
    elif upsample == "nearest":
        mask = gate(F.interpolate(maps, size=size, mode="nearest"))
    elif upsample == "threshold_first":
        mask = resize(gate(maps).to(rc.dtype), size) >= 1 / 2
    else:
        mask = gate(resize(maps, size))
    return mask[:, 0]


def scale_image(
    images: Tensor,
    *,
    scaling: Literal["batch", "per_image", "unnormalise"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Normalised images (B, 3, H, W) to [0, 1]: by the range of the batch, by that of each image, or undoing `mean` and `std`."""
    if scaling == "unnormalise":
        return torch.stack([images[:, c] * std[c] + mean[c] for c in range(3)], dim=1)
    low, high = images.aminmax() if scaling == "batch" else images.flatten(1).aminmax(dim=1)
    low, high = (edge.view(-1, 1, 1, 1) for edge in (low, high))
    tiny = torch.finfo(images.dtype).tiny
    return (images - low) / (high - low).clamp(min=tiny)


def one_hot(labels: Tensor, num_classes: int, *, dtype: torch.dtype) -> Tensor:
    """Labels (B, H, W) to (B, K, H, W); void pixels are zero in every channel."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    return (labels.unsqueeze(1) == classes).to(dtype)


def discriminator_input(classes: Tensor, images: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Class probabilities or one-hot labels (B, K, H, W) and images in [0, 1] to (B, K + 3, H, W).

    `keep`, (B, H, W) bool, zeroes every channel of the pixels where it is false.
    """
    pairs = torch.cat([classes, images.to(classes.dtype)], dim=1)
    pairs = pairs if keep is None else pairs * keep.unsqueeze(1)
    # The layout that convolutions work in: converted once here instead of in each of several passes.
    return pairs.contiguous(memory_format=torch.channels_last)


def hard_labels(logits: Tensor) -> Tensor:
    """one(z) as labels: the best class of every pixel, (B, K, H, W) to (B, H, W) int64; the first one on a tie."""
    # argmax over any axis but the last is several times slower on CPUs.
    return logits.detach().max(dim=1).indices


def class_probabilities(logits: Tensor) -> Tensor:
    """Softmax over the classes (B, K, H, W), in float32 or wider."""
    return at_least_float32(logits).softmax(dim=1)


def _footprint(selected: Tensor, size: tuple[int, int], cell: int) -> Tensor:
    filled = selected.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)[..., : size[0], : size[1]]
    return F.pad(filled, (0, size[1] - filled.shape[3], 0, size[0] - filled.shape[2]))


def count_pixels(masks: Iterable[Tensor]) -> Tensor:
    """Number of true pixels in all masks together, as a float scalar."""
    return torch.stack([mask.sum() for mask in masks]).sum().float()
