"""ResNet v1c with a dilated last stage, which is the backbone of a branch, and the sizes of a branch by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rrn_core.errors import ConfigError


@dataclass(frozen=True)
class BranchSpec:
    """Sizes of a branch. The defaults are those of ResNet-50."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    """Kind of residual block."""
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Number of blocks in each stage."""
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Channels inside the blocks of each stage. The output of a bottleneck has four times as many."""
    stem: int = 64
    """Channels of the first two stem convolutions. The third has twice as many."""
    aspp: int = 256
    """Channels of the ASPP."""
    rates: tuple[int, int, int] = (6, 12, 18)
    """Dilations of the ASPP."""
    skip: int = 48
    """Channels to which the stride-4 map is reduced before the decoder."""
    decoder: int = 256
    """Channels of the decoder."""

    @property
    def expansion(self) -> int:
        """Channels of a block's output, as a multiple of the channels inside it."""
        return 4 if self.block == "bottleneck" else 1


def branch_spec(backbone: str) -> BranchSpec:
    """Sizes by name. `tiny` is for CPUs and small images: its ASPP rates fit a map of a few cells.

    Raises:
        ConfigError: an unknown name.
    """
    match backbone:
        case "resnet50":
            return BranchSpec()
        case "resnet101":
            return BranchSpec(blocks=(3, 4, 23, 3))
        case "resnet50_stem32":
            return BranchSpec(stem=32)
        case "resnet101_stem32":
            return BranchSpec(blocks=(3, 4, 23, 3), stem=32)
        case "resnet18":
            return BranchSpec(block="basic", blocks=(2, 2, 2, 2), stem=32)
        case "tiny":
            return BranchSpec(
                block="basic", blocks=(1, 1, 1, 1), widths=(16, 32, 48, 64), stem=8, aspp=16, rates=(1, 2, 3), skip=16, decoder=32
            )
    raise ConfigError(
        f'backbone: unknown name "{backbone}"; choose tiny, resnet18, resnet50, resnet101, resnet50_stem32 or resnet101_stem32'
    )


class ResNet(nn.Module):
    """ResNet v1c. The last stage keeps the resolution and dilates block i by 2 * 2^i, so the output stride is 16."""

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        stem, channels = spec.stem, 2 * spec.stem
        self.conv1 = nn.Sequential(*conv_bn_relu(3, stem, 3, stride=2), *conv_bn_relu(stem, stem, 3), conv(stem, channels, 3))
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        outs = [spec.expansion * width for width in spec.widths]
        self.layer1 = _stage(spec, 0, channels, stride=1)
        self.layer2 = _stage(spec, 1, outs[0], stride=2)
        self.layer3 = _stage(spec, 2, outs[1], stride=2)
        self.layer4 = _stage(spec, 3, outs[2], stride=1, multi_grid=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to the maps at stride 4 (first stage) and at stride 16 (last stage)."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        fine = self.layer1(maps)
        return fine, self.layer4(self.layer3(self.layer2(fine)))


class _Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 with the stride and the dilation, and 1x1, with a shortcut."""

    def __init__(self, inputs: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outputs, 1)
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
    """Convolutions 3x3 with the stride, and 3x3, with a shortcut. Both are dilated."""

    def __init__(self, inputs: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(maps)))
        shortcut = maps if self.downsample is None else self.downsample(maps)
        result: Tensor = self.relu(self.bn2(self.conv2(inner)) + shortcut)
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
    return nn.Sequential(conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))


def conv_bn_relu(inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> Iterator[nn.Module]:
    """A convolution as `conv` makes it, batch normalisation and ReLU."""
    yield conv(inputs, outputs, kernel, stride=stride)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU(inplace=True)


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias. At stride 1 it keeps the size of the map."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)
