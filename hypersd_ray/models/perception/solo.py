"""SOLO (Wang et al. 2020): instance segmentation by grid cell, with mmdetection's tensors under mmdetection's names.

Shapes, for level l with grid S_l and features (h_l, w_l)
    class logits   (B, C, S_l, S_l)
    mask features  (B, F, 2 h_l, 2 w_l)     before the 1x1 convolution that makes one mask for each of S_l^2 cells
    mask logits    (B, S_l^2, 2 h_l, 2 w_l)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck


@dataclass(frozen=True)
class SOLOConfig:
    """Sizes; the defaults are mmdetection's solo_r50_fpn."""

    num_classes: int = 80
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Bottlenecks of ResNet's four layers."""
    width: int = 64
    """Channels of ResNet's stem; its layers have 4, 8, 16 and 32 times as many."""
    fpn_channels: int = 256
    head_channels: int = 256
    stacked_convs: int = 7
    norm_groups: int = 32
    num_grids: tuple[int, ...] = (40, 36, 24, 16, 12)
    """Grid cells a side, by level."""
    strides: tuple[int, ...] = (8, 8, 16, 32, 32)
    """Pixels between feature points, after P2 is resized to P3 and P6 to P5."""
    scale_ranges: tuple[tuple[int, int], ...] = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    """Which sqrt(box area) a level is responsible for; they overlap."""
    pos_scale: float = 0.2
    """Share of the box around the centre of mass whose cells are positive."""
    short_side: int = 800
    """Pixels the short side is resized to; 0 leaves pictures as they are."""


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, of any width; (B, 3, H, W) -> features at strides 4, 8, 16, 32."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, blocks: Sequence[int], width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for i, count in enumerate(blocks):
            inner, stride = width * 2**i, 1 if i == 0 else 2
            layers = []
            for j in range(count):
                step, down = (stride, self._shortcut(channels, 4 * inner, stride)) if j == 0 else (1, None)
                layers.append(Bottleneck(channels, inner, step, down))
                channels = 4 * inner
            setattr(self, f"layer{i + 1}", nn.Sequential(*layers))
        self.out_channels = [4 * width * 2**i for i in range(len(blocks))]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class _Conv(nn.Module):
    """A convolution under the name `conv`, and GroupNorm with ReLU under `gn`, as mmdetection nests them."""

    def __init__(self, channels: int, out: int, kernel: int, groups: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=not groups)
        self.gn = nn.GroupNorm(groups, out) if groups else None
        nn.init.normal_(self.conv.weight, std=0.01) if groups else nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.gn is None else F.relu(self.gn(x))


class FPN(nn.Module):
    """Feature pyramid; four levels in, five out, the fifth by stride 2."""

    def __init__(self, in_channels: Sequence[int], out: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Conv(c, out, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(_Conv(out, out, 3) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        merged = [conv(f) for conv, f in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        out = [conv(m) for conv, m in zip(self.fpn_convs, merged, strict=True)]
        return [*out, F.max_pool2d(out[-1], 1, stride=2)]


def coordinates(like: Tensor) -> Tensor:
    """CoordConv's (B, 2, h, w): x then y, each from -1 to 1."""
    height, width = like.shape[-2:]
    x = torch.linspace(-1, 1, width, device=like.device, dtype=like.dtype).expand(height, width)
    y = torch.linspace(-1, 1, height, device=like.device, dtype=like.dtype)[:, None].expand(height, width)
    return torch.stack([x, y]).expand(len(like), 2, height, width)


@dataclass(frozen=True, eq=False)
class Level:
    """One level's output: class logits (B, C, S, S) and mask features (B, F, h, w)."""

    class_logits: Tensor
    mask_features: Tensor


class SOLOHead(nn.Module):
    """Class and mask branches, shared by the levels but for the last mask convolution."""

    def __init__(self, config: SOLOConfig):
        super().__init__()
        channels, groups = config.head_channels, config.norm_groups
        first = config.fpn_channels
        self.num_grids = config.num_grids
        widths = [first] + [channels] * (config.stacked_convs - 1)
        self.mask_convs = nn.ModuleList(_Conv(c + 2 * (i == 0), channels, 3, groups) for i, c in enumerate(widths))
        self.cls_convs = nn.ModuleList(_Conv(c, channels, 3, groups) for c in widths)
        self.conv_mask_list = nn.ModuleList(nn.Conv2d(channels, grid**2, 1) for grid in config.num_grids)
        self.conv_cls = nn.Conv2d(channels, config.num_classes, 3, padding=1)
        for conv in (*self.conv_mask_list, self.conv_cls):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.constant_(conv.bias, -4.595)  # sigmoid = 0.01: nearly every cell and pixel is background

    def forward(self, pyramid: Sequence[Tensor]) -> list[Level]:
        """P2..P6 -> what each level sees; the mask logits are left to `mask_logits`, which may want few of them."""
        first = F.interpolate(pyramid[0], size=pyramid[1].shape[-2:], mode="bilinear", align_corners=False)
        last = F.interpolate(pyramid[-1], size=pyramid[-2].shape[-2:], mode="bilinear", align_corners=False)
        levels = []
        for feature, grid in zip([first, *pyramid[1:-1], last], self.num_grids, strict=True):
            masks = torch.cat([feature, coordinates(feature)], 1)
            for conv in self.mask_convs:
                masks = conv(masks)
            masks = F.interpolate(masks, scale_factor=2, mode="bilinear", align_corners=False)
            classes = F.interpolate(feature, size=(grid, grid), mode="bilinear", align_corners=False)
            for conv in self.cls_convs:
                classes = conv(classes)
            levels.append(Level(self.conv_cls(classes), masks))
        return levels

    def mask_logits(self, level: int, features: Tensor, cells: Tensor | None = None) -> Tensor:
        """Masks of one picture at one level: features (F, h, w) -> (cells or S^2, h, w).

        Only the rows of the 1x1 convolution at `cells` (n,) are multiplied: the same numbers without the S^2 - n maps
        that a loss would throw away (about 450 MB a picture at 800 px).
        """
        conv = cast(nn.Conv2d, self.conv_mask_list[level])
        weight, bias = conv.weight.flatten(1), conv.bias
        assert bias is not None
        if cells is not None:
            weight, bias = weight[cells], bias[cells]
        return torch.addmm(bias[:, None], weight, features.flatten(1)).view(-1, *features.shape[-2:])


class SOLONetwork(nn.Module):
    """Backbone, neck and head: state_dict() is mmdetection's `solo_r50_fpn` at the default sizes."""

    def __init__(self, config: SOLOConfig):
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.blocks, config.width)
        self.neck = FPN(self.backbone.out_channels, config.fpn_channels)
        self.mask_head = SOLOHead(config)

    def forward(self, pixels: Tensor) -> list[Level]:
        """Normalised pixels (B, 3, H, W), H and W multiples of 32 -> levels."""
        return self.mask_head(self.neck(self.backbone(pixels)))
