"""One pure function for each term of the loss, computed in float32 or wider. Numbers in brackets are equations of the RRN paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rrn_core.data.labels import VOID as VOID
from rrn_core.maps import at_least_float32, resize


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_sup of one branch (4): mean cross entropy over labelled pixels; 0 with zero gradient if every label is void.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64; 255 is void.
    """
    total = F.cross_entropy(at_least_float32(logits), labels, ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)


def ohem_loss(logits: Tensor, labels: Tensor, *, threshold: float, min_kept: int) -> Tensor:
    """L_sup of one branch with online hard example mining, as CPS uses it on Cityscapes: mean cross entropy over hard pixels only.

    A pixel is hard if the predicted probability of its true class is at most the cut. The cut is `threshold` or the `min_kept`-th smallest
    probability, whichever is larger. If the batch has at most `min_kept` labelled pixels, all of them count. If every label is void, the
    loss is 0 with zero gradient. Shapes as in `supervised_loss`.
    """
    ce = F.cross_entropy(at_least_float32(logits), labels, ignore_index=VOID, reduction="none")
    # Void pixels get 1 and rank last. So k needs no count of labelled pixels, for which the CPU would wait for the GPU.
    probability = torch.exp(-ce.detach())
    smallest = probability.flatten().topk(min(min_kept, labels.numel()), largest=False, sorted=False).values
    easy = probability > smallest.max().clamp(min=threshold)
    # `~easy` instead of `<=` keeps NaN, so that a diverged loss is detected.
    return local_selection_loss(ce, (labels != VOID) & ~easy)


def cps_loss(z1: Tensor, z2: Tensor, label1: Tensor, label2: Tensor) -> Tensor:
    """L_cps (5): the cross entropy of each branch's logits (B, K, H, W) with the other branch's labels (B, H, W), over all pixels."""
    return F.cross_entropy(at_least_float32(z1), label2) + F.cross_entropy(at_least_float32(z2), label1)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every pixel, (B, H, W), from logits (B, K, H, W) and labels (B, H, W) without void."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def local_selection_loss(ce: Tensor, selected: Tensor) -> Tensor:
    """L_ls (1): mean of `ce` over the selected pixels; 0 if none is selected. Both are (B, H, W), `selected` is bool."""
    # No `if` on the count: the CPU does not wait for the GPU.
    return torch.where(selected, ce, 0).sum() / selected.sum().clamp(min=1)


def dynamic_region_loss(
    ce: Tensor,
    own: Tensor,
    cross: Tensor,
    *,
    weighting: Literal["sum_of_masked_means", "eq3_mean_all", "eq3_mean_selected"],
) -> Tensor:
    """L_dr (3): pixels that both discriminators select have weight 2, pixels that one selects weight 1.

    Args:
        ce: cross entropy of every pixel, (B, H, W).
        own, cross: pixels that the branch's own and the other discriminator select, (B, H, W) bool.
        weighting: `sum_of_masked_means` adds L_ls of each discriminator, as in the released code. `eq3_mean_all` averages the weights 2, 1
            and 0 over all pixels, `eq3_mean_selected` over the pixels that at least one discriminator selects.
    """
    if weighting == "sum_of_masked_means":
        return local_selection_loss(ce, own) + local_selection_loss(ce, cross)
    weighted = (own.to(ce.dtype) + cross.to(ce.dtype)) * ce
    return weighted.mean() if weighting == "eq3_mean_all" else local_selection_loss(weighted, own | cross)


def feature_matching_loss(labeled: Tensor, unlabeled: Tensor, *, reduction: Literal["mean", "sum"]) -> Tensor:
    """L_f of one branch (2): distance of the mean features of both streams, (B, C, 1, 1) each.

    `sum` is the L1 norm of the paper. `mean` divides it by C, as in the released code.
    """
    gap = (at_least_float32(labeled).mean(dim=0) - at_least_float32(unlabeled).mean(dim=0)).abs()
    return gap.mean() if reduction == "mean" else gap.sum()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """L_D: mean of the binary cross entropies of predictions with target 0 and of true labels with target 1.

    `fake` and `real` are score logits of any shape.
    """
    fake, real = at_least_float32(fake), at_least_float32(real)
    predicted = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    labeled = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    return (predicted + labeled) / 2


