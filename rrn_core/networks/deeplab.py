"""A branch: DeepLabv3+, which is ASPP and a decoder on a ResNet (Chen et al., ECCV 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rrn_core.maps import at_least_float32, resize
from rrn_core.networks.resnet import BranchSpec, ResNet, branch_spec, conv, conv_bn_relu


class Branch(nn.Module):
    """DeepLabv3+ at output stride 16, as in the released CPS code (see docs/method.md). Parameters have the names of the released weights.

    In train mode a batch needs at least two images: the ASPP normalises a 1x1 map over the batch.

    Raises:
        ConfigError: an unknown backbone.
    """

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        spec = branch_spec(backbone)
        self.backbone = ResNet(spec)
        self.head = _Decoder(spec)
        self.classifier = nn.Conv2d(spec.decoder, num_classes, 1)
        _initialise(self.backbone, mode="fan_out")
        _initialise(self.head, mode="fan_in")
        # The bias keeps torch's default initialisation, as in the released code.
        nn.init.kaiming_normal_(self.classifier.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K, H, W), in float32 also under autocast; float64 stays float64."""
        fine, coarse = self.backbone(images)
        logits = self.classifier(self.head(fine, coarse))
        return resize(at_least_float32(logits), images.shape[-2:])


class _Decoder(nn.Module):
    """ASPP of the coarse map, up-sampled to the size of the fine map, concatenated with it and refined by two convolutions."""

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        self.aspp = _ASPP(spec.expansion * spec.widths[3], spec.aspp, spec.rates)
        self.reduce = nn.Sequential(*conv_bn_relu(spec.expansion * spec.widths[0], spec.skip, 1))
        joined = spec.aspp + spec.skip
        self.last_conv = nn.Sequential(*conv_bn_relu(joined, spec.decoder, 3), *conv_bn_relu(spec.decoder, spec.decoder, 3))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Backbone maps at strides 4 and 16 to the classifier's input (B, C, H / 4, W / 4)."""
        context = resize(self.aspp(coarse), fine.shape[-2:])
        refined: Tensor = self.last_conv(torch.cat([context, self.reduce(fine)], dim=1))
        return refined


class _ASPP(nn.Module):
    """Parallel dilated convolutions with one joint normalisation; a global branch is added, not concatenated."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, int, int]) -> None:
        super().__init__()
        self.map_convs = nn.ModuleList([conv(inputs, width, 1), *(conv(inputs, width, 3, dilation=rate) for rate in rates)])
        self.map_bn = nn.BatchNorm2d(4 * width)
        self.global_pooling_conv = conv(inputs, width, 1)
        self.global_pooling_bn = nn.BatchNorm2d(width)
        self.red_conv = conv(4 * width, width, 1)
        self.pool_red_conv = conv(width, width, 1)
        self.red_bn = nn.BatchNorm2d(width)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        local = torch.cat([conv(maps) for conv in self.map_convs], dim=1)
        local = self.red_conv(self.act(self.map_bn(local)))
        context = self.global_pooling_conv(maps.mean(dim=(2, 3), keepdim=True))
        context = self.pool_red_conv(self.act(self.global_pooling_bn(context)))
        result: Tensor = self.act(self.red_bn(local + context))
        return result


def _initialise(module: nn.Module, *, mode: Literal["fan_in", "fan_out"]) -> None:
    """Draw convolutions He-normal. Normalisation layers already start at weight 1 and bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
