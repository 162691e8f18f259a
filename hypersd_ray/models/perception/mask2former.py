"""Mask2Former (transformers) behind the perception protocol: another m_I for Eq. 16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from hypersd_ray.models.checkpoint import load_component
from hypersd_ray.models.perception.protocol import Instances, PerceptionModel, check_targets

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Mask2Former(PerceptionModel):
    """An instance segmentation checkpoint such as `facebook/mask2former-swin-tiny-coco-instance`."""

    def __init__(self, network: Mask2FormerForUniversalSegmentation, short_side: int = 0, score_threshold: float = 0.1):
        super().__init__()
        self.network, self.short_side, self.score_threshold = network, short_side, score_threshold
        self.num_classes = network.config.num_labels

    def prepare(self, images: Tensor) -> Tensor:
        """[0, 1] (B, 3, H, W) -> resized to multiples of 32 (stretched by less than that, not padded), normalised."""
        height, width = images.shape[-2:]
        scale = self.short_side / min(height, width) if self.short_side else 1.0
        size = tuple(max(32, round(side * scale / 32) * 32) for side in (height, width))
        if size != (height, width):
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (images - mean) / std

    def loss(self, images: Tensor, targets: Sequence[Instances]) -> Tensor:
        check_targets(images, targets, self.num_classes)
        pixels = self.prepare(images.float()).to(self.network.dtype)
        losses = []
        # One by one: the library's loss is of a batch, normalised by the batch's number of objects.
        for picture, target in zip(pixels, targets, strict=True):
            if not len(target):
                losses.append(picture.new_zeros((), dtype=torch.float32))
                continue
            masks, labels = target.masks.float().to(picture.device), target.labels.to(picture.device)
            devices = [picture.device] if picture.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)  # it draws the points where masks are compared; a score must be a pure function
                out = self.network(pixel_values=picture[None], mask_labels=[masks], class_labels=[labels])
            losses.append(out.loss.float().squeeze())
        return torch.stack(losses)

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[Instances]:
        out = self.network(pixel_values=self.prepare(images.float()).to(self.network.dtype))
        size = (images.shape[-2], images.shape[-1])
        found = []
        for classes, masks in zip(out.class_queries_logits.float(), out.masks_queries_logits.float(), strict=True):
            score, label = classes.softmax(-1)[:, :-1].max(-1)  # the last class is "no object"
            soft = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0].sigmoid()
            hard = soft > 0.5
            score = score * (soft * hard).sum((1, 2)) / hard.sum((1, 2)).clamp(min=1)
            order = score.argsort(descending=True, stable=True)
            order = order[(score[order] >= self.score_threshold) & hard[order].any(2).any(1)]
            found.append(Instances(hard[order], label[order], score[order]))
        return found


def load_mask2former(folder: str | Path, short_side: int = 0) -> Mask2Former:
    """From a transformers folder. Raises ValueError in one line."""
    return Mask2Former(load_component(Mask2FormerForUniversalSegmentation, Path(folder)), short_side)
