"""Discriminators: scores of a label map for regions (patch), the image or pixels, and a feature."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from rrn_core.maps import at_least_float32, resize


class Discriminator(nn.Module):
    """Distinguishes predicted from true label maps, given the image: four strided convolutions, then a classifier.

    `image` is the discriminator of the released RRN code (from s4GAN), `patch` that of the paper.

    Args:
        kind: `patch`: a score for each region with a side of 16 * `region_kernel` pixels. `image`: one score. `pixel`: a score for each
            pixel.
        width: channels of the first convolution.
        pool: kernel of the average pooling of the last map (1/16 of the input) to the feature, which must be 1x1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        kind: Literal["patch", "image", "pixel"],
        width: int = 64,
        region_kernel: int = 10,
        pool: int | tuple[int, int] = 20,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.conv1 = nn.Conv2d(num_classes + 3, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1)
        self.conv4 = nn.Conv2d(4 * width, 8 * width, 4, stride=2, padding=1)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.drop = nn.Dropout2d(0.5)
        self.pool = nn.AvgPool2d(pool)
        if kind == "image":
            self.fc = nn.Linear(8 * width, 1)
        elif kind == "patch":
            self.classifier = nn.Conv2d(8 * width, 1, region_kernel, stride=region_kernel)
        else:
            self.classifier = nn.Conv2d(8 * width, 1, 4, stride=2, padding=1)

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Label map and image (B, K + 3, H, W) to score logits and feature (B, 8 * width, 1, 1), both at least float32.

        Score logits (before the sigmoid): `patch` (B, 1, h, w) with h = H // (16 * region_kernel), `image` (B, 1), `pixel` (B, 1, H, W).
        """
        maps = pairs
        for conv in (self.conv1, self.conv2, self.conv3):
            maps = self.drop(self.act(conv(maps)))
        maps = self.act(self.conv4(maps))
        feature = self.pool(maps)
        score = at_least_float32(self._score(maps, feature))
        if self.kind == "pixel":
            score = resize(score, pairs.shape[-2:])
        return score, at_least_float32(feature)

    def _score(self, maps: Tensor, feature: Tensor) -> Tensor:
        score: Tensor = self.fc(feature.flatten(1)) if self.kind == "image" else self.classifier(maps)
        return score
