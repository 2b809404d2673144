"""The four networks of a run: two DeepLabv3+ branches on a ResNet with a deep stem, and one discriminator for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rrn_core.config import TrainConfig


class Branch(nn.Module):
    """DeepLabv3+ at output stride 16 (METHOD.md 1.1); parameter names are those of the released weights.

    In train mode a batch needs at least two images: the ASPP normalises a 1x1 map over the batch.
    """

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        spec = branch_spec(backbone)
        self.backbone = _ResNet(spec)
        self.head = _Decoder(spec)
        self.classifier = nn.Conv2d(spec.decoder, num_classes, 1)
        _initialise(self.backbone, mode="fan_out")
        _initialise(self.head, mode="fan_in")
        # Its bias keeps the library's own draw, as in the release.
        nn.init.kaiming_normal_(self.classifier.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K, H, W), float32 also under autocast (float64 stays float64)."""
        fine, coarse = self.backbone(images)
        logits = self.classifier(self.head(fine, coarse))
        return _resize(_at_least_float32(logits), images.shape[-2:])


class Discriminator(nn.Module):
    """Tells a predicted from a true label map, given the image; four strided convolutions, then a judge per `kind`.

    Args:
        kind: `patch`: a score for each region of 16 * `region_kernel` pixels. `image`: one score. `pixel`: one per pixel.
        width: channels of the first convolution.
        pool: kernel of the average pooling of the last map (1/16 of the input) for the feature, which must come out 1x1.
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

        Scores: `patch` (B, 1, h, w) with h = H // (16 * region_kernel), `image` (B, 1), `pixel` (B, 1, H, W); before the sigmoid.
        """
        maps = pairs
        for conv in (self.conv1, self.conv2, self.conv3):
            maps = self.drop(self.act(conv(maps)))
        maps = self.act(self.conv4(maps))
        feature = self.pool(maps)
        score = _at_least_float32(self._score(maps, feature))
        if self.kind == "pixel":
            score = _resize(score, pairs.shape[-2:])
        return score, _at_least_float32(feature)

    def _score(self, maps: Tensor, feature: Tensor) -> Tensor:
        score: Tensor = self.fc(feature.flatten(1)) if self.kind == "image" else self.classifier(maps)
        return score


class Quartet(nn.Module):
    """Both branches and, for method `rrn`, the discriminator of each."""

    def __init__(self, branch1: Branch, branch2: Branch, D1: Discriminator | None, D2: Discriminator | None) -> None:
        super().__init__()
        self.branch1 = branch1
        self.branch2 = branch2
        self.D1 = D1
        self.D2 = D2

    def discriminators(self) -> tuple[Discriminator, Discriminator]:
        """D1 and D2 of a method that has them."""
        assert self.D1 is not None
        assert self.D2 is not None
        return self.D1, self.D2


def build_quartet(config: TrainConfig, num_classes: int) -> Quartet:
    """Networks as at step 0, drawn from `config.seed` alone: equal backbones, heads drawn differently.

    The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        branch1, branch2 = (Branch(config.backbone, num_classes) for _ in range(2))
        branch2.backbone.load_state_dict(branch1.backbone.state_dict())
        D1, D2 = (_discriminator(config, num_classes) if config.method == "rrn" else None for _ in range(2))
    return _laid_out(Quartet(branch1, branch2, D1, D2))


def quartet_of(weights: Mapping[str, Tensor], backbone: str, num_classes: int) -> Quartet:
    """Both branches with the values of `weights` (branch1.*, branch2.*), and no discriminators."""
    with torch.device("meta"):
        branch1, branch2 = (Branch(backbone, num_classes) for _ in range(2))
    quartet = Quartet(branch1, branch2, None, None)
    quartet.load_state_dict(weights, assign=True)
    return _laid_out(quartet)


def _laid_out(quartet: Quartet) -> Quartet:
    # Maps follow the layout of the weights. The CPU is faster in this one, and so is bfloat16 on a GPU; the stubs do not know the argument.
    quartet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return quartet


def _discriminator(config: TrainConfig, num_classes: int) -> Discriminator:
    return Discriminator(
        num_classes,
        kind=config.discriminator,
        width=config.discriminator_width,
        region_kernel=config.region_kernel,
        pool=config.pool_kernel,
    )


@dataclass(frozen=True)
class BranchSpec:
    """Sizes of a branch; the defaults are ResNet-50's."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks per stage."""
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Channels inside the blocks of each stage; a bottleneck puts out four times as many."""
    stem: int = 64
    """Channels of the first two stem convolutions; the third has twice as many."""
    aspp: int = 256
    rates: tuple[int, int, int] = (6, 12, 18)
    """Dilations of the ASPP."""
    skip: int = 48
    """Channels to which the stride-4 map is reduced before the decoder."""
    decoder: int = 256

    @property
    def expansion(self) -> int:
        return 4 if self.block == "bottleneck" else 1


def branch_spec(backbone: str) -> BranchSpec:
    """Sizes by name. `tiny` is for CPUs and small images: its ASPP rates fit a map of a few cells.

    Raises:
        ValueError: an unknown name.
    """
    match backbone:
        case "resnet50":
            return BranchSpec()
        case "resnet101":
            return BranchSpec(blocks=(3, 4, 23, 3))
        case "resnet18":
            return BranchSpec(block="basic", blocks=(2, 2, 2, 2), stem=32)
        case "tiny":
            return BranchSpec(
                block="basic", blocks=(1, 1, 1, 1), widths=(16, 32, 48, 64), stem=8, aspp=16, rates=(1, 2, 3), skip=16, decoder=32
            )
    raise ValueError(f'unknown backbone "{backbone}"; choose tiny, resnet18, resnet50 or resnet101')


class _ResNet(nn.Module):
    """ResNet v1c; the last stage keeps the resolution and dilates block i by 2 * 2^i, so the output stride is 16."""

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        stem, channels = spec.stem, 2 * spec.stem
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, stem, 3, stride=2), *_conv_bn_relu(stem, stem, 3), _conv(stem, channels, 3))
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        outs = [spec.expansion * width for width in spec.widths]
        self.layer1 = _stage(spec, 0, channels, stride=1)
        self.layer2 = _stage(spec, 1, outs[0], stride=2)
        self.layer3 = _stage(spec, 2, outs[1], stride=2)
        self.layer4 = _stage(spec, 3, outs[2], stride=1, multi_grid=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to the maps at stride 4 (first stage) and 16 (last stage)."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        fine = self.layer1(maps)
        return fine, self.layer4(self.layer3(self.layer2(fine)))


class _Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1, and a shortcut."""

    def __init__(self, inputs: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(maps)))
        inner = self.relu(self.bn2(self.conv2(inner)))
        shortcut = maps if self.downsample is None else self.downsample(maps)
        result: Tensor = self.relu(self.bn3(self.conv3(inner)) + shortcut)
        return result


