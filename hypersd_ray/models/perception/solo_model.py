"""SOLO behind the perception protocol: pictures in [0, 1] and annotations in, losses or objects out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hypersd_ray.models.perception.protocol import Instances, PerceptionModel, check_targets
from hypersd_ray.models.perception.solo import SOLOConfig, SOLONetwork
from hypersd_ray.models.perception.solo_decode import DecodeConfig, decode
from hypersd_ray.models.perception.solo_targets import Sums, loss_sums, per_picture_loss
from hypersd_ray.models.rewards.weights import load_weights, read_tensors

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class SOLO(PerceptionModel):
    """SOLO on pictures of any size: the short side is resized to `config.short_side`, the rest padded to 32.

    Args:
        rows_only: compute only the mask rows that the loss needs (`SOLOHead.mask_logits`).
    """

    def __init__(self, network: SOLONetwork, settings: DecodeConfig | None = None, rows_only: bool = True):
        super().__init__()
        self.network, self.config = network, network.config
        self.settings = settings or DecodeConfig()
        self.rows_only, self.num_classes = rows_only, network.config.num_classes

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the network's input before padding."""
        if not self.config.short_side:
            return height, width
        scale = self.config.short_side / min(height, width)
        return round(height * scale), round(width * scale)

    def prepare(self, images: Tensor) -> Tensor:
        """[0, 1] (B, 3, H, W) -> resized, normalised, padded to multiples of 32 at the right and the bottom."""
        size = self.input_size(*images.shape[-2:])
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        pixels = (images * 255 - mean) / std
        return F.pad(pixels, (0, -size[1] % 32, 0, -size[0] % 32))

    def sums(self, images: Tensor, targets: Sequence[Instances]) -> Sums:
        """The loss's parts for each picture."""
        check_targets(images, targets, self.num_classes)
        size = self.input_size(*images.shape[-2:])
        dtype = next(self.network.parameters()).dtype
        levels = self.network(self.prepare(images.float()).to(dtype))
        resized = [_resize(target.to("cpu"), size) for target in targets]
        return loss_sums(self.network.mask_head, levels, resized, self.config, self.rows_only)

    def loss(self, images: Tensor, targets: Sequence[Instances]) -> Tensor:
        return per_picture_loss(self.sums(images, targets))

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[Instances]:
        size = self.input_size(*images.shape[-2:])
        dtype = next(self.network.parameters()).dtype
        levels = self.network(self.prepare(images.float()).to(dtype))
        out = (images.shape[-2], images.shape[-1])
        return [
            decode(self.network.mask_head, levels, i, self.config, self.settings, size, out) for i in range(len(images))
        ]


def _resize(target: Instances, size: tuple[int, int]) -> Instances:
    if not len(target) or tuple(target.masks.shape[-2:]) == size:
        return target
    masks = F.interpolate(target.masks[None].float(), size=size, mode="bilinear", align_corners=False)[0] >= 0.5
    keep = masks.any(2).any(1)
    return Instances(masks[keep], target.labels[keep])


def save_solo(model: SOLO, folder: str | Path) -> None:
    """config.json and model.safetensors, mmdetection's names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=1))
    state = {name: t.contiguous().cpu() for name, t in model.network.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_solo(checkpoint: str | Path, short_side: int = 0) -> SOLO:
    """mmdetection's `solo_r50_fpn` checkpoint, or a folder of `save_solo`.

    Args:
        short_side: another input size than the checkpoint's own; 0 keeps that.

    Raises:
        ValueError: file, missing and unexpected names in one line.
    """
    path = Path(checkpoint)
    config = SOLOConfig()
    if path.is_dir():
        try:
            stored = json.loads((path / "config.json").read_text())
            tuples: dict[str, Any] = {k: tuple(map(_tuple, v)) if isinstance(v, list) else v for k, v in stored.items()}
            config = SOLOConfig(**tuples)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}/config.json cannot be read: {error}") from None
        path = path / "model.safetensors"
    if short_side:
        config = SOLOConfig(**(asdict(config) | {"short_side": short_side}))
    network = SOLONetwork(config)
    load_weights(network, read_tensors(path), path)
    return SOLO(network.eval().requires_grad_(False)).eval()


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value
