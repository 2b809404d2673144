"""ResNet v1c with a dilated last stage: the backbone of a branch, and the sizes of all of its parts by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


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


class ResNet(nn.Module):
    """ResNet v1c; the last stage keeps the resolution and dilates block i by 2 * 2^i, so the output stride is 16."""

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
        """Images (B, 3, H, W) to the maps at stride 4 (first stage) and 16 (last stage)."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        fine = self.layer1(maps)
        return fine, self.layer4(self.layer3(self.layer2(fine)))


class _Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1, and a shortcut."""

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
    """3x3 (which carries the stride), 3x3, and a shortcut; both convolutions are dilated."""

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
    yield conv(inputs, outputs, kernel, stride=stride)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU(inplace=True)


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)