class _BasicBlock(nn.Module):
    """3x3 (which carries the stride), 3x3, and a shortcut; both convolutions are dilated."""

    def __init__(self, inputs: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(maps)))
        shortcut = maps if self.downsample is None else self.downsample(maps)
        result: Tensor = self.relu(self.bn2(self.conv2(inner)) + shortcut)
        return result


class _Decoder(nn.Module):
    """ASPP of the coarse map, up-sampled to the fine one, joined and refined."""

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        self.aspp = _ASPP(spec.expansion * spec.widths[3], spec.aspp, spec.rates)
        self.reduce = nn.Sequential(*_conv_bn_relu(spec.expansion * spec.widths[0], spec.skip, 1))
        joined = spec.aspp + spec.skip
        self.last_conv = nn.Sequential(*_conv_bn_relu(joined, spec.decoder, 3), *_conv_bn_relu(spec.decoder, spec.decoder, 3))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Maps at strides 4 and 16 to the classifier's input at stride 4."""
        context = _resize(self.aspp(coarse), fine.shape[-2:])
        refined: Tensor = self.last_conv(torch.cat([context, self.reduce(fine)], dim=1))
        return refined


class _ASPP(nn.Module):
    """Parallel dilated convolutions under one normalisation, plus a global branch that is added (not joined)."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, int, int]) -> None:
        super().__init__()
        self.map_convs = nn.ModuleList([_conv(inputs, width, 1), *(_conv(inputs, width, 3, dilation=rate) for rate in rates)])
        self.map_bn = nn.BatchNorm2d(4 * width)
        self.global_pooling_conv = _conv(inputs, width, 1)
        self.global_pooling_bn = nn.BatchNorm2d(width)
        self.red_conv = _conv(4 * width, width, 1)
        self.pool_red_conv = _conv(width, width, 1)
        self.red_bn = nn.BatchNorm2d(width)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        local = torch.cat([conv(maps) for conv in self.map_convs], dim=1)
        local = self.red_conv(self.act(self.map_bn(local)))
        context = self.global_pooling_conv(maps.mean(dim=(2, 3), keepdim=True))
        context = self.pool_red_conv(self.act(self.global_pooling_bn(context)))
        result: Tensor = self.act(self.red_bn(local + context))
        return result


def _stage(spec: BranchSpec, index: int, inputs: int, *, stride: int, multi_grid: bool = False) -> nn.Sequential:
    block = _Bottleneck if spec.block == "bottleneck" else _BasicBlock
    width = spec.widths[index]
    blocks: list[nn.Module] = []
    for i in range(spec.blocks[index]):
        dilation = 2 * 2**i if multi_grid else 1
        first = i == 0
        blocks.append(block(inputs if first else spec.expansion * width, width, stride=stride if first else 1, dilation=dilation))
    return nn.Sequential(*blocks)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> Iterator[nn.Module]:
    yield _conv(inputs, outputs, kernel, stride=stride)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU(inplace=True)


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)


def _initialise(module: nn.Module, *, mode: Literal["fan_in", "fan_out"]) -> None:
    """He-normal convolutions; normalisation layers already start at weight 1 and bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")


def _resize(maps: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
