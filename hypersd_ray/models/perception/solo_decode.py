"""SOLO's masks from its levels: local maxima of the class maps, maskness, and matrix NMS (SOLOv2, Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.models.perception.solo import Level, SOLOConfig, SOLOHead


@dataclass(frozen=True)
class DecodeConfig:
    """mmdetection's test settings."""

    score_threshold: float = 0.1
    mask_threshold: float = 0.5
    keep_threshold: float = 0.05
    """Least score after the decay."""
    before_nms: int = 500
    after_nms: int = 100
    sigma: float = 2.0


def local_maxima(scores: Tensor) -> Tensor:
    """Class scores (C, S, S) with a cell set to 0 unless it is the greatest of itself, up, left and up-left neighbour."""
    greatest = F.max_pool2d(scores[None], 2, stride=1, padding=1)[0, :, :-1, :-1]
    return scores * (greatest == scores)


def matrix_nms(masks: Tensor, labels: Tensor, scores: Tensor, sigma: float) -> Tensor:
    """Scores (n,) decayed by overlap with better masks of the same class; masks (n, h, w) bool, scores falling.

    decay_j = min over i above j of exp(-sigma iou_ij^2) / exp(-sigma max_k iou_ki^2): what i itself suffers from those
    above it excuses j.
    """
    flat = masks.flatten(1).float()
    inter = flat @ flat.T
    area = flat.sum(1)
    iou = inter / (area[:, None] + area[None] - inter).clamp(min=1)
    iou = (iou * (labels[:, None] == labels[None])).triu(diagonal=1)
    excuse = iou.max(0).values
    decay = torch.exp(-sigma * iou.square()) / torch.exp(-sigma * excuse.square())[:, None]
    return scores * decay.min(0).values


def decode(
    head: SOLOHead,
    levels: Sequence[Level],
    index: int,
    config: SOLOConfig,
    settings: DecodeConfig,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
) -> Instances:
    """The objects of picture `index`: masks at `output_size`; `input_size` is the network's input without padding."""
    features = levels[0].mask_features.shape[-2:]
    masks, labels, scores = [], [], []
    for number, level in enumerate(levels):
        chosen = local_maxima(level.class_logits[index].float().sigmoid()).permute(1, 2, 0).flatten(0, 1)
        cells, classes = torch.nonzero(chosen > settings.score_threshold, as_tuple=True)
        if not len(cells):
            continue
        soft = head.mask_logits(number, level.mask_features[index], cells).float().sigmoid()
        soft = F.interpolate(soft[None], size=tuple(features), mode="bilinear", align_corners=False)[0]
        hard = soft > settings.mask_threshold
        area = hard.sum((1, 2)).float()
        # smaller than a stride: nothing that this level could have seen
        keep = area > config.strides[number]
        maskness = (soft * hard).sum((1, 2)) / area.clamp(min=1)
        masks.append(soft[keep])
        labels.append(classes[keep])
        scores.append((chosen[cells, classes] * maskness)[keep])
    if not masks or not sum(map(len, masks)):
        empty = torch.zeros(0, *output_size, dtype=torch.bool, device=levels[0].mask_features.device)
        nothing = torch.zeros(0, device=empty.device)
        return Instances(empty, nothing.long(), nothing)
    soft, label, score = torch.cat(masks), torch.cat(labels), torch.cat(scores)
    order = score.argsort(descending=True, stable=True)[: settings.before_nms]
    soft, label = soft[order], label[order]
    score = matrix_nms(soft > settings.mask_threshold, label, score[order], settings.sigma)
    order = score.argsort(descending=True, stable=True)[: settings.after_nms]
    order = order[score[order] >= settings.keep_threshold]
    soft = _upsample(soft[order], config, input_size, output_size)
    return Instances(soft > settings.mask_threshold, label[order], score[order])


def _upsample(soft: Tensor, config: SOLOConfig, input_size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """Masks at half the first stride -> the padded input's size, cut to the input -> the picture's size."""
    if not len(soft):
        return soft.new_zeros(0, *output_size)
    scale = config.strides[0] // 2
    size = (soft.shape[-2] * scale, soft.shape[-1] * scale)
    full = F.interpolate(soft[None], size=size, mode="bilinear", align_corners=False)
    full = full[..., : input_size[0], : input_size[1]]
    return F.interpolate(full, size=output_size, mode="bilinear", align_corners=False)[0]
