"""SOLO's targets and losses. Which cells answer for which object, and what they should say.

Shapes, for one picture and one level with grid S and mask size (h, w)
    classes   (S, S) int64: the class, or C for background
    cells     (n,) int64: positive cells, row * S + column
    masks     (n, h, w) float 0 or 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd_ray.models.perception.protocol import Instances
from hypersd_ray.models.perception.solo import Level, SOLOConfig, SOLOHead

GAMMA, ALPHA, DICE_WEIGHT, DICE_EPS = 2.0, 0.25, 3.0, 1e-3


@dataclass(frozen=True, eq=False)
class LevelTarget:
    """What one level should say of one picture."""

    classes: Tensor
    cells: Tensor
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Sums:
    """Per picture (B,): focal loss over all cells, dice loss over positive cells, how many cells are positive."""

    focal: Tensor
    dice: Tensor
    positives: Tensor


def level_target(target: Instances, config: SOLOConfig, level: int, size: tuple[int, int]) -> LevelTarget:
    """Targets of one level; `size` (h, w) is its mask size. A later object takes a cell that two claim.

    `target`'s masks have the network's input size, of which (h, w) times stride / 2 is the padded one.
    """
    grid, stride = config.num_grids[level], config.strides[level]
    low, high = config.scale_ranges[level]
    classes = torch.full((grid, grid), config.num_classes, dtype=torch.long)
    chosen: dict[int, int] = {}
    boxes = target.boxes().tolist()
    # what the grid spans: the padded picture
    height, width = (side * stride // 2 for side in size)
    for index, (left, top, right, bottom) in enumerate(boxes):
        box_height, box_width = bottom - top, right - left
        if not low <= (box_height * box_width) ** 0.5 <= high:
            continue
        rows, columns = torch.nonzero(target.masks[index], as_tuple=True)
        center_y, center_x = rows.float().mean().item(), columns.float().mean().item()
        ys = _cells(center_y, 0.5 * config.pos_scale * box_height, height, grid)
        xs = _cells(center_x, 0.5 * config.pos_scale * box_width, width, grid)
        for y in ys:
            for x in xs:
                classes[y, x] = target.labels[index]
                chosen[y * grid + x] = index
    cells = sorted(chosen)
    masks = _shrink(target.masks, [chosen[cell] for cell in cells], size, stride)
    return LevelTarget(classes, torch.tensor(cells, dtype=torch.long), masks)


def _cells(center: float, reach: float, extent: float, grid: int) -> range:
    """The cells within `reach` of the centre of mass, at most one on either side of the centre's own."""
    own = int(center * grid // extent)
    first = max(0, own - 1, int((center - reach) * grid // extent))
    last = min(grid - 1, own + 1, int((center + reach) * grid // extent))
    return range(first, last + 1)


def _shrink(masks: Tensor, chosen: list[int], size: tuple[int, int], stride: int) -> Tensor:
    """The chosen objects' masks at the level's resolution, laid into the padded size's top left corner."""
    out = torch.zeros(len(chosen), *size)
    if chosen:
        distinct = sorted(set(chosen))
        height, width = (round(side * 2 / stride) for side in masks.shape[-2:])
        small = F.interpolate(masks[distinct][None].float(), size=(height, width), mode="bilinear", align_corners=False)
        place = {index: i for i, index in enumerate(distinct)}
        out[:, :height, :width] = (small[0, [place[i] for i in chosen]] >= 0.5).float()
    return out


def sigmoid_focal(logits: Tensor, classes: Tensor) -> Tensor:
    """Sum of the focal loss over classes and cells: logits (C, S, S), classes (S, S) with C for background -> ()."""
    wanted = F.one_hot(classes, len(logits) + 1)[..., :-1].permute(2, 0, 1).to(logits)
    p = logits.sigmoid()
    wrong = torch.where(wanted > 0, 1 - p, p)
    weight = torch.where(wanted > 0, ALPHA, 1 - ALPHA) * wrong**GAMMA
    return (weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()


def dice(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - 2 sum(p t) / (sum p^2 + eps + sum t^2 + eps) for each mask: (n, h, w), (n, h, w) -> (n,)."""
    p, t = logits.sigmoid().flatten(1), masks.flatten(1)
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + DICE_EPS + t.square().sum(1) + DICE_EPS)


def loss_sums(
    head: SOLOHead, levels: Sequence[Level], targets: Sequence[Instances], config: SOLOConfig, rows_only: bool = True
) -> Sums:
    """Loss parts of each picture; `rows_only` False makes all S^2 masks first and gives the same."""
    focal, dices, positives = [], [], []
    for b, target in enumerate(targets):
        f, d, n = [], [], 0
        for index, level in enumerate(levels):
            features = level.mask_features[b]
            size = (features.shape[-2], features.shape[-1])
            wanted = level_target(target, config, index, size)
            f.append(sigmoid_focal(level.class_logits[b].float(), wanted.classes.to(features.device)))
            if not len(wanted.cells):
                continue
            cells = wanted.cells.to(features.device)
            logits = head.mask_logits(index, features, cells) if rows_only else head.mask_logits(index, features)[cells]
            d.append(dice(logits.float(), wanted.masks.to(features.device)).sum())
            n += len(cells)
        focal.append(torch.stack(f).sum())
        dices.append(torch.stack(d).sum() if d else focal[-1].new_zeros(()))
        positives.append(n)
    return Sums(torch.stack(focal), torch.stack(dices), torch.tensor(positives, device=focal[0].device))


def per_picture_loss(sums: Sums) -> Tensor:
    """focal / (positives + 1) + 3 * mean dice, (B,); exactly 0, without a gradient, where nothing is positive."""
    n = sums.positives.to(sums.focal)
    loss = sums.focal / (n + 1) + DICE_WEIGHT * sums.dice / n.clamp(min=1)
    return torch.where(n > 0, loss, torch.zeros_like(loss))


def training_loss(sums: Sums) -> Tensor:
    """The detector's own loss over a batch, pictures without objects included as background: a scalar."""
    n = sums.positives.sum().to(sums.focal)
    return sums.focal.sum() / (n + 1) + DICE_WEIGHT * sums.dice.sum() / n.clamp(min=1)