def select(rc: Tensor, *, eps: float, gate: Literal["ge", "gt"]) -> Tensor:
    """Where the region-consistency map rc (after the sigmoid) passes the threshold of (1, 3): rc >= eps, or rc > eps; bool."""
    return rc >= eps if gate == "ge" else rc > eps


def region_mask(
    rc: Tensor,
    size: tuple[int, int],
    *,
    gate: Callable[[Tensor], Tensor],
    upsample: Literal["bilinear", "nearest", "footprint", "threshold_first"],
    cell: int,
) -> Tensor:
    """The filter mask m of (1): a discriminator's scores after the sigmoid, up-sampled to pixels and thresholded by `gate`.

    Args:
        rc: (B, 1, h, w), or (B, 1) for one score per image.
        size: (H, W) of the mask.
        gate: `select` with its threshold.
        upsample: see the setting `region_upsample`.
        cell: side in pixels of the area that one score is computed from. `footprint` fills this area, and selects no pixel beyond the
            last one.

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
    """Normalised images (B, 3, H, W) to [0, 1].

    `batch` scales by the minimum and maximum of the batch, `per_image` by those of each image, and `unnormalise` reverts the normalisation
    by `mean` and `std`.
    """
    if scaling == "unnormalise":
        return torch.stack([images[:, c] * std[c] + mean[c] for c in range(3)], dim=1)
    low, high = images.aminmax() if scaling == "batch" else images.flatten(1).aminmax(dim=1)
    low, high = (edge.view(-1, 1, 1, 1) for edge in (low, high))
    tiny = torch.finfo(images.dtype).tiny
    return (images - low) / (high - low).clamp(min=tiny)


def one_hot(labels: Tensor, num_classes: int, *, dtype: torch.dtype) -> Tensor:
    """Labels (B, H, W) to one-hot maps (B, K, H, W). Void pixels are 0 in every channel."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    return (labels.unsqueeze(1) == classes).to(dtype)


def discriminator_input(classes: Tensor, images: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Concatenate class probabilities or one-hot labels (B, K, H, W) with images (B, 3, H, W) in [0, 1] to (B, K + 3, H, W).

    `keep`, (B, H, W) bool, sets every channel to 0 at pixels where it is false.
    """
    pairs = torch.cat([classes, images.to(classes.dtype)], dim=1)
    pairs = pairs if keep is None else pairs * keep.unsqueeze(1)
    # The layout of the convolutions: converted once here instead of in each of several passes.
    return pairs.contiguous(memory_format=torch.channels_last)


def hard_labels(logits: Tensor) -> Tensor:
    """one(z) as labels: the class of the largest logit, (B, K, H, W) to (B, H, W) int64; on a tie the first class."""
    # max instead of argmax, which is several times slower on CPUs over any axis but the last.
    return logits.detach().max(dim=1).indices


def class_probabilities(logits: Tensor) -> Tensor:
    """Softmax over the classes of logits (B, K, H, W), in float32 or wider."""
    return at_least_float32(logits).softmax(dim=1)


def _footprint(selected: Tensor, size: tuple[int, int], cell: int) -> Tensor:
    filled = selected.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)[..., : size[0], : size[1]]
    return F.pad(filled, (0, size[1] - filled.shape[3], 0, size[0] - filled.shape[2]))


def count_pixels(masks: Iterable[Tensor]) -> Tensor:
    """Number of true pixels in all masks together, as a float scalar tensor."""
    return torch.stack([mask.sum() for mask in masks]).sum().float()
