"""Endless batches. The batch of an iteration is a function of the seed and the iteration alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rrn_core.config import TrainConfig
from rrn_core.data.augment import augment, draw, size_fault
from rrn_core.data.batch import Batch
from rrn_core.data.cutmix import box_masks
from rrn_core.data.dataset import DataSet, split_indices
from rrn_core.errors import DataError


class Stream(IntEnum):
    """The streams of a batch. Each has its own sequence of random numbers."""

    LABELED = 0
    U0 = 1
    U1 = 2
    CUTMIX = 3


class _Draw(IntEnum):
    """What a random number decides."""

    ORDER = 0
    PIXELS = 1


class Batches(Dataset[Batch]):
    """Batch `i` for every `i >= 0`: labelled images, two independently shuffled streams of unlabelled images, and a CutMix mask.

    Every stream repeats its images in endless passes, each shuffled anew. There is no state between batches: a run can resume at any
    iteration, and any number of workers gives the same batches.

    Attributes:
        labeled, unlabeled: indices in `dataset.train`.
        iterations_per_epoch: max(#labelled, #unlabelled) // batch_size, at least 1.

    Raises:
        ConfigError: a partition that asks for more images than there are.
        DataError: a labelled image without a label file; on access, a file that cannot be used, or an image of `size_fault`.
    """

    def __init__(self, config: TrainConfig, dataset: DataSet) -> None:
        self._config = config
        self._images = dataset.train
        self.labeled, self.unlabeled = split_indices(config, dataset)
        self.iterations_per_epoch = max(1, max(len(self.labeled), len(self.unlabeled)) // config.batch_size)

    def __getitem__(self, iteration: int) -> Batch:
        x, y = self._stream(Stream.LABELED, self.labeled, iteration)
        if not self._config.unlabeled_streams:
            return Batch(x=x, y=y)
        u0, hidden0 = self._stream(Stream.U0, self.unlabeled, iteration)
        u1, hidden1 = self._stream(Stream.U1, self.unlabeled, iteration)
        return Batch(x=x, y=y, u0=u0, u1=u1, mask=self._mask(iteration), hidden0=hidden0, hidden1=hidden1)

    def _stream(self, stream: Stream, indices: Sequence[int], iteration: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and labels (B, H, W) of one stream."""
        generator = self._generator(_Draw.PIXELS, stream, iteration)
        views = []
        for index in self._shuffled(stream, indices, iteration):
            image, label = self._images[index]
            if fault := size_fault(label.shape, self._config):
                raise DataError(f"image {self._images.names[index]}: {fault}")
            views.append(augment(image, label, **draw(generator, label.shape, self._config), crop=self._config.crop))
        images, labels = zip(*views, strict=True)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels).astype(np.int64))

    def _shuffled(self, stream: Stream, indices: Sequence[int], iteration: int) -> list[int]:
        """The indices of the iteration's images in the stream's endless sequence of passes. Each pass is a permutation of `indices`."""
        count, size = len(indices), self._config.batch_size
        positions = [divmod(p, count) for p in range(iteration * size, (iteration + 1) * size)]
        orders = {k: self._generator(_Draw.ORDER, stream, k).permutation(count) for k in {k for k, _ in positions}}
        return [indices[orders[k][offset]] for k, offset in positions]

    def _mask(self, iteration: int) -> Tensor:
        c: Any = self._config  # settings of a method with CutMix
        generator = self._generator(_Draw.PIXELS, Stream.CUTMIX, iteration)
        return torch.from_numpy(box_masks(generator, c.batch_size, c.crop, c.crop, boxes=c.cutmix_boxes, area=c.cutmix_area))

    def _generator(self, purpose: _Draw, stream: Stream, number: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._config.seed, purpose, stream, number]))


def loader(batches: Batches, *, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches `start` to `stop - 1` in order.

    The global random state of torch is neither read nor changed.

    Args:
        workers: number of processes that prepare batches. 0: this process prepares them.
        pin: whether to copy batches to page-locked memory, from which a GPU copies faster.

    Raises:
        DataError: a file that cannot be used; also if a worker process found it.
    """
    fields = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_fields,
        pin_memory=pin,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # the loader seeds its workers from it; without it, from the global state
    )
    return (Batch(**tensors) for tensors in fields)


def _fields(batch: Any) -> dict[str, Tensor]:
    # a dict, because DataLoader pins only containers that it knows
    return dict(vars(batch))


def _one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)
